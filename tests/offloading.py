"""Runs of the real training loop, on random tokens, for the tests of tables in host memory."""

import contextlib
import copy
import dataclasses
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.config import Config
from stem_jax.mesh import axis_size
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.spec import TableState
from stem_jax.training.loop import Loop
from stem_jax.training.run_data import RunData
from stem_jax.training.state import TrainState, abstract_state, init_state, table_key
from stem_jax.training.step import TrainStep
from stem_jax.training.working_set import working_set
from tests.logical import logical_table

# The arrays of a table in float32 with AdamW's moments, and their dtypes.
FIELDS = {"rows": np.float32, "mu": np.float32, "nu": np.float32, "last_step": np.int32}
STEPS = 60
VOCAB = 2048
# A batch of 64 tokens asks for some 45 of the rows.
SIZES = {
    "model.vocab_size": VOCAB,
    "train.steps": STEPS,
    "train.global_batch_size": 8,
    "train.seq_len": 8,
    "train.log_every": 1,
    "model.num_layers": 2,
    "model.stem_layers": (0, 1),
    "optimizer.learning_rate": 1e-2,
    "eval.every": 20,
    "checkpoint.every": 30,
}

Arrays = dict[str, np.ndarray]


class ZipfBatches:
    """Batches of Zipf-distributed tokens, each a function of its number; a process has its part.

    Every other sequence ends in padding, and all are two documents.
    """

    def __init__(self, config: Config, processes: tuple[int, int] = (0, 1), seed: int = 0):
        self._config, self._processes, self._seed = config, processes, seed
        weights = 1 / np.arange(1, config.model.vocab_size + 1) ** 1.1
        self._probability = weights / weights.sum()

    def batch(self, step: int) -> Arrays:
        B, L = self._config.train.global_batch_size, self._config.train.seq_len
        rng = np.random.default_rng([self._seed, step])
        text_BxT = rng.choice(len(self._probability), (B, L + 1), p=self._probability)
        length_B = np.where(np.arange(B) % 2, L, rng.integers(1, L + 1, B))[:, None]
        split_B, place_L = rng.integers(1, L, (B, 1)), np.arange(L)
        real_BxL = place_L < length_B
        fields = {
            "tokens": text_BxT[:, :-1],
            "targets": text_BxT[:, 1:],
            "positions": np.where(place_L < split_B, place_L, place_L - split_B),
            "segment_ids": np.where(real_BxL, 1 + (place_L >= split_B), 0),
        }
        index, count = self._processes
        mine = slice(index * B // count, (index + 1) * B // count)
        batch = {name: array[mine].astype(np.int32) for name, array in fields.items()}
        return batch | {"loss_mask": real_BxL[mine].astype(np.float32)}

    @contextlib.contextmanager
    def iterate(self, start: int):
        yield map(self.batch, range(start, 10**6))


class HeldOut(ZipfBatches):
    """Three batches of evenly distributed tokens: most of their rows are not resident."""

    num_bytes = 1000
    left_out = 0.0

    def __init__(self, config: Config, processes: tuple[int, int] = (0, 1)):
        super().__init__(config, processes, seed=1)
        self._probability = np.full(config.model.vocab_size, 1 / config.model.vocab_size)

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        return map(self.batch, range(len(self)))


def zipf_data(config: Config, processes: tuple[int, int] = (0, 1)) -> RunData:
    return RunData(None, ZipfBatches(config, processes), (), HeldOut(config, processes))


def variant(step: TrainStep, **tables) -> TrainStep:
    """The same compiled programs under other keys of `tables` that no program depends on."""
    assert tables.keys() <= {"prefetch", "cache_policy"}
    other = copy.copy(step)
    changed = dataclasses.replace(step.config.tables, **tables)
    other.config = dataclasses.replace(step.config, tables=changed)
    return other


# Metrics that depend on where rows lie, on the time, or on the log of the run so far.
_OF_THE_WAY = re.compile("second|mfu|exchange_bytes|hit_rate|evictions|missing_bytes|spikes")


@dataclasses.dataclass
class Outcome:
    """records: of metrics.jsonl. params, table: at the end, whole."""

    records: list[dict]
    params: Arrays
    table: Arrays

    def total(self, metric: str) -> float:
        """Sum of a metric over the steps that have it."""
        return sum(self.values(metric).values())

    def values(self, metric: str) -> dict[int, float]:
        """A metric by step."""
        return {record["step"]: record[metric] for record in self.records if metric in record}

    def assert_equals(self, other: "Outcome", after: int = 0) -> None:
        """Bit for bit; losses and the like of steps after the one from which this run continued."""
        assert self._computed(after) == other._computed(after)
        for name in ("params", "table"):
            found, expected = getattr(self, name), getattr(other, name)
            assert found.keys() == expected.keys()
            for key, array in expected.items():
                np.testing.assert_array_equal(found[key], array, err_msg=key)

    def _computed(self, after: int) -> dict[tuple[int, str], float]:
        return {
            (record["step"], name): value
            for record in self.records
            for name, value in record.items()
            if record["step"] > after and not _OF_THE_WAY.search(name)
        }


def run(
    step: TrainStep,
    workdir: Path,
    *,
    resume: tuple[Path, int] | None = None,
    checkpoints: Path | None = None,
    processes: tuple[int, int] = (0, 1),
    watch: Callable[[TrainState, Prefetch | None], None] = lambda state, prefetch: None,
) -> Outcome:
    """Trains to `train.steps` as `stem_jax.run` does, without files of text.

    Args:
        resume: work folder and step of a checkpoint to begin with.
        checkpoints: work folder to save to; None saves nothing.
        watch: called before a checkpoint is saved.
    """
    config, mesh = step.config, step.mesh
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        saving = checkpoints and stack.enter_context(Checkpointer(checkpoints))
        state, stores = _open(step, resume)
        store, prefetch, moving = stores.get("stem"), None, {}
        if store is not None:
            prefetch = Prefetch(mesh, store, config.tables.cache_policy, config.tables.prefetch)
            moving["stem"] = stack.enter_context(prefetch)
            state = dataclasses.replace(state, tables={"stem": TableState(**prefetch.load())})

        def save(state: TrainState, *_) -> None:
            if prefetch is not None:
                prefetch.write_back(vars(state.tables["stem"]))
            watch(state, prefetch)
            if saving:
                saving.save(state, _info(config, state), None, stores)

        data = zipf_data(config, processes)
        loop = Loop(config, step, data, workdir, moving, save, None, lambda: False)
        state, _, _ = loop.run(state)
        if saving:
            saving.wait()
    # Only process 0 writes metrics.
    lines = (workdir / "metrics.jsonl").read_text().splitlines() if processes[0] == 0 else []
    return Outcome(
        records=[json.loads(line) for line in lines],
        params={name: _local(array) for name, array in state.params.items()},
        table=store_arrays(store) if store else _whole(state.tables["stem"]),
    )


def _whole(table: TableState) -> Arrays:
    # With several processes none has the whole.
    return logical_table(table) if jax.process_count() == 1 else {}


def _open(step: TrainStep, resume) -> tuple[TrainState, dict[str, HostStore]]:
    config, spec, mesh = step.config, step.reads.specs["stem"], step.mesh
    if resume is None:
        made = HostStore.create(spec, table_key(config), mesh) if spec.offloaded else None
        return init_state(step.blueprint), {"stem": made} if made else {}
    stores = {"stem": HostStore.allocate(spec, mesh)} if spec.offloaded else {}
    folder, number = resume
    with Checkpointer(folder, read_only=True) as saved:
        return saved.restore(number, abstract_state(step.blueprint), stores), stores


def rows_of_a_batch(step: TrainStep) -> int:
    """The rows that one batch needs of STEM's table."""
    memory, spec = step.reads.memories["stem"], step.reads.specs["stem"]
    owners = axis_size(step.mesh, spec.vocab_axes)
    return working_set(step.config, memory, spec, owners, zipf_data(step.config), 0).batch


def _info(config: Config, state: TrainState) -> CheckpointInfo:
    counters = {name: int(getattr(state, name)) for name in ("step", "updates", "bad_steps")}
    counters["touched_rows"] = {name: int(n) for name, n in state.touched_rows.items()}
    return CheckpointInfo(**counters, tokenizer="none", data={}, config=config)


def _local(array: jax.Array) -> np.ndarray:
    """An array, or the first shard of it where another process has others."""
    whole = array if array.is_fully_addressable else array.addressable_data(0)
    return np.asarray(whole)


def store_arrays(store: HostStore) -> Arrays:
    """The whole table, zero where another process has it."""
    spec = store.spec
    whole = {name: np.zeros(spec.shape(name), spec.field(name).dtype) for name in store.fields}
    for block in store.blocks:
        rows = slice(block.row_range.start, block.row_range.stop)
        columns = slice(block.column_range.start, block.column_range.stop)
        numbers = np.arange(len(block.row_range))
        found = {
            n: np.empty((len(numbers), *a.shape[1:]), a.dtype) for n, a in block.arrays.items()
        }
        store.gather(block, numbers, found)
        for name, array in found.items():
            whole[name][(rows, slice(None), columns)[: array.ndim]] = array
    return whole


# Those that ran before a test began: what a run of another file has not ended yet.
THREADS_OF_OTHERS: set[threading.Thread] = set()


def row_threads() -> list[str]:
    """Names of the threads that a prefetch has."""
    new = set(threading.enumerate()) - THREADS_OF_OTHERS
    return [thread.name for thread in new if thread.name.startswith("rows-")]
