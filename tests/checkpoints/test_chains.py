"""Saves of the rows that changed: what comes back is what a save of all rows would have had."""

import dataclasses
import os
import shutil
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

from stem_jax.bucket import walk
from stem_jax.checkpoints.chain import saved_bases
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.file_list import LIST
from stem_jax.checkpoints.files import damage, set_aside_damaged
from stem_jax.checkpoints.saved_model import SavedModel
from stem_jax.checkpoints.tables import stores_for
from stem_jax.config import Config
from stem_jax.memory.catalogue import table_specs
from stem_jax.mesh import make_mesh, replicated
from stem_jax.tables import store_snapshot
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.spec import TableSpec
from stem_jax.training.state import TrainState, abstract_state, init_state, table_key
from tests.logical import logical_table
from tests.offloading import FIELDS

MESHES = [(1, 1, 1), (2, 2, 2), (1, 2, 1)]
ROWS = 96


@pytest.fixture(scope="module")
def configs(tiny_config) -> list[Config]:
    """Of a table in host memory, on these meshes."""
    axes = ("mesh.data", "mesh.fsdp", "mesh.tensor")
    offload = {"tables.resident_rows": 32}
    return [tiny_config(**dict(zip(axes, shape, strict=True)), **offload) for shape in MESHES]


def mesh_of(config: Config):
    sizes = config.mesh
    return make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])


def state_of(mesh, number: int) -> TrainState:
    """A state with next to nothing beside the table."""
    value = jax.make_array_from_callback((), replicated(mesh), lambda _: np.int32(number))
    return TrainState(value, value, value, {"stem": value}, {"w": value}, (value,), {})


class Run:
    """A run that is its table in host memory.

    seen: the table by the step of its save, as `arrays` has it.
    """

    def __init__(self, workdir: Path, config: Config, **options):
        self.config, self.mesh = config, mesh_of(config)
        self.workdir, self.options = workdir, options
        self.spec = table_specs(config)["stem"]
        self.store = HostStore.create(self.spec, table_key(config), self.mesh)
        self.checkpoints = Checkpointer(workdir, **options)
        self.seen: dict[int, dict[str, np.ndarray]] = {}
        self.step = 0

    def touch(self, rows) -> None:
        """An update of these rows of the whole table."""
        self.step += 1
        rows = np.array(sorted(set(rows)), np.int64)
        rng = np.random.default_rng(self.step)
        new = {n: rng.random(self.spec.shape(n, len(rows))).astype(t) for n, t in FIELDS.items()}
        new["last_step"][:] = self.step
        for block in self.store.blocks:
            first = block.row_range.start
            mine = (rows >= first) & (rows < block.row_range.stop)
            columns = slice(block.column_range.start, block.column_range.stop)
            part = {n: a[mine] if a.ndim < 3 else a[mine][..., columns] for n, a in new.items()}
            self.store.write(block, rows[mine] - first, part)

    def save(self, loss: float | None = None) -> None:
        info = CheckpointInfo(self.step, self.step, 0, {"stem": ROWS}, "none", {}, self.config)
        self.checkpoints.save(state_of(self.mesh, self.step), info, loss, {"stem": self.store})
        self.seen[self.step] = arrays(self.store)

    def start_again(self, config: Config | None = None) -> None:
        """From the newest checkpoint, perhaps on another mesh."""
        self.checkpoints.close()
        self.config = config or self.config
        self.mesh, self.spec = mesh_of(self.config), table_specs(self.config)["stem"]
        self.checkpoints = Checkpointer(self.workdir, **self.options)
        self.step = self.checkpoints.latest_step() or 0
        self.store = restored(self.checkpoints, self.config, self.step)


def restored(checkpoints: Checkpointer, config: Config, step: int) -> HostStore:
    mesh = mesh_of(config)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(mesh, 0)
    )
    stores = stores_for(checkpoints.info(step), table_specs(config), mesh)
    assert int(checkpoints.restore(step, target, stores).params["w"]) == step
    return stores["stem"]


