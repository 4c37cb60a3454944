"""Memory in front of the disk against a dictionary: the last write is seen, wherever it lies."""

import itertools
import shutil
import tempfile
import threading
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import stateful

from stem_jax.errors import InputError
from stem_jax.tables.row_file import RowFile
from stem_jax.tables.row_tiers import RowTiers
from tests.children import child
from tests.disk_rows import MANY, RECORD, assert_versions, make_small, values_of

FACTS = {"multiplier": 7}
UNIVERSE = [0, 1, 2, *range(10**6, MANY - 1, 2**26), MANY - 1]


def make(rows):
    """What rows are before they are written: version 0."""
    return values_of(rows, 0)


class RowTiersMachine(stateful.RuleBasedStateMachine):
    """Room for a few rows, gathers with repeated rows, more rows in a call than there is room."""

    @stateful.initialize(host_rows=st.integers(1, 12))
    def create(self, host_rows):
        self.patches = pytest.MonkeyPatch()
        make_small(self.patches)
        self.folder = Path(tempfile.mkdtemp())
        self.host_rows = host_rows
        self.names = map(str, itertools.count())
        self.version = 0
        self.live, self.saved = {}, {}
        file = RowFile.create(self.folder, RECORD, MANY, FACTS, most_saves=2)
        self.tiers = RowTiers(file, host_rows)

    @stateful.rule(at=st.sets(st.integers(0, len(UNIVERSE) - 1)))
    def write(self, at):
        rows = [UNIVERSE[i] for i in at]
        self.version += 1
        self.tiers.write(np.array(rows, np.int64), values_of(rows, self.version))
        self.live |= dict.fromkeys(rows, self.version)

    @stateful.rule(at=st.lists(st.integers(0, len(UNIVERSE) - 1)))
    def gather(self, at):
        rows = np.array([UNIVERSE[i] for i in at], np.int64)
        out = RECORD.empty(len(rows) + 1)
        self.tiers.gather(rows, out, make)
        assert_versions(out, rows, [self.live.get(row, 0) for row in rows.tolist()])

    @stateful.rule()
    def save(self):
        name = next(self.names)
        self.tiers.save(name)
        self.saved[name] = dict(self.live)

    @stateful.precondition(lambda self: self.saved)
    @stateful.rule(data=st.data())
    def go_back(self, data):
        name = data.draw(st.sampled_from(sorted(self.saved)))
        self.tiers.file.close()
        file = RowFile.open(self.folder, RECORD, MANY, FACTS, name, most_saves=2)
        self.tiers = RowTiers(file, self.host_rows)
        self.live = dict(self.saved[name])

    @stateful.invariant()
    def known_rows_are_those_that_were_written(self):
        known = self.tiers.known(np.array(UNIVERSE))
        assert known.tolist() == [row in self.live for row in UNIVERSE]

    def teardown(self):
        self.gather(list(range(len(UNIVERSE))))
        self.tiers.file.close()
        shutil.rmtree(self.folder)
        self.patches.undo()


RowTiersMachine.TestCase.settings = hypothesis.settings(
    max_examples=25, stateful_step_count=25, deadline=None
)
test_against_a_dictionary = RowTiersMachine.TestCase


@pytest.fixture
def tiers(tmp_path, monkeypatch):
    make_small(monkeypatch)
    file = RowFile.create(tmp_path / "rows", RECORD, 1000, FACTS)
    yield RowTiers(file, 100)
    file.close()


def gathered(tiers, rows):
    out = RECORD.empty(len(rows))
    tiers.gather(rows, out, make)
    return out


def test_where_rows_come_from(tiers):
    rows = np.arange(80)
    tiers.write(rows, values_of(rows, 1))
    gathered(tiers, np.arange(70, 90))
    counts = tiers.counts
    assert (counts.from_memory, counts.from_disk, counts.made, counts.evicted) == (10, 0, 10, 0)
    others = np.arange(200, 240)
    tiers.write(others, values_of(others, 2))
    assert counts.evicted == 20 and tiers.file.counts.rows_written == 20
    gathered(tiers, rows)
    assert (counts.from_memory, counts.from_disk, counts.made) == (70, 20, 10)


def test_rows_that_are_asked_for_stay(tiers):
    """Of rows in memory, those that were asked for since the hand came by outlive the others."""
    rows = np.arange(100)
    tiers.write(rows, values_of(rows, 1))
    hot = np.arange(0, 100, 2)
    gathered(tiers, hot)
    others = np.arange(500, 550)
    tiers.write(others, values_of(others, 2))
    before = tiers.counts.from_disk
    gathered(tiers, hot)
    assert tiers.counts.from_disk == before
    gathered(tiers, hot + 1)
    assert tiers.counts.from_disk == before + 50


def test_a_hand_that_comes_round_twice_takes_no_row_twice(tiers):
    """Of 100 rows 90 were asked for, and 50 have to go."""
    rows, others = np.arange(100), np.arange(100, 150)
    tiers.write(rows, values_of(rows, 1))
    gathered(tiers, rows[10:])
    tiers.write(others, values_of(others, 2))
    assert tiers.counts.evicted == 50
    every = np.concatenate([rows, others])
    assert_versions(gathered(tiers, every), every, np.where(every < 100, 1, 2))


def test_rows_that_only_came_from_disk_are_not_written_back(tiers):
    rows = np.arange(100)
    tiers.write(rows, values_of(rows, 1))
    tiers.save("a")
    written = tiers.file.counts.rows_written
    assert written == tiers.counts.saved == 100
    others = np.arange(100, 200)
    tiers.write(others, values_of(others, 1))
    gathered(tiers, rows)
    assert tiers.file.counts.rows_written == written + tiers.counts.evicted
    tiers.save("b")
    assert tiers.file.counts.rows_written == written + 100


