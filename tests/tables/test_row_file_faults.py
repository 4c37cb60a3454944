"""What a folder of rows is refused for, and what is left after a kill, a torn file, a full disk."""

import contextlib
import errno
import resource
import shutil
import signal
import subprocess

import numpy as np
import pytest

from stem_jax.errors import InputError
from stem_jax.lock import Lock
from stem_jax.tables import disk_index, disk_space
from stem_jax.tables.row_file import RowFile
from stem_jax.tables.row_folder import saved_rows
from stem_jax.tables.row_record import RecordField, RowRecord
from tests.children import child
from tests.disk_rows import RECORD, assert_versions, make_small, values_of

FACTS = {"multiplier": 7}
ROWS = np.arange(100)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    """Version 1 of all rows as the save `a`, version 2 of some as `b`; closed."""
    file = RowFile.create(tmp_path / "rows", RECORD, 100, FACTS, most_saves=2)
    file.write(ROWS, values_of(ROWS, 1))
    file.save("a")
    file.write(ROWS[:20], values_of(ROWS[:20], 2))
    file.save("b")
    file.close()
    return tmp_path / "rows"


def opened(folder, save="a", record=RECORD, facts=FACTS, **settings):
    return RowFile.open(folder, record, 100, facts, save, **settings)


@contextlib.contextmanager
def opened_again(folder, **settings):
    """A file that is closed at the end."""
    file = opened(folder, **settings)
    try:
        yield file
    finally:
        file.close()


def assert_all(file, version):
    out = RECORD.empty(len(ROWS))
    file.read(ROWS, out)
    assert_versions(out, ROWS, version)


def test_a_torn_record_is_never_read(folder):
    path = folder / "data" / "00000.rows"
    content = bytearray(path.read_bytes())
    content[5 * RECORD.size + 3] ^= 1
    path.write_bytes(content)
    with opened_again(folder) as file:
        for source in (file, saved_rows(folder, RECORD, 100, FACTS, "a")):
            with pytest.raises(
                InputError, match=r"00000\.rows: the record of row 5 at place 5 is torn.* give anot"
            ):
                source.read(ROWS, RECORD.empty(100))
            out = RECORD.empty(95)
            source.read(ROWS[6:], out)
            assert_versions(out, ROWS[6:], 1)


def test_a_record_of_another_row_is_not_read(folder):
    """Two whole records have changed places."""
    path = folder / "data" / "00000.rows"
    size = RECORD.size
    content = path.read_bytes()
    path.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    with opened_again(folder) as file, pytest.raises(InputError, match=r"2 of 100 read"):
        file.read(ROWS, RECORD.empty(100))


@pytest.mark.parametrize("name", ["rows.npy", "places.npy", "needed.npy"])
@pytest.mark.parametrize("fault", ["flip", "cut", "gone"])
def test_a_torn_index_is_refused(folder, name, fault):
    path = folder / "saves" / "a" / name
    content = bytearray(path.read_bytes())
    if fault == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif fault == "cut":
        path.write_bytes(content[:-4])
    else:
        path.unlink()
    reason = {"flip": "has the checksum", "cut": "bytes, expected", "gone": "is missing"}[fault]
    with pytest.raises(InputError, match=rf"a/{name}, of a save of rows, .*{reason}.*; give ano"):
        opened(folder)
    if fault != "flip" or name == "needed.npy":
        # What this save needs is not known, and must not be written to.
        with pytest.raises(InputError, match=f"a/{name}, of a save"):
            opened(folder, "b")
    if fault == "flip":
        # Who reads a save makes no pass over it.
        save = saved_rows(folder, RECORD, 100, FACTS, "a")
        with pytest.raises(InputError, match="has the checksum"):
            save.verify()
    # The other save can be gone back to, without this one.
    with opened_again(folder, save="b", keep=["b"]) as file:
        assert_all(file, np.where(ROWS < 20, 2, 1))
        assert file.saves == ("b",)


def test_a_save_without_its_last_file_is_none(folder):
    (folder / "saves" / "b.json").unlink()
    with pytest.raises(InputError, match=r"has no save b \(it has a\); give another checkpoint"):
        opened(folder, "b")
    with opened_again(folder) as file:
        assert file.saves == ("a",)
        assert not (folder / "saves" / "b").exists()
        assert_all(file, 1)


def test_missing_data_is_refused(folder):
    last = max((folder / "data").iterdir())
    last.unlink()
    with pytest.raises(InputError, match=r"data files of .* are missing or too short .* save a"):
        opened(folder, "b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"facts": {"multiplier": 8}}, "multiplier is 7 there, 8 here"),
        ({"facts": {}}, "multiplier is 7 there, null here"),
        ({"record": RowRecord((RecordField("rows", "float32", (2, 3)),))}, r"fields is \[\["),
    ],
)
def test_rows_of_another_layout_are_refused(folder, changes, said):
    with pytest.raises(InputError, match=f"rows of another layout: {said}.*; give another folder"):
        opened(folder, **changes)
    # It is not held afterwards.
    opened(folder).close()