def arrays(store: HostStore) -> dict[str, np.ndarray]:
    """The whole table."""
    spec = store.spec
    whole = {name: np.zeros(spec.shape(name), dtype) for name, dtype in FIELDS.items()}
    for block in store.blocks:
        count = len(block.row_range)
        out = {n: np.zeros((count, *a.shape[1:]), a.dtype) for n, a in block.arrays.items()}
        store.gather(block, np.arange(count), out)
        rows, columns = (slice(r.start, r.stop) for r in (block.row_range, block.column_range))
        for name, array in out.items():
            whole[name][(rows, slice(None), columns)[: array.ndim]] = array
    return whole


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def table_bytes(checkpoint: Path) -> int:
    items = [checkpoint / "table_rows", checkpoint / "table_slots"]
    return sum(path.stat().st_size for item in items for path in walk(item))


@pytest.fixture
def small_pieces(monkeypatch):
    """A shard has several chunks, and a snapshot several pieces."""
    monkeypatch.setattr(store_snapshot, "_CHUNK_BYTES", 2 * 2 * 48 * 4)
    monkeypatch.setattr(store_snapshot, "_PIECE_BYTES", 4 * 2 * 48 * 4)


@pytest.mark.parametrize("hashed", [False, True])
def test_changes_come_back_on_any_mesh(configs, tmp_path, small_pieces, monkeypatch, hashed):
    monkeypatch.setattr(TableSpec, "made_when_asked", hashed)
    run = Run(tmp_path, configs[1], keep=9, full_every=3)
    rng = np.random.default_rng(0)
    for count in (60, 5, 0, 17, 2, 96):
        run.touch(rng.permutation(ROWS)[:count])
        run.save()
        # Writes beside the save: it has what was there before.
        run.touch(rng.permutation(ROWS)[:40])
    run.checkpoints.close()
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        bases = {step: checkpoints.info(step).bases for step in checkpoints.steps()}
        assert [base["stem"].step if base else 0 for base in bases.values()] == [0, 1, 3, 0, 7, 9]
        for step in checkpoints.steps():
            for config in configs:
                assert_same(arrays(restored(checkpoints, config, step)), run.seen[step])
    assert all(damage(tmp_path / "checkpoints" / str(s), verify=True) is None for s in bases)


def test_a_start_goes_on_with_the_chain_on_another_mesh(configs, tmp_path):
    run = Run(tmp_path, configs[1], keep=1, full_every=4)
    for config in (configs[0], configs[2], configs[1]):
        run.touch(range(0, ROWS, 7))
        run.save()
        run.start_again(config)
        assert_same(arrays(run.store), run.seen[run.step])
    assert saved_bases(tmp_path / "checkpoints" / "3")["stem"].number == 2
    # Each needs those before.
    assert run.checkpoints.steps() == [1, 2, 3]
    for _ in range(3):
        run.touch([5])
        run.save()
    run.checkpoints.close()
    # The whole one is 5; of the chain before nothing is left.
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [5, 6]


