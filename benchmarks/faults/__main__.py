"""Runs a campaign of faults, and prints its plan, each round and its tables.

python -m benchmarks.faults [--rounds=200] [--seed=0] [--folder=DIR [--continue]]
python -m benchmarks.faults --reshape [--rounds=40] ...
python -m benchmarks.faults --bucket [--rounds=12] ...

One run with offloaded tables goes through all rounds, started again by `launch/local_multihost.sh`
with the same flags each time. At the end its parameters, optimizer states, tables and losses are
those of a run that nothing happened to, bit for bit, or the program exits with 1. With --disk all
but 64 rows are on disk, in the work folder. With --bucket the folder is in a bucket of a server of
S3 here, which fails: 5xx, resets, an absence, kills inside saves to it. With --reshape processes
and resident rows change.
--continue goes on after an interruption, and after the end of a campaign of fewer rounds.

lost steps: logged before the fault and done again after it; never more than promised and the steps
that ran beside a save that did not get to the disk (in flight). down: seconds until every process
was gone. recovered: seconds from the fault to the first new step, with the start.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from benchmarks.faults.campaign import Campaign
from benchmarks.faults.kinds import FAULTS, possible
from benchmarks.faults.plan import planned
from benchmarks.faults.report import reshape_table, table, time_table
from benchmarks.faults.reshape import Reshaping, planned_shapes
from benchmarks.faults.run import STEP_TIMEOUT
from tests.buckets import Bucket, Servers


def main() -> None:
    """Runs the campaign, prints each round and the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, help="200, 40 with --reshape, 12 with --bucket")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps")
    parser.add_argument("--disk", action="store_true", help="with most rows on disk")
    parser.add_argument("--bucket", action="store_true", help="in a bucket, with its own faults")
    parser.add_argument("--reshape", action="store_true", help="other processes and resident rows")
    parser.add_argument(
        "--step-timeout", type=int, default=STEP_TIMEOUT, help="seconds; more on a busy machine"
    )
    parser.add_argument(
        "--folder",
        help="kept afterwards, with the small file system in it (umount); without it, a temporary "
        "one",
    )
    parser.add_argument(
        "--continue", dest="goes_on", action="store_true", help="after the rounds that are done"
    )
    args = parser.parse_args()
    args.rounds = args.rounds or (40 if args.reshape else 12 if args.bucket else 200)
    if args.bucket and (args.goes_on or args.disk or args.reshape):
        parser.error("--bucket goes without --continue, --disk and --reshape: its server is gone")
    if args.goes_on and not args.folder:
        parser.error("--continue needs the --folder of the campaign")
    # The runs are on the CPU, and so is what compares them.
    jax.config.update("jax_platforms", "cpu")
    with contextlib.ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
        kinds = _settle(folder, args)
        if args.reshape:
            _reshape(folder, args)
        else:
            _campaign(folder, args, kinds)
    print(f"seed {args.seed}; jax {jax.__version__}, Python {platform.python_version()}")


def _campaign(folder: Path, args: argparse.Namespace, kinds: list[str]) -> None:
    plan = planned(args.seed, args.rounds, kinds)
    of_disk = {name for name, fault in FAULTS.items() if not fault.in_bucket}
    if left_out := of_disk - set(kinds) if not args.bucket else None:
        print(f"without {', '.join(sorted(left_out))}: they need root, or a table in memory")
    print(f"seed {args.seed}, the plan:", *plan, sep="\n", flush=True)
    every, timeout = args.checkpoint_every, args.step_timeout
    with (
        _bucket() if args.bucket else contextlib.nullcontext() as bucket,
        Campaign(folder, every, disk=args.disk, step_timeout=timeout, bucket=bucket) as campaign,
    ):
        records = campaign.go(plan, _say)
        print(table(records))
        print(time_table(campaign.accounts()))
        if not args.folder:
            campaign.remove()
    print(f"{len(records)} rounds: the end equals that of the undisturbed run bit for bit")


@contextlib.contextmanager
def _bucket() -> Iterator[Bucket]:
    """One of a server here, which this process finds, too."""
    with contextlib.closing(Servers()) as servers:
        os.environ.update(servers.environment)
        bucket = Bucket("s3", "faults", servers)
        bucket.make()
        yield bucket


def _reshape(folder: Path, args: argparse.Namespace) -> None:
    shapes = planned_shapes(args.seed, args.rounds)
    print(f"seed {args.seed}, the plan:", *shapes, sep="\n", flush=True)
    every = args.checkpoint_every
    with Reshaping(folder, args.seed, every, step_timeout=args.step_timeout) as reshaping:
        records = reshaping.go(shapes, _say)
    print(reshape_table(records))
    print(f"{len(records)} rounds: no step and no row was lost")


def _settle(folder: Path, args: argparse.Namespace) -> list[str]:
    """The kinds of faults of the folder's campaign, also if there are more by now.

    Exits where the folder has another campaign, or one that is not to be continued.
    """
    said = {"seed": args.seed, "checkpoint_every": args.checkpoint_every, "disk": args.disk}
    said |= {"bucket": True} if args.bucket else {}
    file = folder / ("reshape.json" if args.reshape else "campaign.json")
    if file.exists() and not args.goes_on:
        sys.exit(f"{folder} has a campaign; --continue goes on with it")
    if file.exists():
        found = json.loads(file.read_text())
        kinds = found.pop("kinds")
        if found != said:
            sys.exit(f"{folder} has another campaign: {file.read_text()}")
        return kinds
    folder.mkdir(parents=True, exist_ok=True)
    kinds = possible(args.disk, args.bucket)
    file.write_text(json.dumps(said | {"kinds": kinds}))
    return kinds


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
