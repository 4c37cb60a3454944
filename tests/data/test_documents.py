"""Reading documents: every format and packing, and every way a file can be bad."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stem_jax.data.documents import find_files, read_documents
from stem_jax.data.formats import Reading
from stem_jax.errors import InputError

TEXTS = ["first\nline", "zwei äöü \u2028 x", "  three\t"]


def _pack(raw: bytes, packing: str) -> bytes:
    return {
        "": lambda: raw,
        ".gz": lambda: gzip.compress(raw),
        ".zst": lambda: zstandard.compress(raw),
    }[packing]()


def _jsonl(texts, field="text") -> bytes:
    return "".join(
        json.dumps({"id": 1, field: t}, ensure_ascii=False) + "\n" for t in texts
    ).encode()


def _documents(*patterns, **reading):
    return list(read_documents(find_files([str(p) for p in patterns]), Reading(**reading)))


def _texts(*patterns, **reading):
    return [document.text for document in _documents(*patterns, **reading)]


def _refused(path, match, **kwargs):
    with pytest.raises(InputError, match=match) as caught:
        _texts(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and path.name in message


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_plain_and_jsonl_round_trip(tmp_path, packing):
    (tmp_path / f"a.txt{packing}").write_bytes(_pack(TEXTS[1].encode(), packing))
    (tmp_path / f"b.jsonl{packing}").write_bytes(_pack(_jsonl(TEXTS), packing))
    documents = _documents(tmp_path / "*")
    assert [document.text for document in documents] == [TEXTS[1], *TEXTS]
    assert documents[0].origin == str(tmp_path / f"a.txt{packing}")
    assert documents[3].origin == f"{tmp_path}/b.jsonl{packing}:3"


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_lines_across_read_chunks(tmp_path, packing, monkeypatch):
    monkeypatch.setattr("stem_jax.data.packing._CHUNK_BYTES", 7)
    path = tmp_path / f"b.jsonl{packing}"
    path.write_bytes(_pack(_jsonl(TEXTS * 5).rstrip(b"\n"), packing))
    assert _texts(path) == TEXTS * 5


def test_concatenated_archives_are_read_whole(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    assert _texts(tmp_path / "*") == ["one two"] * 2


def test_parquet_streams_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(6), "text": TEXTS * 2}), path, row_group_size=2)
    documents = _documents(path)
    assert [document.text for document in documents] == TEXTS * 2
    assert documents[5].origin == f"{path}#5"


def test_files_are_sorted_and_read_once(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert _texts(tmp_path / "*.txt", tmp_path / "a.txt") == ["a.txt", "b.txt"]
    assert _texts(tmp_path / "b.txt", tmp_path / "*.txt") == ["b.txt", "a.txt"]
    assert _texts(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]


def test_other_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(_jsonl(["x"], field="body"))
    pq.write_table(pa.table({"body": ["y"]}), tmp_path / "b.parquet")
    assert _texts(tmp_path / "*", text_field="body") == ["x", "y"]
    _refused(tmp_path / "a.jsonl", r"a\.jsonl:1 has no field 'text'.*one of 'id', 'body'")
    _refused(tmp_path / "b.parquet", r"no column 'text'.*one of 'body'")


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + _jsonl(["json"]))
    assert _texts(tmp_path / "*") == ["plain", "json"]


def test_no_match_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\*\.txt' matches no file: check the path"):
        _texts(tmp_path / "none*.txt")
    with pytest.raises(InputError, match=r"is a folder: give a pattern of files, such as .*/\*"):
        _texts(tmp_path)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"]
)
def test_empty_files_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    _refused(path, "is empty")
    if name.endswith("gz") or name.endswith("zst"):
        path.write_bytes(_pack(b"", path.suffix))
        _refused(path, "is empty")
    if name == "a.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
        _refused(path, "is empty")


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_binary_content_names_the_byte(tmp_path, packing):
    plain, lines = tmp_path / f"a.txt{packing}", tmp_path / f"a.jsonl{packing}"
    plain.write_bytes(_pack(b"abc\x00def", packing))
    _refused(plain, "NUL byte at byte 3")
    plain.write_bytes(_pack("é".encode() + b"\xff\xfe", packing))
    _refused(plain, "not UTF-8: byte 0xff at byte 2")
    good = _jsonl(["fine"])
    lines.write_bytes(_pack(good + b'{"text": "\xff"}\n', packing))
    _refused(lines, rf":2 is not UTF-8: byte 0xff at byte {len(good) + 10}")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_truncated_archives_are_refused_at_every_length(tmp_path, name, packing):
    raw = _jsonl([f"document {i} {i * i}" for i in range(200)])
    packed = _pack(raw, packing)
    path = tmp_path / (name + packing)
    for length in (len(packed) - 1, len(packed) - 5, len(packed) // 2, 20, 6):
        path.write_bytes(packed[:length])
        _refused(path, "is truncated: fetch or compress it again")


def test_second_frame_of_zst_may_not_be_truncated(tmp_path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"one") + zstandard.compress(b"two" * 100)[:-4])
    _refused(path, "is truncated")


@pytest.mark.parametrize("packing, kind", [(".gz", "gzip"), (".zst", "zstd")])
def test_archives_of_another_format_are_refused(tmp_path, packing, kind):
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(b"just some plain text that was renamed")
    _refused(path, f"is not a valid {kind} file")
    packed = bytearray(_pack(b"some text " * 50, packing))
    packed[len(packed) - 6] ^= 0xFF
    path.write_bytes(packed)
    with pytest.raises(InputError, match=r"not a valid|truncated"):
        _texts(path)


@pytest.mark.parametrize(
    "line, match",
    [
        (b'{"text": "cut', ":2 is not JSON .*put one object on each line"),
        (b'["text"]', ":2 is an array"),
        (b"{}", ":2 has no field 'text'.*it has none"),
        (b'{"text": 3}', ":2: field 'text' is a number, not a string"),
        (b'{"text": null}', ":2: field 'text' is null"),
        (b'{"text": "a\\ud800"}', r":2: field 'text' holds the lone surrogate '\\ud800'"),
    ],
)
def test_bad_json_lines_name_file_and_line(tmp_path, line, match):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl(["fine"]) + line + b"\n")
    _refused(path, match)


def test_corrupt_parquet_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS * 100}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    _refused(path, "is not a readable Parquet file")
    path.write_bytes(b"PAR1 no parquet at all")
    _refused(path, "is not a readable Parquet file")
    pq.write_table(pa.table({"text": ["a", None]}), path)
    _refused(path, "#1: field 'text' is null")
    pq.write_table(pa.table({"text": [1, 2]}), path)
    _refused(path, "#0: field 'text' is a number")
