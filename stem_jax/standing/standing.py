"""What became of a run: its state, how far it is, what it has saved, where its time went."""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from stem_jax import bucket_lock
from stem_jax.errors import InputError
from stem_jax.files import read_json
from stem_jax.goodput.account import RESTART, SAVE, START, VALIDATION
from stem_jax.goodput.start_record import COMPLETE, FAILED, STOPPED, read_processes, record_path
from stem_jax.goodput.totals import Totals
from stem_jax.local_copy import address_of
from stem_jax.lock import Holder, holders
from stem_jax.standing.member import Member, members
from stem_jax.standing.saves import Saves
from stem_jax.storage import Place, is_remote

NEVER_STARTED, RUNNING, STUCK, KILLED = "never started", "running", "stuck", "killed"
_LOCK = ".lock"
# A step may take so many times as long as usual, and as long as compiling for a larger one.
_USUAL_STEPS = 20
_PATIENCE_SECONDS = 120.0
# Of what has no usual length; the default of train.step_timeout.
_LONG_SECONDS = 1800.0
_LONG_PARTS = {START, RESTART, SAVE, VALIDATION}


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a run stands.

    state: NEVER_STARTED, RUNNING, STUCK, STOPPED, FAILED, KILLED or COMPLETE; why: in words.
    step of steps: steps None where its configuration is not there. hours_left: at the speed of the
    newest start. as_of: of a run in a bucket, seconds since a process last sent its record; None of
    other runs. holders: of the lock, also dead ones. members: processes of the newest start;
    totals: of all that ever were.
    """

    workdir: Place
    state: str
    why: str
    step: int
    steps: int | None
    loss: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    hours_left: float | None
    as_of: float | None
    saves: Saves
    holders: list[Holder]
    members: list[Member]
    totals: list[Totals]

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        values = dataclasses.asdict(self)
        return values | {"workdir": str(self.workdir)}


def standing(workdir: Path, stuck_after: float | None = None) -> Standing:
    """Reads a run's folder; nothing in it is changed.

    Args:
        stuck_after: seconds without a step, in a bucket beyond those between two uploads; None: as
            long as the run's usual step and `train.step_timeout` let expect.

    Raises:
        InputError: there is no such folder.
    """
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is no folder; give that of a run")
    train = _config(workdir).get("train", {})
    address = address_of(workdir)
    in_bucket = is_remote(address)
    found = (bucket_lock.holders if in_bucket else holders)(address / _LOCK)
    processes = read_processes(workdir)
    own = members(workdir, processes, found) if processes else []
    saves = Saves.of(address)
    first = min(own, key=lambda member: member.index, default=None)
    newest = max(saves.steps, default=0)
    step = newest if first is None else max(member.start.step for member in own)
    steps = train.get("steps") or (first.start.steps if first else None) or None
    limit = stuck_after or _limit(own, train.get("step_timeout"))
    if in_bucket:
        # Nothing is heard between two uploads.
        limit += train.get("upload_every", 60.0) or _LONG_SECONDS
    state, why = _judged(own, found, saves, steps, limit, in_bucket)
    loss = usual = rate = None
    if first is not None and first.start.steps_made:
        loss = first.start.loss
        usual = first.start.usual_step_seconds or first.start.step_seconds
        rate = first.start.tokens / first.start.steps_made / usual if usual else None
    return Standing(
        workdir=address,
        state=state,
        why=why,
        step=step,
        steps=steps,
        loss=loss,
        tokens_per_second=rate,
        step_seconds=usual,
        hours_left=_hours_left(first, step, steps),
        as_of=_as_of(workdir, own) if in_bucket else None,
        saves=saves,
        holders=found,
        members=own,
        totals=[Totals.of(starts) for starts in processes],
    )


def _judged(
    own: list[Member],
    found: list[Holder],
    saves: Saves,
    steps: int | None,
    limit: float,
    in_bucket: bool,
) -> tuple[str, str]:
    """The state, and why it is that one. in_bucket: everybody sees its lock."""
    alive = [holder for holder in found if holder.lives]
    if alive:
        return _running(own, alive, limit)
    if not own:
        return _without_records(found, saves, steps)
    abroad = [m for m in own if m.start.end is None and m.silent < limit and not _here(m, found)]
    if abroad and not in_bucket:
        # Some file systems do not show the locks of other hosts.
        seconds, host = min(m.silent for m in abroad), abroad[0].start.host
        return RUNNING, f"on host {host}, whose lock is not seen here; wrote {seconds:.0f} s ago"
    if gone := [m for m in own if m.start.end is None]:
        who = ", ".join(f"process {m.index} ({m.start.pid} on {m.start.host})" for m in gone)
        # A process of another host that is frozen renews and writes nothing either.
        how = "" if all(_here(m, found) for m in gone) else ", or frozen: nothing is heard of it"
        return KILLED, f"{who} is gone without a word{how}; the same command continues"
    if failed := [m for m in own if m.start.end == FAILED]:
        return FAILED, f"process {failed[0].index}: {failed[0].start.why}"
    if all(m.start.end == COMPLETE for m in own):
        return COMPLETE, f"at step {own[0].start.step}"
    return STOPPED, f"told to stop after step {own[0].start.step}; the same command continues"


def _running(own: list[Member], alive: list[Holder], limit: float) -> tuple[str, str]:
    # Records of an earlier start tell nothing of this one.
    current = [m for m in own if m.lives and m.start.end is None]
    if not current:
        return RUNNING, "begins: no record of this start yet"
    count = current[0].start.processes
    stepped = any(m.start.first_step is not None for m in current)
    if len(current) < count and (stepped or min(m.start.seconds for m in current) > limit):
        missing = set(range(count)) - {m.index for m in current}
        return STUCK, f"process {', '.join(map(str, sorted(missing)))} of {count} is missing"
    silent = [m for m in current if m.silent > limit]
    if silent:
        worst = max(silent, key=lambda m: m.silent)
        usual = worst.start.usual_step_seconds
        said = f", usually {usual:.2g} s" if usual else ""
        doing = f" in {worst.start.doing}" if worst.start.doing else ""
        return STUCK, (
            f"no record of process {worst.index} for {worst.silent:.0f} s{doing} (a step{said})"
        )
    if not stepped:
        return RUNNING, f"starts since {min(m.start.seconds for m in current):.0f} s"
    others = f" and {count - 1} more" if count > 1 else ""
    return RUNNING, f"process {current[0].start.pid} on host {current[0].start.host}{others}"


def _without_records(found: list[Holder], saves: Saves, steps: int | None) -> tuple[str, str]:
    """Of a run of an earlier version, or of none."""
    newest = max(saves.steps, default=None)
    if found:
        return KILLED, f"process {found[0].pid} on host {found[0].host} is gone"
    if newest is None:
        return NEVER_STARTED, "no checkpoint and no record"
    if steps is not None and newest >= steps:
        return COMPLETE, f"at step {newest}"
    return STOPPED, f"at step {newest}; how it ended is not recorded"


def _here(member: Member, found: list[Holder]) -> bool:
    """Whether this machine can tell that the process is gone."""
    asked = [h for h in found if (h.host, h.pid) == (member.start.host, member.start.pid)]
    return all(holder.here for holder in asked)


def _limit(own: list[Member], step_timeout: float | None) -> float:
    """How long no record need mean nothing."""
    longest = step_timeout or _LONG_SECONDS
    running = [m.start for m in own if m.lives]
    usual = [s.usual_step_seconds for s in running if s.usual_step_seconds]
    if not usual or any(start.doing in _LONG_PARTS for start in running):
        return longest
    return min(longest, max(_USUAL_STEPS * max(usual), _PATIENCE_SECONDS))


def _as_of(workdir: Path, own: list[Member]) -> float | None:
    """Files of a copy have the times of the bucket's."""
    paths = [record_path(workdir, member.index) for member in own]
    written = max((path.stat().st_mtime for path in paths), default=None)
    return None if written is None else max(0.0, time.time() - written)


def _hours_left(first: Member | None, step: int, steps: int | None) -> float | None:
    if first is None or steps is None or first.start.steps_made < 2:
        return None
    start = first.start
    starting = start.parts.get(START, 0.0) + start.parts.get(RESTART, 0.0)
    return max(0, steps - step) * (start.seconds - starting) / start.steps_made / 3600


def _config(workdir: Path) -> dict[str, Any]:
    with contextlib.suppress(InputError):
        found = read_json(workdir / "config.json")
        return found if isinstance(found, dict) else {}
    return {}


def as_json(found: Standing) -> str:
    """One line."""
    return json.dumps(found.record())


def moment(seconds: float) -> str:
    """A time of the wall, for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
