"""One run of a study as a process of its own: trained, measured, and its record written.

python -m stem_jax.study.job < JOB.json

The parent says everything in a JSON object on standard input, and reads the exit status: 0 a record
was written, 1 refused with a line, 3 stopped by a signal after a save.
"""

import ctypes
import json
import os
import platform
import signal
import sys
from pathlib import Path
from typing import Any

from stem_jax import cli
from stem_jax.errors import DivergedError, InputError

STOPPED = 3
# Of Linux's prctl.
_DEATH_SIGNAL = 1


def main(argv: list[str]) -> None:
    """Does the job on the cores that it names."""
    job = json.load(sys.stdin)
    end_with(job["parent"])
    if job["cores"]:
        # Before JAX: it starts as many threads as it finds cores.
        os.sched_setaffinity(0, job["cores"])
    from stem_jax.jax_start import start_jax

    start_jax(True, Path(job["compiled"]))
    from stem_jax.config_file import config_from_json
    from stem_jax.run import Ending, train
    from stem_jax.study.code_state import commit, short

    config, workdir = config_from_json(json.dumps(job["config"])), Path(job["workdir"])
    if commit() != job["commit"]:
        raise InputError(
            f"the code is {short(commit())} now, the study began with {short(job['commit'])}: "
            "bring that back, or begin again"
        )
    diverged = False
    try:
        if train(config, workdir) is Ending.STOPPED:
            sys.exit(STOPPED)
    except DivergedError as error:
        print(f"diverged: {error}", file=sys.stderr)
        diverged = True
    _write(job, config, workdir, diverged)


def end_with(parent: int) -> None:
    """Where the system can: this process is killed when its parent is gone, whatever ended that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            # It was gone before.
            sys.exit(STOPPED)


def _write(job: dict[str, Any], config: Any, workdir: Path, diverged: bool) -> None:
    import jax

    from stem_jax.study.curve import curve_of
    from stem_jax.study.machine import cpu_model
    from stem_jax.study.measures import measure_run
    from stem_jax.study.prepared_text import open_text
    from stem_jax.study.record import config_of_record, write_record
    from stem_jax.study.sizes import compiled_flops, size_of
    from stem_jax.study.state_digest import state_digest

    text = open_text(Path(job["text"]))
    curve = curve_of(workdir, config.tokens_per_step)
    # It may have got lost with finite losses all along.
    last = curve["loss"][-1]
    lost = diverged or last is None or last > curve["loss"][0]
    if diverged:
        found = {"measures": {}, "documents": {"nats": [], "bytes": []}, "curve": curve}
        digests = {}
    else:
        found, digests = measure_run(workdir, text), state_digest(workdir)
    own = {
        "name": job["name"],
        "run": job["run"],
        "commit": job["commit"],
        "machine": {
            "cpu": cpu_model(),
            "threads": len(job["cores"]) or os.cpu_count(),
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
        },
        "config": config_of_record(config, job["run"]["text"]),
        "checksums": {"text": text.checksum, **digests},
        "diverged": round(curve["tokens"][-1] / config.tokens_per_step) if lost else None,
        "size": size_of(config) | {"compiled_flops_per_token": compiled_flops(config)},
    }
    write_record(Path(job["records"]), own | found)


if __name__ == "__main__":
    cli.run(main)