def test_the_best_keeps_what_it_builds_on(configs, tmp_path):
    run = Run(tmp_path, configs[0], keep=1, full_every=3)
    for loss in (3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        run.touch([run.step, run.step + 9])
        run.save(loss)
    run.checkpoints.wait()
    assert run.checkpoints.steps() == [1, 2, 7]
    assert_same(arrays(restored(run.checkpoints, configs[0], 2)), run.seen[2])
    run.checkpoints.close()


def test_two_that_are_kept_are_not_of_one_chain_alone(configs, tmp_path):
    run = Run(tmp_path, configs[0], keep=2, full_every=3)
    for number, left in enumerate(
        ([1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]), 1
    ):
        run.touch([number])
        run.save()
        run.checkpoints.wait()
        assert run.checkpoints.steps() == left
    run.touch([0])
    run.save()
    run.checkpoints.wait()
    assert run.checkpoints.steps() == [4, 5, 6, 7]
    run.checkpoints.close()


@pytest.fixture(scope="module")
def chained(configs, tmp_path_factory):
    """A run with saves 1 (whole), 2, 3, then 4 (whole), 5, 6."""
    run = Run(tmp_path_factory.mktemp("chained"), configs[0], keep=9, full_every=3)
    for number in range(6):
        run.touch(range(number, ROWS, 11))
        run.save()
    run.checkpoints.close()
    return run


def _flip(folder: Path) -> None:
    [path, *_] = sorted(folder.glob("table_slots/ocdbt.process_0/d/*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut(folder: Path) -> None:
    [path, *_] = sorted(folder.glob("table_rows/ocdbt.process_0/d/*"))
    os.truncate(path, path.stat().st_size - 1)


def _replaced(folder: Path) -> None:
    """By another save of the same step."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "1", folder)


@pytest.mark.parametrize("spoil", [_flip, _cut, shutil.rmtree, _replaced])
@pytest.mark.parametrize(("broken", "left"), [(4, 3), (5, 4), (6, 5)])
def test_what_builds_on_a_damaged_save_is_set_aside(chained, tmp_path, spoil, broken, left):
    if spoil is _replaced and broken == 6:
        pytest.skip("nothing builds on it")
    checkpoints = Path(shutil.copytree(chained.workdir / "checkpoints", tmp_path / "checkpoints"))
    spoil(checkpoints / str(broken))
    lines = set_aside_damaged(checkpoints)
    if spoil is _replaced:
        # Itself it is a whole one.
        left = broken
    there = [
        s
        for s in range(6, left, -1)
        if (checkpoints.parent / "damaged_checkpoints" / str(s)).exists()
    ]
    assert len(lines) == len(there)
    for step, line in zip(there, lines, strict=True):
        assert line.startswith(f"checkpoint {step} is damaged (")
        assert step == broken or f"it builds on checkpoint {broken}, where " in line, line
    with Checkpointer(tmp_path, read_only=True) as opened:
        assert opened.latest_step() == left
        if spoil is not _replaced:
            assert_same(arrays(restored(opened, chained.config, left)), chained.seen[left])


def test_damage_that_nothing_reads_leaves_what_builds_on_it(chained, tmp_path):
    checkpoints = Path(shutil.copytree(chained.workdir / "checkpoints", tmp_path / "checkpoints"))
    (checkpoints / "5" / "params" / "_METADATA").write_bytes(b"")
    assert set_aside_damaged(checkpoints) == []
    with Checkpointer(tmp_path, read_only=True) as opened:
        assert_same(arrays(restored(opened, chained.config, 6)), chained.seen[6])


def test_a_reader_of_pieces_sees_the_changes(chained):
    folder = chained.workdir / "checkpoints"
    with Checkpointer(chained.workdir, read_only=True) as checkpoints:
        info = checkpoints.info(6)
        steps = tuple(checkpoints.bases(info))
    assert steps == (4, 5)
    model = SavedModel(folder / "6", info, None, bases={"stem": steps})
    for name in FIELDS:
        for rows in (slice(0, ROWS), slice(13, 40)):
            part = (rows, slice(None), slice(5, 30))[: chained.seen[6][name].ndim]
            np.testing.assert_array_equal(
                model._read_rows("stem", name, part), chained.seen[6][name][part]
            )


def test_a_checkpoint_of_before_is_followed_by_a_whole_one(configs, tmp_path):
    run = Run(tmp_path, configs[0], keep=9, full_every=5)
    run.touch([1])
    run.save()
    run.checkpoints.wait()
    folder = tmp_path / "checkpoints" / "1"
    layout = folder / "layout" / "metadata"
    layout.write_text(layout.read_text().replace('"format": 4', '"format": 3'))
    (folder / LIST).unlink()
    run.start_again()
    for _ in range(2):
        run.touch([2])
        run.save()
    run.checkpoints.close()
    bases = {step: saved_bases(tmp_path / "checkpoints" / str(step)) for step in (1, 2, 3)}
    assert not bases[1] and not bases[2] and bases[3]["stem"].step == 2


@pytest.mark.parametrize("optimizer", ["deferred_adamw", "dense_adamw"])
def test_resident_tables(train_step, tmp_path, optimizer):
    """They are saved as changes, too, unless every update moves all rows."""
    step = train_step((2, 2, 2), **{"tables.optimizer": optimizer})
    state = init_state(step.blueprint)
    with Checkpointer(tmp_path, keep=9, full_every=9) as checkpoints:
        for number in (1, 2):
            table = state.tables["stem"]
            changed = dataclasses.replace(
                table,
                rows=table.rows.at[:, 3 * number].add(1),
                last_step=table.last_step.at[3 * number].set(number),
            )
            state = dataclasses.replace(state, tables={"stem": changed})
            info = CheckpointInfo(number, number, 0, {"stem": 2}, "none", {}, step.config)
            checkpoints.save(state, info, None)
        checkpoints.wait()
        whole = optimizer == "dense_adamw"
        assert bool(saved_bases(tmp_path / "checkpoints" / "2")) != whole
        found = checkpoints.restore(2, abstract_state(step.blueprint)).tables["stem"]
    expected = logical_table(state.tables["stem"])
    for name, array in logical_table(found).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_one_percent_takes_three_percent(tiny_config, tmp_path):
    """Of a table of 40 MB with its moments."""
    size = {"model.vocab_size": 20_000, "tables.resident_rows": 32}
    config = tiny_config(**size, **{"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1})
    run = Run(tmp_path, config, keep=9, full_every=5)
    rng = np.random.default_rng(0)
    run.touch(range(20_000))
    run.save()
    run.touch(rng.permutation(20_000)[:200])
    run.save()
    run.checkpoints.close()
    whole, changes = (table_bytes(tmp_path / "checkpoints" / step) for step in ("1", "2"))
    assert changes <= 0.03 * whole, (changes, whole)


rows_of_an_update = strategies.sets(strategies.integers(0, ROWS - 1), max_size=30)
events = strategies.lists(
    strategies.one_of(
        rows_of_an_update.map(lambda rows: ("touch", rows)),
        strategies.sampled_from([None, 1.0, 2.0]).map(lambda loss: ("save", loss)),
        strategies.integers(0, 2).map(lambda mesh: ("start", mesh)),
    ),
    max_size=14,
)


@hypothesis.given(
    events=events, keep=strategies.integers(1, 3), full_every=strategies.integers(0, 4)
)
@hypothesis.settings(
    max_examples=12, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_run_comes_back(configs, tmp_path_factory, events, keep, full_every):
    """Whatever rows are touched, saves made and starts between them: all that is kept is whole."""
    workdir = tmp_path_factory.mktemp("any")
    run = Run(workdir, configs[0], keep=keep, full_every=full_every)
    for kind, value in [("touch", {0}), ("save", None), *events]:
        if kind == "touch":
            run.touch(value)
        elif kind == "save" and run.step not in run.seen:
            run.save(value)
        elif kind == "start":
            run.start_again(configs[value])
            run.seen = {step: run.seen[step] for step in run.checkpoints.steps()}
            assert_same(arrays(run.store), run.seen[run.step])
    run.checkpoints.wait()
    steps = run.checkpoints.steps()
    assert set(sorted(run.seen)[-keep:]) <= set(steps)
    for step in steps:
        assert damage(workdir / "checkpoints" / str(step), verify=True) is None
        assert_same(arrays(restored(run.checkpoints, configs[0], step)), run.seen[step])
    run.checkpoints.close()
    shutil.rmtree(workdir)
