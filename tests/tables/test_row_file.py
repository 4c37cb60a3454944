"""Rows on disk against a dictionary: whatever happens, and whenever it ends, a save is whole."""

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

from stem_jax.tables.row_file import RowFile
from stem_jax.tables.row_folder import saved_rows
from tests.disk_rows import MANY, RECORD, assert_versions, make_small, values_of

FACTS = {"multiplier": 7}
# Far apart, so that they are hashed, and the first and the last.
UNIVERSE = [0, 1, 2, *range(10**6, MANY - 1, 2**26), MANY - 2, MANY - 1]


class RowFileMachine(stateful.RuleBasedStateMachine):
    """A file of few places, its live rows and its saves."""

    @stateful.initialize(direct=st.booleans())
    def create(self, direct):
        self.patches = pytest.MonkeyPatch()
        make_small(self.patches)
        self.root = Path(tempfile.mkdtemp())
        self.num_rows = len(UNIVERSE) if direct else MANY
        self.rows = list(range(len(UNIVERSE))) if direct else UNIVERSE
        self.names = map(str, itertools.count())
        self.version = 0
        self.live, self.saved = {}, {}
        self.folder = self.root / "rows"
        self.file = RowFile.create(self.folder, RECORD, self.num_rows, FACTS, most_saves=2)

    @stateful.rule(at=st.sets(st.integers(0, len(UNIVERSE) - 1)))
    def write(self, at):
        rows = [self.rows[i] for i in at]
        self.version += 1
        self.file.write(np.array(rows, np.int64), values_of(rows, self.version))
        self.live |= dict.fromkeys(rows, self.version)

    @stateful.rule()
    def save(self):
        name = next(self.names)
        self.file.save(name)
        self.saved[name] = dict(self.live)

    @stateful.rule(data=st.data())
    def keep_some(self, data):
        names = data.draw(st.sets(st.sampled_from(sorted(self.saved)))) if self.saved else set()
        self.file.kept(names)
        self.saved = {name: self.saved[name] for name in names}

    @stateful.precondition(lambda self: self.saved)
    @stateful.rule(data=st.data())
    def go_back(self, data):
        name = data.draw(st.sampled_from(sorted(self.saved)))
        self.file.close()
        self.file = self.opened(self.folder, name)
        self.live = dict(self.saved[name])

    @stateful.precondition(lambda self: self.saved)
    @stateful.rule(data=st.data())
    def crash(self, data):
        """Goes on in a copy of the folder, which nobody has closed."""
        name = data.draw(st.sampled_from(sorted(self.saved)))
        before, self.folder = self.folder, self.root / f"copy-{self.version}-{next(self.names)}"
        shutil.copytree(before, self.folder, ignore=shutil.ignore_patterns(".lock"))
        self.file.close()
        self.file = self.opened(self.folder, name)
        self.live = dict(self.saved[name])

    @stateful.invariant()
    def live_rows_are_known_and_whole(self):
        known = self.file.known(np.array(self.rows))
        assert known.tolist() == [row in self.live for row in self.rows]
        check(self.file, self.live)
        assert self.file.num_rows == len(self.live)

    @stateful.invariant()
    def saves_are_whole(self):
        assert set(self.file.saves) == set(self.saved)
        for name, versions in self.saved.items():
            save = saved_rows(self.folder, RECORD, self.num_rows, FACTS, name)
            assert save.rows.tolist() == sorted(versions)
            check(save, versions)
            save.close()

    @stateful.invariant()
    def places_are_no_more_than_the_rows_need(self):
        needed = len(self.live) + sum(map(len, self.saved.values()))
        assert self.file._maps.capacity - self.file._maps.num_free <= needed

    def teardown(self):
        self.file.close()
        shutil.rmtree(self.root)
        self.patches.undo()

    def opened(self, folder, name):
        return RowFile.open(folder, RECORD, self.num_rows, FACTS, name, most_saves=2)


RowFileMachine.TestCase.settings = hypothesis.settings(
    max_examples=15, stateful_step_count=25, deadline=None
)
test_against_a_dictionary = RowFileMachine.TestCase


def check(file, versions: dict[int, int]) -> None:
    """All rows of a file or a save, in some order."""
    rows = np.random.default_rng(0).permutation(np.array(list(versions), np.int64))
    out = RECORD.empty(len(rows) + 1)
    file.read(rows, out)
    assert_versions(out, rows, [versions[row] for row in rows.tolist()])


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)


