"""A run from its folder: prepare or resume, report, train, save, and say how it went."""

import contextlib
import dataclasses
import enum
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from stem_jax.bucket import is_folder
from stem_jax.bucket_lock import BucketLock
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.disk_tables import DiskTables, moved_to_disk
from stem_jax.checkpoints.files import set_aside_damaged
from stem_jax.checkpoints.loading import check_tokenizer
from stem_jax.checkpoints.origin import Origin, begin_from, find_origin
from stem_jax.checkpoints.tables import stores_for
from stem_jax.config import Config
from stem_jax.data.loader import Share
from stem_jax.errors import InputError
from stem_jax.goodput.account import SAVE
from stem_jax.goodput.progress import KeptProgress, kept_progress
from stem_jax.goodput.start_record import COMPLETE, STOPPED
from stem_jax.local_copy import LocalCopy, address_of, checkpoints_of
from stem_jax.lock import Lock
from stem_jax.memory.catalogue import with_eos, with_trained_tokens
from stem_jax.mesh import BATCH_AXES, axis_size, check_placement, make_mesh, own_batch_shards
from stem_jax.processes.agreement import (
    PREPARING_SECONDS,
    check_same,
    exchange,
    is_first,
    unanimous,
)
from stem_jax.processes.code_version import code_version
from stem_jax.processes.process_log import log, process_log
from stem_jax.processes.start_clock import StartClock
from stem_jax.processes.stop_signal import StopSignal
from stem_jax.processes.watchdog import Watchdog
from stem_jax.run_checks import check_documents, check_first_start, check_mesh, check_tables
from stem_jax.run_saves import RunSaves, data_record, owes_validation
from stem_jax.staging import staged_versions
from stem_jax.storage import Place, place
from stem_jax.tables.first_rows import FirstRows
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.spec import TableState
from stem_jax.training.baselines import token_unigrams, xz
from stem_jax.training.evaluation import Validation
from stem_jax.training.loop import Loop
from stem_jax.training.metrics import MetricsLog
from stem_jax.training.past_updates import NO_PAST, PastUpdates
from stem_jax.training.resume import check_resumable
from stem_jax.training.run_data import TOKENIZER_FOLDER, RunData, open_run_data
from stem_jax.training.start_report import describe_run
from stem_jax.training.state import TrainState, abstract_state, init_state, table_key
from stem_jax.training.step import TrainStep
from stem_jax.training.step_trace import check_traced_steps
from stem_jax.training.trackers import tracker
from stem_jax.training.trackers.tracking import Tracking, check_trackers
from stem_jax.work_folder import on_this_machine, writing


class Ending(enum.Enum):
    """How a call of `train` ended: with the last step, without a step to make, or told to stop."""

    COMPLETED = enum.auto()
    WAS_COMPLETE = enum.auto()
    STOPPED = enum.auto()


def train(
    config: Config,
    workdir: str | Place,
    sample: Callable[[Config, Path], str | None] | None = None,
) -> Ending:
    """Trains, or continues, the run in `workdir`, which may be in a bucket.

    Every process of a run calls it. SIGTERM and SIGINT, to any of them, end it after the step under
    way, with a checkpoint.

    Args:
        sample: called by process 0 when the last step is done; the text that it returns is shown
            where the metrics are.

    Raises:
        InputError: the configuration, the data or the folder cannot be used.
        TrainingError: the run cannot go on.
    """
    clock = StartClock()
    # Whoever is alone joins nobody.
    clock.mark("joining" if jax.process_count() > 1 else "imports and devices")
    address = place(workdir, "--workdir")
    check_same(_facts_of_command(config))
    with (
        writing(address) as lock,
        on_this_machine(address, config.train.upload_every) as (workdir, copy),
        process_log(workdir, jax.process_index()) as own_log,
        Tracking(workdir) as tracking,
    ):
        try:
            own = jax.process_index(), jax.process_count()
            with kept_progress(workdir, *own, clock.began) as progress:
                ending = _train(config, workdir, clock, own_log, lock, copy, progress, tracking)
            if ending is Ending.COMPLETED:
                tracking.ending = tracker.Ending.COMPLETE
            if tracking.ending is tracker.Ending.COMPLETE:
                text = sample(config, workdir) if sample is not None and is_first() else None
                if text is not None:
                    tracking.add_text("sample", text)
            return ending
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"no space left at {error.filename or workdir}; the last checkpoint stands: free "
                "space, and the same command continues"
            ) from error


