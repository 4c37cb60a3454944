"""Archives: fetched, checked, read in memory; every refusal in one line."""

import dataclasses
import io
import sys
import tarfile

import pytest

from stem_jax.errors import InputError
from stem_jax.study import packages
from stem_jax.study.packages import fetch, members
from tests.study.archives import archive


def _refusal(call) -> str:
    with pytest.raises(InputError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_files_that_match_come_by_path_and_others_stay(tmp_path):
    files = {"docs/b.rst": "b", "docs/deep/a.rst": b"\xff", "setup.py": "raise SystemExit"}
    package = archive(tmp_path, "train", "one", files)
    assert list(members(package, fetch(package, tmp_path))) == [
        ("docs/b.rst", b"b"),
        ("docs/deep/a.rst", b"\xff"),
    ]


def test_another_file_of_the_same_name_is_refused(tmp_path, monkeypatch):
    package = archive(tmp_path, "train", "one", {"docs/a.rst": "a"})
    other = dataclasses.replace(package, sha256="0" * 64)
    said = _refusal(lambda: fetch(other, tmp_path))
    assert package.file in said and package.sha256[:12] in said and "remove it" in said
    content = (tmp_path / package.file).read_bytes()
    monkeypatch.setattr(packages, "_download", lambda _: content)
    said = _refusal(lambda: fetch(other, tmp_path / "empty"))
    assert "the index gives another file" in said
    assert not (tmp_path / "empty").exists()
    assert fetch(package, tmp_path / "empty") == content
    monkeypatch.setattr(packages, "_download", None)
    assert fetch(package, tmp_path / "empty") == content


@pytest.mark.parametrize("name", ["../evil", "one-1.0/../../evil", "/etc/evil"])
def test_a_member_outside_its_folder_is_refused_and_nothing_is_written(tmp_path, name):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as made:
        made.addfile(tarfile.TarInfo(name))
    package = archive(tmp_path, "train", "one", {"docs/a.rst": "a"})
    before = sorted(tmp_path.rglob("*"))
    said = _refusal(lambda: list(members(package, raw.getvalue())))
    assert name in said and package.file in said
    assert sorted(tmp_path.rglob("*")) == before


def test_links_are_no_files(tmp_path):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as made:
        link = tarfile.TarInfo("one-1.0/docs/a.rst")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    package = archive(tmp_path, "train", "one", {"docs/a.rst": "a"})
    assert "no file that docs/*" in _refusal(lambda: list(members(package, raw.getvalue())))


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"PK" + raw])
def test_a_damaged_archive_is_refused(tmp_path, damage):
    package = archive(tmp_path, "train", "one", {"docs/a.rst": "a" * 9000})
    content = fetch(package, tmp_path)
    said = _refusal(lambda: list(members(package, damage(content))))
    assert package.file in said and "damaged" in said


def test_an_index_that_does_not_answer_is_named_with_ways_out(tmp_path, monkeypatch):
    package = archive(tmp_path, "train", "one", {"docs/a.rst": "a"})
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    said = _refusal(lambda: fetch(package, tmp_path / "empty"))
    assert package.file in said and "PIP_INDEX_URL" in said


def test_an_index_in_a_folder_gives_the_file_and_runs_none_of_it(tmp_path, monkeypatch):
    """As mirrors lie on disks: a page of links for each package."""
    ran = tmp_path / "ran"
    files = {"docs/a.rst": "a", "setup.py": f"open({str(ran)!r}, 'w')"}
    page = tmp_path / "simple" / "one"
    package = archive(page, "train", "one", files)
    digest = f"{package.file}#sha256={package.sha256}"
    (page / "index.html").write_text(f'<a href="{digest}">{package.file}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    fetch(package, tmp_path / "cache")
    assert (tmp_path / "cache" / package.file).exists() and not ran.exists()
    other = dataclasses.replace(package, version="2.0", file="one-2.0.tar.gz")
    assert "has no file one-2.0.tar.gz" in _refusal(lambda: fetch(other, tmp_path / "cache"))


def test_a_missing_unearth_is_named(tmp_path, monkeypatch):
    package = archive(tmp_path, "train", "one", {"docs/a.rst": "a"})
    monkeypatch.setitem(sys.modules, "unearth", None)
    said = _refusal(lambda: fetch(package, tmp_path / "empty"))
    assert package.file in said and "pip install unearth" in said