def test_disk_is_bounded_over_a_long_run(tmp_path, small):
    """First few rows at a time, then all of them between two saves; two saves are kept."""
    rng = np.random.default_rng(0)
    file = RowFile.create(tmp_path, RECORD, 3000, FACTS, most_saves=2)
    names, touched, most = [], set(), 0
    versions, saved = np.full(3000, -1), {}
    for step in range(400):
        count = 30 if step < 200 else 1500
        rows = rng.permutation(3000)[:count]
        file.write(rows, values_of(rows, step))
        touched |= set(rows.tolist())
        versions[rows] = step
        if step % 5 == 4:
            saved[str(step)] = versions.copy()
            for name in names:
                there = np.flatnonzero(saved[name] >= 0)
                save = saved_rows(tmp_path, RECORD, 3000, FACTS, name)
                check(save, dict(zip(there.tolist(), saved[name][there].tolist(), strict=True)))
                save.close()
            file.save(str(step))
            names = [*names, str(step)][-2:]
            file.kept(names)
        data = sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
        # A batch goes to new places before its old ones are free, and files grow by a step.
        assert data <= (3 * len(touched) + count + 16) * RECORD.size
        most = max(most, data)
    assert most > 2 * len(touched) * RECORD.size
    file.close()


def test_files_grow_until_half_of_them_is_free(tmp_path, small):
    """Then what changes goes to free places between the others, however many saves there may be."""
    rng = np.random.default_rng(0)
    file = RowFile.create(tmp_path, RECORD, 1000, FACTS, most_saves=10)
    rows = np.arange(1000)
    file.write(rows, values_of(rows, 0))
    for version in range(1, 100):
        some = rng.permutation(rows)[:50]
        file.write(some, values_of(some, version))
        file.save(str(version))
        file.kept([str(version)])
    capacity = (file.num_bytes - file._other_bytes()) // RECORD.size
    assert 1900 < capacity < 2200
    file.close()


def test_files_that_nobody_needs_go(tmp_path, small):
    """All rows go behind the end of the files, and then to their beginning again."""
    file = RowFile.create(tmp_path, RECORD, 1000, FACTS)
    rows, found = np.arange(300), []
    for version in range(10):
        file.write(rows, values_of(rows, version))
        file.save(str(version))
        file.kept([str(version)])
        check(file, dict.fromkeys(rows.tolist(), version))
        found.append(len(list((tmp_path / "data").iterdir())))
        assert file._maps.capacity == file._files.capacity
    # 32 records in a file.
    assert found == [10, 19] * 5
    file.close()


def test_new_rows_in_the_place_of_others(tmp_path, small):
    file = RowFile.create(tmp_path, RECORD, MANY, FACTS)
    rows = np.arange(300)
    file.write(rows, values_of(rows, 1))
    file.save("all")
    before = file.num_bytes
    file.close()
    file = RowFile.create(tmp_path, RECORD, MANY, FACTS, replace=True)
    file.write(rows[:10], values_of(rows[:10], 3))
    assert file.num_bytes < before / 4 and file.saves == ()
    check(file, dict.fromkeys(range(10), 3))
    file.close()


def test_readers_beside_a_writer_see_whole_rows(tmp_path, small):
    """A place that a row left is not written to while a reader that looked it up has not read."""
    file = RowFile.create(tmp_path, RECORD, 500, FACTS)
    rows = np.arange(500)
    file.write(rows, values_of(rows, 0))
    failed, done = [], threading.Event()

    def read():
        rng = np.random.default_rng(threading.get_ident())
        out = RECORD.empty(100)
        while not done.is_set():
            asked = rng.permutation(500)[:100]
            try:
                file.read(asked, out)
                assert_versions(out, asked, out["last_step"])
            except BaseException as error:
                failed.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    rng = np.random.default_rng(0)
    for version in range(1, 300):
        some = rng.permutation(500)[:100]
        file.write(some, values_of(some, version))
        if version % 20 == 0:
            file.save(str(version))
            file.kept([str(version)])
    done.set()
    for thread in readers:
        thread.join()
    assert failed == []
    file.close()


def test_counts(tmp_path):
    file = RowFile.create(tmp_path, RECORD, MANY, FACTS)
    rows = np.array([5, 10**9])
    file.write(rows, values_of(rows, 1))
    file.read(rows[:1], RECORD.empty(1))
    counts = file.counts
    assert (counts.rows_written, counts.bytes_written) == (2, 2 * RECORD.size)
    assert (counts.rows_read, counts.bytes_read) == (1, RECORD.size)
    assert counts.seconds_read > 0 and counts.seconds_written > 0
    with pytest.raises(KeyError, match="row 6 is not on disk"):
        file.read(np.array([6]), RECORD.empty(1))
    file.save("a")
    with pytest.raises(ValueError, match="there is a save a"):
        file.save("a")
    with pytest.raises(ValueError, match="no name of a save"):
        file.save("../a")
    file.close()