def _train(
    config: Config,
    workdir: Path,
    clock: StartClock,
    own_log: Path,
    lock: Lock | BucketLock | None,
    copy: LocalCopy | None,
    progress: KeptProgress,
    tracking: Tracking,
) -> Ending:
    with unanimous():
        check_trackers(config)
        mesh = make_mesh(config.mesh)
        info = _latest(workdir, config.checkpoint.verify)
        if info is not None:
            config = with_eos(config, info.config.ngram.eos_id)
            check_resumable(info.config, config, info.updates, info.past)
        under_way = info is not None and info.updates > 0
        check_mesh(config, mesh, under_way)
        # Refused here, before anything is compiled.
        check_traced_steps(config.train.profile_steps, config.train.steps)
        if not under_way:
            check_first_start(config)
        origin = find_origin(config) if info is None else None
    latest, past = _behind(info, origin)
    data = _open_data(config, workdir, mesh, info, past.first_step, copy)
    config = with_eos(config, data.tokenizer.special.eos_id)
    config = with_trained_tokens(config, data.tokenizer)
    if info is not None:
        # Once more: now words are tokens.
        check_resumable(info.config, config, info.updates, info.past)
    if origin is not None:
        origin.check(config)
    record, owed = data_record(config, data), owes_validation(workdir, info)
    # Each machine has its own copies.
    check_same(
        {f"the copy of {address}": name for address, name in staged_versions().items()},
        "it was written in between: start again when that has ended",
    )
    check_same(
        {"the newest checkpoint": str(latest), "the tokenizer": data.tokenizer.fingerprint}
        | {"the validations that were made": str(owed)}
        | {f"the text of source {i}": text for i, text in enumerate(record["checksums"])}
    )
    _check_continues(info, data, record, workdir)
    _check_origin(origin, data)
    if latest > config.train.steps or (latest == config.train.steps and not owed):
        log.info(f"run complete: {address_of(workdir)} is at step {latest} of {config.train.steps}")
        if latest == config.train.steps and tracking.catch_up(config, latest):
            MetricsLog(workdir, latest, tracking=tracking).close()
        return Ending.WAS_COMPLETE
    check_documents(config, mesh, data)
    clock.mark("data")
    programs = TrainStep(config, mesh)
    check_placement(programs.blueprint.placed(), mesh, config.mesh.max_replicated_mib)
    rows_in_flight = check_tables(config, programs, data, latest)
    if is_first():
        (workdir / "config.json").write_text(config.to_json())
    tracking.begin(config, latest)
    log.info(describe_run(programs.blueprint, rows_in_flight))
    with contextlib.ExitStack() as stack:
        # Closed in reverse: the last save reads the store, whose threads end before.
        watchdog = stack.enter_context(Watchdog(config.train.step_timeout, own_log))
        # Metrics in a bucket are never behind a checkpoint there.
        before = copy.upload if copy is not None else lambda: None
        keep, full_every = config.checkpoint.keep, config.checkpoint.full_every
        checkpoints = Checkpointer(workdir, keep=keep, full_every=full_every, before_commit=before)
        stack.enter_context(checkpoints)
        disk = DiskTables(mesh, workdir, checkpoints.steps(), keep)
        state, stores = _open_state(programs, checkpoints, disk, info, origin)
        prefetches, tables = {}, config.tables
        for name, store in stores.items():
            stack.callback(store.close)
            prefetch = Prefetch(mesh, store, tables.cache_policy, tables.prefetch)
            prefetches[name] = stack.enter_context(prefetch)
            loaded = {name: TableState(**prefetch.load())}
            state = dataclasses.replace(state, tables=state.tables | loaded)
        clock.mark("state")

        saves = RunSaves(
            config, workdir, lock, checkpoints, data.tokenizer, record, past, stores, prefetches
        )

        def beat(place: str) -> None:
            watchdog.beat(place)
            if checkpoints.tidy(stores):
                progress.save_ended()
            progress.beat()

        if copy is not None:
            # From here on it is not refused any more.
            copy.counts = True
        with StopSignal() as stop:
            loop = Loop(
                config,
                programs,
                data,
                workdir,
                prefetches,
                saves.save,
                saves.add_validation,
                stop,
                beat,
                clock,
                past,
                progress,
                tracking,
            )
            state, validation, done = loop.run(state, owed)
            with progress.part(SAVE):
                checkpoints.wait()
            checkpoints.tidy(stores)
            progress.save_ended()
    progress.ended(COMPLETE if done else STOPPED)
    if not done:
        log.info(f"stopped at step {int(state.step)}; the same command continues")
        return Ending.STOPPED
    log.info(f"run complete: step {config.train.steps}, {address_of(workdir)}")
    if validation is not None and is_first():
        log.info(_verdict(config, data, validation))
    return Ending.COMPLETED


def _facts_of_command(config: Config) -> dict[str, str]:
    """What must be the same in all processes from the start."""
    facts = {"the version of stem_jax": code_version(), "the version of jax": jax.__version__}
    for section, values in json.loads(config.to_json()).items():
        facts |= {f"config.{section}.{key}": json.dumps(value) for key, value in values.items()}
    return facts


