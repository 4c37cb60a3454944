"""Says how a run stands: python -m stem_jax.status --workdir=DIR [--json]"""

from stem_jax import cli
from stem_jax.errors import InputError
from stem_jax.standing.standing import as_json, standing
from stem_jax.standing.text import text


def main(argv: list[str]) -> None:
    """Parses flags and reads the work folder, which is left as it is."""
    parser = cli.Parser(
        "stem_jax.status",
        "Says how a run stands, from its folder alone: running, stuck, stopped, failed, killed,\n"
        "complete or never started; its step, speed and checkpoints, and where the time of each\n"
        "process went. Works while it runs, and on any host that sees the folder.",
    )
    parser.add_seen_folder("--workdir", required=True, help="run folder")
    parser.add_argument("--json", action="store_true", help="all of it as one line of JSON")
    parser.add_argument(
        "--stuck-after",
        type=float,
        metavar="SECONDS",
        help="without a record; by default 20 usual steps, at least 120, and train.step_timeout "
        "where no step is under way; in a bucket the time between two uploads is added",
    )
    args = parser.parse_args(argv)
    if args.stuck_after is not None and not args.stuck_after > 0:
        raise InputError(f"--stuck-after={args.stuck_after:g} must be above 0 seconds")
    found = standing(args.workdir, args.stuck_after)
    print(as_json(found) if args.json else text(found))


if __name__ == "__main__":
    cli.run(main)
