"""The faults. Each strikes a run that trains, and says how its processes ended."""

import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable

import psutil

from benchmarks.faults import buckets, damage, hosts, starts
from benchmarks.faults.plan import Round
from benchmarks.faults.run import FULL_EVERY, Run

# In which a save of the campaign's model is on its way to the disk.
_SAVE_SECONDS = 0.6
# In which a run makes some steps, with their swaps of rows.
_STEPS_SECONDS = 0.3


@dataclasses.dataclass(frozen=True)
class Fault:
    """strike: gives the exit status, None if the processes go on. intervals: between checkpoints
    that may be lost, beside a save in flight; 0: no step. root: it needs the rights of root.
    in_memory: it needs a table in memory, whose saves build on others. in_bucket: it is one of a
    run whose folder is in a bucket.
    """

    strike: Callable[[Run, Round, random.Random], int | None]
    intervals: int = 1
    root: bool = False
    in_memory: bool = False
    in_bucket: bool = False


def _kill_one(run: Run, at: Round, rng: random.Random) -> int:
    run.process(rng.randrange(1, run.shape.processes)).kill()
    return run.wait()


def _kill_coordinator(run: Run, at: Round, rng: random.Random) -> int:
    run.process(0).kill()
    return run.wait()


def _kill_all(run: Run, at: Round, rng: random.Random) -> int:
    starts.kill(run.processes())
    return run.wait()


def _kill_in_save(run: Run, at: Round, rng: random.Random) -> int:
    victims = starts.victims(run, rng)
    run.wait_until(run.unfinished_saves, "a save")
    time.sleep(at.moment * _SAVE_SECONDS)
    starts.kill(victims)
    return run.wait()


def _kill_in_swaps(run: Run, at: Round, rng: random.Random) -> int:
    victims = starts.victims(run, rng)
    time.sleep(at.moment * _STEPS_SECONDS)
    starts.kill(victims)
    return run.wait()


def _terminate_often(run: Run, at: Round, rng: random.Random) -> int:
    processes = run.processes()
    for _ in range(rng.randrange(3, 9)):
        try:
            rng.choice(processes).send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            break
        time.sleep(rng.random() * at.moment)
    return run.wait()


FAULTS: dict[str, Fault] = {
    "kill -9 of a process": Fault(_kill_one),
    "kill -9 of the coordinator": Fault(_kill_coordinator),
    "kill -9 of all": Fault(_kill_all),
    "kill -9 inside a save": Fault(_kill_in_save),
    "kill -9 inside a restore": Fault(starts.kill_in_restore),
    "kill -9 between swaps of rows": Fault(_kill_in_swaps),
    "kill -9 inside prepare": Fault(starts.kill_in_prepare, 0),
    "kill -9 while joining": Fault(starts.kill_while_joining),
    "kill -9 before the first exchange": Fault(starts.kill_before_exchange),
    "SIGTERM to a process": Fault(starts.terminate, 0),
    "burst of SIGTERM": Fault(_terminate_often, 0),
    "newest checkpoint truncated": Fault(damage.truncate),
    "newest checkpoint lacks a file": Fault(damage.unlink),
    "newest checkpoint torn": Fault(damage.tear),
    "newest checkpoint has a flipped bit": Fault(damage.flip),
    "a save below the newest has a flipped bit": Fault(
        damage.flip_base, FULL_EVERY, in_memory=True
    ),
    "full disk": Fault(damage.fill_disk, root=True),
    "stuck process": Fault(hosts.suspend),
    "slow host": Fault(hosts.slow, 0),
    "host with another clock": Fault(hosts.other_clock),
    "partitioned coordinator": Fault(hosts.partition, root=True),
    "5xx of the bucket": Fault(buckets.fail_at_times, in_bucket=True),
    "connections to the bucket reset": Fault(buckets.reset_connections, in_bucket=True),
    "5xx of the bucket at a start": Fault(buckets.fail_at_start, in_bucket=True),
    "connections reset at a start": Fault(buckets.reset_at_start, in_bucket=True),
    "bucket away for minutes": Fault(buckets.away, in_bucket=True),
    "kill -9 inside a save to the bucket": Fault(buckets.kill_in_save, in_bucket=True),
}


def possible(disk: bool = False, bucket: bool = False) -> list[str]:
    """Those that this user may cause; disk: most rows of the run are on disk; bucket: its folder is
    in a bucket."""
    return [
        name
        for name, fault in FAULTS.items()
        if (os.geteuid() == 0 or not fault.root)
        and not (disk and fault.in_memory)
        and fault.in_bucket == bucket
    ]