def test_another_number_of_rows_is_refused(folder):
    with pytest.raises(InputError, match="num_rows is 100 there, 101 here"):
        saved_rows(folder, RECORD, 101, FACTS, "a")


def test_folders_that_have_rows_or_none(folder, tmp_path):
    with pytest.raises(InputError, match=r"has rows of another run \(saves a, b\); give another"):
        RowFile.create(folder, RECORD, 100, FACTS)
    with pytest.raises(InputError, match=r"has no rows \(no facts.json\); give the folder"):
        opened(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be written \(.*\); choose another folder"):
        RowFile.create(tmp_path / "file", RECORD, 100, FACTS)
    file = RowFile.create(folder, RECORD, 100, FACTS, replace=True)
    assert not file.known(ROWS).any() and file.saves == ()
    file.close()


def test_a_folder_that_another_run_uses_is_refused(folder):
    code = (
        "import sys, time; from pathlib import Path; from stem_jax.lock import Lock\n"
        "lock = Lock.take(Path(sys.argv[1]) / '.lock'); print('held', flush=True); time.sleep(600)"
    )
    with child("-c", code, str(folder)) as process:
        assert process.stdout.readline() == "held\n"
        said = rf"is in use by process {process.pid} on host .*; wait until"
        with pytest.raises(InputError, match=said):
            opened(folder)
        with pytest.raises(InputError, match=said):
            RowFile.create(folder, RECORD, 100, FACTS, replace=True)
        # Who only reads asks nobody.
        assert_all(saved_rows(folder, RECORD, 100, FACTS, "a"), 1)
    opened(folder).close()
    assert Lock.take(folder / ".lock") is not None


# Writes and saves until it is killed; says which saves are complete.
_WRITER = """
import itertools, sys
from pathlib import Path
import numpy as np
import pytest
from stem_jax.tables.row_file import RowFile
from tests.disk_rows import MANY, RECORD, make_small, values_of
make_small(pytest.MonkeyPatch())
file = RowFile.create(Path(sys.argv[1]), RECORD, MANY, {}, most_saves=2)
rows = np.arange(2000) * 10**6
rng = np.random.default_rng(0)
for version in itertools.count(1):
    # Rows of a version are those of its seed: whoever reads them can tell.
    some = np.random.default_rng(version).permutation(rows)[:300]
    file.write(some, values_of(some, version))
    if version % 5 == 0:
        file.save(str(version))
        print(version, flush=True)
        file.kept([str(v) for v in (version - 5, version) if v])
"""


def _killed_and_reopened(folder, saves: int, pause: float) -> None:
    with child("-c", _WRITER, str(folder), stderr=subprocess.PIPE) as process:
        for _ in range(saves):
            last = int(process.stdout.readline())
        # At some moment of what follows.
        try:
            process.wait(pause)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
    last = int(said[-1]) if said else last
    expected = {}
    for version in range(1, last + 1):
        some = np.random.default_rng(version).permutation(np.arange(2000) * 10**6)[:300]
        expected |= dict.fromkeys(some.tolist(), version)
    file = RowFile.open(folder, RECORD, 2**31 - 1, {}, str(last), most_saves=2)
    rows = np.array(sorted(expected))
    assert file.num_rows == len(rows)
    out = RECORD.empty(len(rows))
    file.read(rows, out)
    assert_versions(out, rows, [expected[row] for row in rows.tolist()])
    file.close()


def test_after_sigkill_the_last_save_is_whole(tmp_path):
    _killed_and_reopened(tmp_path, 6, 0.05)


@pytest.mark.long
def test_after_sigkill_at_many_moments(tmp_path):
    for round_ in range(20):
        _killed_and_reopened(tmp_path / str(round_), 3 + round_, 0.013 * round_)


def test_a_full_disk_is_said_and_what_was_saved_stays(folder):
    """The system refuses to let a file grow, as a full disk does."""
    file = opened(folder, "b", most_saves=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * RECORD.size, before[1]))
    try:
        with pytest.raises(
            InputError, match=r"rows cannot take .* MiB more \(File too large\): .*fewer checkpoi"
        ):
            for version in range(3, 9):
                file.write(ROWS, values_of(ROWS, version))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.close()
    with opened_again(folder, save="b") as file:
        assert_all(file, np.where(ROWS < 20, 2, 1))
    with opened_again(folder, save="a") as file:
        assert_all(file, 1)