def test_gathers_beside_writes_and_saves(tiers):
    """A row is never older than what was written before the gather began, nor torn."""
    rows = np.arange(300)
    tiers.write(rows, values_of(rows, 1))
    versions = np.ones(300, np.int64)
    failed, done = [], threading.Event()

    def gather(seed):
        rng = np.random.default_rng(seed)
        while not done.is_set():
            asked = rng.permutation(300)[:60]
            least = versions[asked]
            try:
                out = gathered(tiers, asked)
                assert_versions(out, asked, out["last_step"])
                assert (out["last_step"] >= least).all()
            except BaseException as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=gather, args=[seed]) for seed in range(3)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(9)
    for version in range(2, 250):
        some = rng.permutation(300)[:50]
        tiers.write(some, values_of(some, version))
        versions[some] = version
        if version % 25 == 0:
            tiers.save(str(version))
            tiers.file.kept([str(version)])
    done.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert_versions(gathered(tiers, rows), rows, versions)


def test_a_read_that_a_write_overtook_is_not_kept(tiers, monkeypatch):
    """It was read from disk, then written and evicted, before it came into memory."""
    rows = np.arange(100)
    tiers.write(rows, values_of(rows, 1))
    others = np.arange(100, 200)
    tiers.write(others, values_of(others, 1))
    read = tiers.file.read

    def overtaken(asked, out):
        read(asked, out)
        monkeypatch.setattr(tiers.file, "read", read)
        tiers.write(asked, values_of(asked, 2))
        for first in (300, 400):
            more = np.arange(first, first + 100)
            tiers.write(more, values_of(more, 1))
        assert not (tiers._places.find(asked) >= 0).any()

    monkeypatch.setattr(tiers.file, "read", overtaken)
    some = np.arange(5)
    gathered(tiers, some)
    assert_versions(gathered(tiers, some), some, 2)


def test_writes_go_on_while_the_disk_writes_a_save(tiers):
    rows = np.arange(50)
    tiers.write(rows, values_of(rows, 1))
    seen = []

    def captured():
        tiers.write(rows, values_of(rows, 2))
        seen.append(gathered(tiers, rows))

    tiers.save("a", captured)
    assert_versions(seen[0], rows, 2)
    folder = tiers.file._folder
    tiers.file.close()
    file = RowFile.open(folder, RECORD, 1000, FACTS, "a")
    out = RECORD.empty(50)
    file.read(rows, out)
    assert_versions(out, rows, 1)
    tiers.file = file


def test_a_full_disk_loses_no_row(tmp_path, monkeypatch):
    make_small(monkeypatch)
    file = RowFile.create(tmp_path, RECORD, 2000, FACTS, most_bytes=9000)
    tiers = RowTiers(file, 50)
    rows = np.arange(90)
    tiers.write(rows, values_of(rows, 1))
    tiers.save("a")
    others = np.arange(1000, 1200)
    with pytest.raises(InputError, match=r"cannot take .* bytes are allowed"):
        tiers.write(others, values_of(others, 1))
    assert tiers.known(rows).all()
    in_memory = others[tiers._places.find(others) >= 0]
    assert_versions(gathered(tiers, in_memory), in_memory, 1)
    on_disk = np.concatenate([rows, others])
    on_disk = on_disk[file.known(on_disk)]
    out = RECORD.empty(len(on_disk))
    file.read(on_disk, out)
    assert_versions(out, on_disk, 1)
    assert len(in_memory) == 50 and len(on_disk) > 90
    file.close()
    file = RowFile.open(tmp_path, RECORD, 2000, FACTS, "a")
    out = RECORD.empty(90)
    file.read(rows, out)
    assert_versions(out, rows, 1)
    file.close()


def test_memory_is_told_beforehand(tmp_path):
    file = RowFile.create(tmp_path, RECORD, MANY, FACTS)
    tiers = RowTiers(file, 10**5)
    arrays = [*tiers._arrays.values(), tiers._row_at, tiers._flags]
    held = sum(array.nbytes for array in arrays) + 8 * tiers._places.size
    assert held == pytest.approx(RowTiers.needed_bytes(RECORD, 10**5), rel=1e-3)
    file.close()


_MEMORY = """
import sys
from pathlib import Path
import numpy as np
from stem_jax.tables.row_file import RowFile
from stem_jax.tables.row_record import RecordField, RowRecord
from stem_jax.tables.row_tiers import RowTiers
record = RowRecord((RecordField("rows", "bfloat16", (1, 128)), RecordField("v", "float32", (1,))))
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
before = anonymous()
tiers = RowTiers(RowFile.create(Path(sys.argv[1]), record, 2**31 - 1, {}), 10**6)
rng, out = np.random.default_rng(0), record.empty(16384)
for step in range(150):
    rows = rng.choice(3 * 10**6, 16384, replace=False) * 700
    tiers.gather(rows, out, lambda rows: {n: a + 1 for n, a in record.empty(len(rows)).items()})
    tiers.write(rows, out)
tiers.save("a")
assert tiers.counts.evicted > 10**5
print((anonymous() - before) / (10**6 * record.row_bytes))
"""


@pytest.mark.long
def test_memory_is_that_of_the_rows(tmp_path):
    """A million rows of 260 bytes, full: a tenth more for their books, and 32 MiB for buffers."""
    with child("-c", _MEMORY, str(tmp_path)) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    part = float(out.split()[-1])
    assert 1.0 < part < 1.1 + 32 * 2**20 / (260 * 10**6), out
