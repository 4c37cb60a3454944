"""What a run in a bucket asks of the store: requests, bytes and seconds, and whether losses differ.

python -m benchmarks.buckets [--steps=100] [--latency=0.0]

Trains configs/tiny.py and configs/tiny_offload.py for half of the steps, and the other half as a
machine goes on that has nothing of the run, in a folder of this machine and in buckets of servers
that run here, behind a proxy that counts. Needs the packages of the tests.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from stem_jax.bucket import read_file
from stem_jax.local_copy import VARIABLE
from stem_jax.storage import Place
from tests.buckets import Bucket, Servers

_CONFIGS = ("tiny", "tiny_offload")


def train(config: str, workdir: Place, steps: int, **environment: str) -> float:
    """Seconds that a training takes, with its start."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "stem_jax.train", f"--config=configs/{config}.py"]
    command += [f"--workdir={workdir}", f"--config.train.steps={steps}"]
    # The same schedule for both halves.
    command += ["--config.optimizer.schedule=constant", "--config.train.sample_prompt="]
    subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def losses(workdir: Place) -> list[tuple[int, float | None, float | None]]:
    """Of each record of a run."""
    records = map(json.loads, read_file(workdir / "metrics.jsonl").splitlines())
    return [(r["step"], r.get("train/loss"), r.get("eval/loss")) for r in records]


def row(cells: Sequence[object]) -> str:
    """A line of a table of Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def measure(config: str, steps: int, servers: Servers, latency: float) -> None:
    """Prints the lines of one configuration."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "run"
        for part, end in (("begins", steps // 2), ("goes on", steps)):
            seconds = train(config, local, end)
            print(row([config, "disk", part, f"{seconds:.1f}", "", "", "", ""]), flush=True)
        expected = losses(local)
    for scheme in ("s3", "gs"):
        bucket = Bucket(scheme, f"{scheme}-{config.replace('_', '-')}", servers)
        bucket.make()
        for part, end in (("begins", steps // 2), ("goes on", steps)):
            bucket.proxy.reset()
            bucket.proxy.latency = latency
            with tempfile.TemporaryDirectory() as machine:
                where = servers.environment | {VARIABLE: machine}
                seconds = train(config, bucket.path / "run", end, **where)
            counts = bucket.proxy.requests
            said = ", ".join(f"{n} {method}" for method, n in sorted(counts.items()))
            sent, got = (f"{n / 2**20:.1f}" for n in (bucket.proxy.sent, bucket.proxy.received))
            cells = [config, scheme, part, f"{seconds:.1f}", counts.total(), said, sent, got]
            print(row(cells), flush=True)
        bucket.proxy.reset()
        same = losses(bucket.path / "run") == expected
        print(f"<!-- {config} {scheme}: losses {'equal, bit for bit' if same else 'DIFFER'} -->")


def main(argv: list[str]) -> None:
    """Parses flags and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each request")
    args = parser.parse_args(argv)
    servers = Servers()
    os.environ.update(servers.environment)
    titles = ["config", "run folder", "", "seconds", "requests", "of them", "MiB sent", "MiB got"]
    print(f"{row(titles)}\n{row(['---'] * len(titles))}", flush=True)
    try:
        for config in _CONFIGS:
            measure(config, args.steps, servers, args.latency)
    finally:
        servers.close()


if __name__ == "__main__":
    main(sys.argv[1:])