def test_the_last_of_a_disk_is_used(folder):
    """A step of the file's growth finds no room, what has to be written does."""
    file = opened(folder, "b", most_saves=2)
    room = file._maps.num_free
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    last = max((folder / "data").iterdir()).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (last + RECORD.size, before[1]))
    try:
        some = ROWS[: room + 1]
        file.write(some, values_of(some, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file._maps.num_free == 0
    assert_all(file, np.select([np.isin(ROWS, some), ROWS < 20], [3, 2], 1))
    file.close()


def test_places_of_a_failed_write_are_free(folder, monkeypatch):
    file = opened(folder, "b", most_saves=2)
    file.write(ROWS, values_of(ROWS, 3))
    needed = file._maps.capacity - file._maps.num_free

    def fail(places, records):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file._files, "write", fail)
        with pytest.raises(InputError, match="No space left on device"):
            file.write(ROWS[:10], values_of(ROWS[:10], 4))
    assert file._maps.capacity - file._maps.num_free == needed
    assert_all(file, 3)
    file.close()


def test_a_full_disk_ends_a_save_and_nothing_else(folder):
    file = opened(folder, "b", most_saves=2)
    file.write(ROWS[50:], values_of(ROWS[50:], 3))
    free = file._maps.num_free
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot take .*File too large.*saved stays usable"):
            file.save("c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(file.saves) == ["a", "b"] and file._maps.num_free == free
    assert sorted(path.name for path in (folder / "saves").iterdir()) == [
        *("a", "a.json", "b", "b.json")
    ]
    file.save("c")
    file.close()
    with opened_again(folder, save="c") as file:
        assert_all(file, np.select([ROWS < 20, ROWS < 50], [2, 1], 3))


def test_a_bound_on_the_disk(tmp_path):
    file = RowFile.create(tmp_path, RECORD, 100, FACTS, most_bytes=400 + 40 * RECORD.size)
    with pytest.raises(InputError, match=r"\(1520 bytes are allowed\): it has 0.00 GiB, .* free"):
        file.write(ROWS, values_of(ROWS, 1))
    file.write(ROWS[:30], values_of(ROWS[:30], 1))
    assert file.num_bytes <= 1520
    file.close()


def test_the_disk_is_asked_beforehand(tmp_path, monkeypatch):
    needed = disk_space.needed_bytes(268, 10**8, 1)
    assert needed == 2 * 10**8 * 276
    usage = shutil.disk_usage(tmp_path)._replace(free=50 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        InputError, match=r"tables.disk=.*new: rows on disk may come to 52.41 GiB, 0.00 GiB are th"
    ):
        disk_space.check_disk(tmp_path / "new", needed)
    disk_space.check_disk(tmp_path / "new", needed, taken=3 * 2**30)


_MEMORY = """
import sys
from pathlib import Path
import numpy as np
from stem_jax.tables.row_file import RowFile
from tests.disk_rows import RECORD, values_of
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
num_rows = int(sys.argv[2])
out = RECORD.empty(10**4)
file = RowFile.create(Path(sys.argv[1]), RECORD, num_rows, {})
def work(first):
    rows = (first + np.arange(10**4)) * (num_rows // (13 * 10**5))
    file.write(rows, values_of(rows, 1))
    file.read(rows, out)
# Buffers are as large as they get.
for first in range(0, 3 * 10**5, 10**4):
    work(first)
file.save("0")
before = anonymous()
for first in range(3 * 10**5, 13 * 10**5, 10**4):
    work(first)
file.save("1")
print(anonymous() - before)
"""


@pytest.mark.long
@pytest.mark.parametrize("num_rows", [13 * 10**5, 2**31 - 1])
def test_memory_does_not_grow_with_the_rows(tmp_path, num_rows):
    """A million rows more, whose index takes 4 MB or more, and 28 MB with them."""
    with child("-c", _MEMORY, str(tmp_path), str(num_rows)) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    grown = int(out.split()[-1])
    assert grown < 2 * 2**20, f"{grown / 2**20:.1f} MiB"


def test_a_full_disk_where_the_index_grows(tmp_path, monkeypatch):
    """Nothing has changed, and the same rows are written once there is room."""
    file = RowFile.create(tmp_path, RECORD, 2**31 - 1, FACTS)
    file.write(ROWS[:3], values_of(ROWS[:3], 1))
    mapped = disk_index.mapped_zeros

    def full(path, size):
        if path.name.endswith("numbers"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return mapped(path, size)

    monkeypatch.setattr(disk_index, "mapped_zeros", full)
    with pytest.raises(InputError, match=r"\(No space left on device\): it has .*saved stays usa"):
        file.write(ROWS, values_of(ROWS, 2))
    assert file.known(ROWS).tolist() == [row < 3 for row in ROWS.tolist()]
    monkeypatch.setattr(disk_index, "mapped_zeros", mapped)
    file.write(ROWS, values_of(ROWS, 2))
    assert_all(file, 2)
    assert len(list(tmp_path.glob("index-*"))) == 2
    file.close()
    assert not list(tmp_path.glob("index-*"))