def _open_data(
    config: Config,
    workdir: Path,
    mesh: Mesh,
    info: CheckpointInfo | None,
    first_step: int,
    copy: LocalCopy | None,
) -> RunData:
    """Process 0 prepares what was not prepared before; then the others open it."""
    shards = own_batch_shards(mesh)
    num_shards = axis_size(mesh, BATCH_AXES)
    share = Share.of_devices(shards, num_shards, config.train.micro_batches)
    # A shared data.folder may hold the text as it was and as it is now.
    checksums = () if info is None else info.data["checksums"]
    reading: dict[str, Any] = {"checksums": checksums, "share": share, "first_step": first_step}
    data = None
    with unanimous(PREPARING_SECONDS):
        if is_first():
            data = open_run_data(config, workdir, prepared=info is not None, **reading)
            if copy is not None and jax.process_count() > 1:
                copy.upload()
    # Hosts may have to bring the text from a bucket first.
    with unanimous(PREPARING_SECONDS):
        if data is None:
            if copy is not None:
                copy.fetch()
            data = open_run_data(config, workdir, prepared=True, **reading)
    return data


def _behind(info: CheckpointInfo | None, origin: Origin | None) -> tuple[int, PastUpdates]:
    """The batches consumed before this start, and the past that its updates have."""
    if info is not None:
        return info.step, info.past
    return (0, NO_PAST) if origin is None else (origin.step, origin.past)


def _check_continues(
    info: CheckpointInfo | None, data: RunData, record: dict, workdir: Path
) -> None:
    """Refuses a tokenizer or a text other than those of the checkpoint."""
    if info is None:
        return
    check_tokenizer(info, data.tokenizer, workdir / TOKENIZER_FOLDER)
    if info.data != record:
        raise InputError(
            f"the text behind data.sources={info.config.data.sources!r} is not what checkpoint "
            f"{info.step} was trained on; bring it back, or start in another --workdir"
        )


def _check_origin(origin: Origin | None, data: RunData) -> None:
    if origin is not None and origin.info.tokenizer != data.tokenizer.fingerprint:
        raise InputError(
            f"{origin.key}={origin.folder} was trained with tokenizer "
            f"{origin.info.tokenizer[:12]}, this run has {data.tokenizer.fingerprint[:12]}: its "
            "rows would belong to other tokens; leave out data.tokenizer_path, and prepare the "
            "text with that tokenizer"
        )


def _open_state(
    programs: TrainStep,
    checkpoints: Checkpointer,
    disk: DiskTables,
    info: CheckpointInfo | None,
    origin: Origin | None,
) -> tuple[TrainState, dict[str, HostStore]]:
    """The state to begin with. Offloaded tables are in the stores and not in the state."""
    config, mesh = programs.config, programs.mesh
    offloaded = {n: spec for n, spec in programs.reads.specs.items() if spec.offloaded}
    if origin is not None:
        log.info(origin.describe(config))
        state, stores = begin_from(origin, programs)
    elif info is None:
        stores = {}
        with unanimous(PREPARING_SECONDS):
            for name, spec in offloaded.items():
                key = table_key(config, name)
                if spec.on_disk:
                    stores[name] = disk.begin(spec, FirstRows.of(spec, key))
                else:
                    stores[name] = HostStore.create(spec, key, mesh)
        return init_state(programs.blueprint), stores
    else:
        with unanimous(PREPARING_SECONDS):
            there = {n: spec for n, spec in offloaded.items() if disk.has(spec, info, n)}
            others = {n: spec for n, spec in offloaded.items() if n not in there}
            stores = stores_for(info, others, mesh)
            stores |= {name: disk.reopen(spec, info, name) for name, spec in there.items()}
        state = checkpoints.restore(info.step, abstract_state(programs.blueprint), stores)
        log.info(f"resuming from step {info.step}")
    # Reads and writes all rows, where they move.
    with unanimous(PREPARING_SECONDS):
        return state, moved_to_disk(disk, offloaded, stores)


def _latest(workdir: Path, verify: bool) -> CheckpointInfo | None:
    """The newest whole checkpoint's plain part, read before anything is prepared or written."""
    folder = checkpoints_of(workdir)

    # A folder that another process is about to make is not asked for twice.
    exists = exchange(lambda: json.dumps(is_folder(folder)).encode())[0] == b"true"
    if not exists:
        return None
    lines = set_aside_damaged(folder, verify=verify)
    for line in lines if is_first() else ():
        log.warning(line)
    with Checkpointer(workdir, read_only=True) as checkpoints:
        latest = checkpoints.latest_step()
        return None if latest is None else checkpoints.info(latest)


def _verdict(config: Config, data: RunData, validation: Validation) -> str:
    lines = [f"held-out text: {validation.bits_per_byte:.3f} bits per byte{validation.caution}"]
    held_out = data.held_out
    # Of text that is scored in part there is nothing to compare with.
    if not config.eval.baselines or held_out is None or not held_out.scores_all:
        return lines[0]
    unigrams = token_unigrams(list(data.stores), held_out, config.model.vocab_size)
    for baseline in (unigrams, xz(held_out, data.tokenizer)):
        ratio = validation.bits_per_byte / baseline.bits_per_byte - 1
        how = "better" if ratio < 0 else "worse"
        note = f" (from {baseline.sample})" if baseline.sample else ""
        what = f"  {baseline.name:<15} {baseline.bits_per_byte:.3f}"
        lines.append(f"{what}: the model is {abs(ratio):.0%} {how}{note}")
    return "\n".join(lines)
