"""Plans a run: python -m stem_jax.plan --config=configs/stem_1b.py --topology=v5e:8x8"""

from stem_jax import cli
from stem_jax.config_file import load_config
from stem_jax.cuda_plugin import hide_cuda_plugin
from stem_jax.errors import InputError


def main(argv: list[str]) -> None:
    """Parses flags, compiles the step for the pod and prints the plan."""
    parser = cli.Parser(
        "stem_jax.plan",
        "Compiles the train step of a config file for a TPU pod or for hosts of GPUs, on\n"
        "a machine without any, and says whether it fits, what it sends and what bounds\n"
        "its speed. Topologies: v4, v5e, v5p, v6e as in v5e:8x8; h100, h200, b200 as in\n"
        "h100:8, the GPUs of a host; and cpu:8 (fake CPU devices).\n"
        "Any key of configs/base.py can be given as --config.section.key=value.",
    )
    parser.add_path("--config", required=True, help="config file, e.g. configs/stem_1b.py")
    parser.add_argument("--topology", required=True, help="kind and shape of a slice or host")
    parser.add_argument("--slices", type=int, default=1, help="slices, or hosts, of that shape")
    parser.add_argument("--hit-rate", type=float, help="of rows in host memory; else as uniform")
    switches = {
        "--tables": "the arithmetic of the tables alone, in seconds, without compiling",
        "--naive-lookup": "for contrast: table[ids] and its gradient, partitioned automatically",
        "--all-distinct": "room for every token distinct; else for what Zipf's law expects",
        "--full-effort": "for TPUs: compile as a run does, which takes minutes more",
        "--account": "of TPUs: cycles, time on the wires by part of the step; takes --full-effort",
        "--json": "print one JSON object",
    }
    for flag, meaning in switches.items():
        parser.add_argument(flag, action="store_true", help=meaning)
    flags, overrides = cli.split_overrides(argv)
    args = parser.parse_args(flags)
    if args.tables and (args.naive_lookup or args.full_effort or args.account):
        parser.error("--tables compiles nothing: leave out the flags of what is compiled")
    config = load_config(args.config, overrides)
    hide_cuda_plugin()
    import jax

    from stem_jax.planning.plan import make_plan
    from stem_jax.planning.plan_text import as_json, as_text, verdict
    from stem_jax.planning.table_plan import plan_tables
    from stem_jax.planning.topology import Topology

    topology = Topology.parse(args.topology, args.slices)
    # The devices of a plan are descriptions; the process itself needs none but the CPU.
    jax.config.update("jax_platforms", "cpu")
    options = {name: getattr(args, name) for name in ("all_distinct", "hit_rate")}
    if not args.tables:
        compiled = ("naive_lookup", "full_effort", "account")
        options |= {name: getattr(args, name) for name in compiled}
    plan = (plan_tables if args.tables else make_plan)(config, topology, **options)
    print(as_json(plan) if args.json else as_text(plan))
    if not plan.fits:
        raise InputError(f"{verdict(plan)}; try {plan.remedies[0]}")


if __name__ == "__main__":
    cli.run(main)
