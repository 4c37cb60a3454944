"""JSON with one set of refusals; files and folders that appear whole or not at all."""

import ctypes
import errno
import json
import os
import shutil
import signal
import stat
import sys
from pathlib import Path

import pytest

from stem_jax import files, swapped_names
from stem_jax.checkpoints.files import check_outside
from stem_jax.editing.patch_file import check_new
from stem_jax.errors import InputError
from stem_jax.files import (
    DEEPEST,
    check_writable,
    new_folder,
    parse_json,
    read_json,
    replace_folder,
    write_whole,
)
from stem_jax.result_folder import check_folder
from stem_jax.swapped_names import swap_names
from tests.children import child, finish

WRITER = """
import sys, time
from pathlib import Path
from stem_jax import cli, files

def main(argv):
    with getattr(files, argv[0])(Path(argv[1]), "--out") as folder:
        (folder / "half").write_text("half")
        print("begun", flush=True)
        time.sleep(100)

cli.run(main)
"""


def _nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (_nested(DEEPEST + 1), "is nested deeper than 200 levels"),
        (_nested(3000), "is nested deeper than 200 levels"),
        ('{"a":' * 100_000, "is nested deeper than 200 levels"),
        ('{"a": NaN}', "is not JSON (NaN is no number of JSON)"),
        ("[-Infinity]", "is not JSON (-Infinity is no number of JSON)"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "is not JSON (the key 'a' stands twice in an object"),
        ('{"a": 1,\n "b"}', "is not JSON (Expecting ':' delimiter: line 2, column 5)"),
        ("1" * 5000, "is not JSON (Exceeds the limit"),
        (b'{"name": "\xe9"}', "is not UTF-8 (byte 10)"),
        ('{"name": "é"}'.encode("utf-16"), "is UTF-16, expected UTF-8"),
        (b"", "is empty, expected JSON"),
        (b"\xef\xbb\xbf \n", "is empty, expected JSON"),
    ],
)
def test_json_that_is_refused(source, message):
    with pytest.raises(InputError) as refused:
        parse_json(source, "file x, line 7", "correct it")
    assert str(refused.value).startswith(f"file x, line 7 {message}")
    assert str(refused.value).endswith("; correct it")
    assert "\n" not in str(refused.value)


def test_json_that_is_taken():
    deep = parse_json(_nested(DEEPEST), "x")
    assert json.dumps(deep) == _nested(DEEPEST)
    # Brackets in a text are no levels.
    assert parse_json(json.dumps({"text": "[" * 5000}), "x") == {"text": "[" * 5000}
    assert parse_json(b'\xef\xbb\xbf{"name": "\xc3\xa9"}', "x") == {"name": "é"}
    assert parse_json("\ufeff[1]", "x") == [1]
    assert parse_json('{"a": 1, "a": 1}', "x") == {"a": 1}
    assert str(parse_json('{"a": NaN}', "x", constants=True)) == "{'a': nan}"


def test_json_is_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "x.json").write_bytes('{"｜": "é"}'.encode())
    program = (
        "import sys; from stem_jax.files import read_json; print(ascii(read_json(sys.argv[1])))"
    )
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    with child("-c", program, str(tmp_path / "x.json"), **locale) as process:
        assert finish(process) == "{'\\uff5c': '\\xe9'}\n"


def test_json_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"^the index /.*/none.json cannot be read \(No such file"):
        read_json(tmp_path / "none.json", "the index")
    with pytest.raises(InputError, match=r"^--measure=/.* cannot be read \(Is a directory\); give"):
        read_json(tmp_path, "--measure=", "give a file")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("way", ["new_folder", "replace_folder"])
def test_a_stop_leaves_a_folder_as_it_was(way, stop, tmp_path):
    out = tmp_path / "out"
    if way == "replace_folder":
        out.mkdir()
        (out / "old").write_text("old")
    with child("-c", WRITER, way, str(out)) as process:
        assert any(line == "begun\n" for line in process.stdout)
        process.send_signal(stop)
        assert process.wait(60) != 0
        said = process.stdout.read()
    if stop == signal.SIGTERM:
        assert (said, process.returncode) == (
            f"error: stopped by SIGTERM; --out={out} was not written\n",
            143,
        )
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == (
        ["out", "out/old"] if way == "replace_folder" else []
    )


HANDLER_OF_C = """
import ctypes, os, signal, sys
from stem_jax.files import write_whole

heard = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: os.write(1, b"heard\\n"))
ctypes.CDLL(None).signal(signal.SIGTERM, heard)
write_whole(sys.argv[1], "text")
os.kill(os.getpid(), signal.SIGTERM)
print("lives")
"""


def test_a_handler_that_python_does_not_know_stays(tmp_path):
    """Between several processes JAX hears SIGTERM with a handler of C++."""
    with child("-c", HANDLER_OF_C, str(tmp_path / "file")) as process:
        assert finish(process) == "heard\nlives\n"


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("way", ["new_folder", "replace_folder"])
def test_the_next_writer_removes_what_a_dead_one_left(way, tmp_path):
    out = tmp_path / "out"
    write = getattr(files, way)
    # Of a program without locks, of another name, and of a number that a living process may have.
    others = [".out.abcd1234.part", ".out.x.abcd1234.part", f".out.tmp-{os.getpid()}"]
    for name in others:
        (tmp_path / name).mkdir()
    with child("-c", WRITER, way, str(out)) as process:
        assert any(line == "begun\n" for line in process.stdout)
        begun = set(_names(tmp_path)) - set(others)
        assert {name[-5:] for name in begun} == {".part", ".lock"}
        # A live one keeps its own, and its end does not touch what others wrote meanwhile.
        with write(out, "--out") as folder:
            (folder / "new").write_text("new")
        assert set(_names(tmp_path)) == {"out", *begun, *others}
        process.kill()
        process.wait()
    shutil.rmtree(out)
    assert set(_names(tmp_path)) == {*begun, *others}
    with write(out, "--out"):
        pass
    assert set(_names(tmp_path)) == {"out", *others}


KILLED = """
import os, sys
from pathlib import Path
from stem_jax import files

files.swap_names = lambda one, other: False

def rename(self, target):
    os.rename(self, target)
    os.kill(os.getpid(), 9)

Path.rename = rename
with files.replace_folder(Path(sys.argv[1]), "--out") as folder:
    (folder / "new").write_text("new")
"""


KILLED_AFTER_THE_SWAP = """
import os, sys
from pathlib import Path
from stem_jax import files

swap = files.swap_names
files.swap_names = lambda one, other: swap(one, other) and os.kill(os.getpid(), 9)
with files.replace_folder(Path(sys.argv[1]), "--out") as folder:
    (folder / "new").write_text("new")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux swaps two names")
def test_a_replaced_folder_is_there_at_every_moment(tmp_path):
    """Before the swap it is the old one, after it the new one, whose writer may be dead."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with child("-c", KILLED_AFTER_THE_SWAP, str(out)) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert _names(out) == ["new"] and len(_names(tmp_path)) > 1
    with replace_folder(out, "--out") as folder:
        (folder / "newer").write_text("newer")
    assert (_names(out), _names(tmp_path)) == (["newer"], ["out"])


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL])
def test_a_folder_is_replaced_where_names_cannot_be_swapped(tmp_path, monkeypatch, number):
    def refuse(*_):
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(swapped_names, "_renameat2", lambda: refuse)
    (tmp_path / "out" / "deep").mkdir(parents=True)
    with replace_folder(tmp_path / "out", "--out") as folder:
        (folder / "new").write_text("new")
    assert (_names(tmp_path / "out"), _names(tmp_path)) == (["new"], ["out"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux swaps two names")
def test_a_swap_that_fails_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        swap_names(Path(tmp_path / "one"), tmp_path / "other")


def test_a_replaced_folder_comes_back(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with child("-c", KILLED, str(out)) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(ZeroDivisionError), replace_folder(out, "--out"):
        _ = 1 / 0
    assert _names(tmp_path) == ["out"]
    assert _names(out) == ["old"]


def test_a_file_of_a_dead_writer_is_removed(tmp_path):
    dead = "import os; from stem_jax import files; os.fsync = lambda _: os.kill(os.getpid(), 9); "
    dead += f"files.write_whole({str(tmp_path / 'x')!r}, 'half')"
    with child("-c", dead) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert len(_names(tmp_path)) == 2
    write_whole(tmp_path / "x", "whole")
    assert _names(tmp_path) == ["x"]


def test_a_folder_is_replaced(tmp_path):
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "old").write_text("old")
    (tmp_path / "link").symlink_to(out)
    with replace_folder(tmp_path / "link", "--out") as folder:
        (folder / "new").write_text("new")
        assert (out / "deep" / "old").exists()
    assert [path.name for path in out.rglob("*")] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]
    assert (tmp_path / "link").is_symlink()


def _full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("way", [new_folder, replace_folder])
def test_a_full_disk_leaves_no_folder(way, tmp_path, monkeypatch):
    refused = pytest.raises(InputError, match=r"^--out=.*out cannot be written \(no space left\)")
    with refused, way(tmp_path / "out", "--out"):
        _full()
    with refused, way(tmp_path / "out", "--out"):
        monkeypatch.setattr(os, "fsync", _full)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "x.json"
    before = os.umask(0o027)
    try:
        write_whole(path, "é\n")
    finally:
        os.umask(before)
    assert path.read_bytes() == "é\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(InputError, match=r"^--out=.*x.json cannot be written \(no space left\); "):
        write_whole(path, b"other", "--out")
    monkeypatch.undo()
    assert path.read_bytes() == "é\n".encode()
    (tmp_path / "link").symlink_to(path)
    write_whole(tmp_path / "link", b"through")
    assert path.read_bytes() == b"through"
    assert [item.name for item in path.parent.iterdir()] == ["x.json"]


def test_a_place_is_asked_for_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "x", "--out")
    assert _names(tmp_path) == []
    (tmp_path / "x").write_text("old")
    check_writable(tmp_path / "x", "--out")
    assert (tmp_path / "x").read_text() == "old"
    with pytest.raises(InputError, match=r"^--out=/proc/none/x cannot be "):
        check_writable("/proc/none/x", "--out")
    with pytest.raises(InputError, match=r"^--save=.* cannot be written \(File name too long\)"):
        check_writable(tmp_path / ("x" * 250), "--save")
    assert _names(tmp_path) == ["x"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="pipe is no regular file; give the name of a file"):
        write_whole(tmp_path / "pipe", b"")
    with pytest.raises(InputError, match="folder is a folder; give the name of a file"):
        write_whole(tmp_path / "folder", b"")
    with pytest.raises(InputError, match="file is not a folder; choose another"):
        write_whole(tmp_path / "file" / "deep" / "x", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]


def test_results_stay_out_of_the_checkpoints_of_a_run(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run / "checkpoints")
    inside = (run / "checkpoints" / "9", tmp_path / "link" / "5" / "x.json")
    outside = (run / "exported", run / "checkpoints", tmp_path / "checkpoints" / "x")
    for path in (*inside, *outside):
        check_outside(path, "--out")
    # A run has its configuration beside them.
    (run / "config.json").write_text("{}")
    for path in outside:
        check_outside(path, "--out")
    for path in inside:
        with pytest.raises(InputError, match=r"^--out=.* is among the checkpoints of .*/run, whi"):
            check_outside(path, "--out")
    with pytest.raises(InputError, match=r"^--save=.*/x is among the checkpoints"):
        check_new(inside[0] / "x")
    with pytest.raises(InputError, match=r"^--out=.* is among the checkpoints"):
        check_folder(inside[0])
