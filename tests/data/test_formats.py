"""Files as other people name and pack them: read as what they are, or refused with the remedy."""

import bz2
import gzip
import io
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.analysis.flags import parse as analyze_flags
from stem_jax.config_checks import _CHOICES
from stem_jax.data.bad_records import BadRecords
from stem_jax.data.documents import find_files, read_documents
from stem_jax.data.formats import AS_FOUND, FORMATS, Reading
from stem_jax.data.sources import read_sources
from stem_jax.errors import BadRecord, InputError
from stem_jax.evaluation.flags import parse as evaluate_flags

TEXTS = ["first\nline", 'zwei äöü \u2028 {"x": [1, 2]}', "  three\\\t"]
LINES = "".join(json.dumps({"id": 1, "text": t, "score": 0.5}) + "\n" for t in TEXTS).encode()
ARRAY = json.dumps([{"text": t} for t in TEXTS], indent=1, ensure_ascii=False).encode()
MARK = b"\xef\xbb\xbf"


def _documents(*patterns, bad=None, **reading):
    return list(read_documents(find_files([str(p) for p in patterns]), Reading(**reading), bad))


def _texts(*patterns, **options):
    return [document.text for document in _documents(*patterns, **options)]


def _refused(path, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        _documents(path, **options)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def _write(path, raw):
    path.write_bytes(raw)
    return path


PACKED = {
    "c4-train.00000-of-01024.json.gz": gzip.compress(LINES),
    "dolma-v1_7-0000.json.gz": gzip.compress(LINES),
    "arxiv_023827cd.jsonl.zst": zstandard.compress(LINES),
    "a.json": LINES,
    "b.json.zst": zstandard.compress(LINES),
    "c.ndjson": LINES,
    "d.JSONL": LINES,
    "e.Jsonl.GZ": gzip.compress(LINES),
    "f.jsonl.bz2": bz2.compress(LINES),
    "g.json.xz": lzma.compress(LINES),
    "h.jsonl.zstd": zstandard.compress(LINES),
    "i.jsonlines": LINES,
    "one_line.json": LINES.rstrip(b"\n"),
    "array.json": ARRAY,
    "array.json.gz": gzip.compress(MARK + b" \n" + ARRAY),
    "array.jsonl": ARRAY,
    "misnamed_gzip.jsonl": gzip.compress(LINES),
    "misnamed_zstd.jsonl.gz": zstandard.compress(LINES),
    "pzstd.jsonl.zst": b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstandard.compress(LINES),
}


@pytest.mark.parametrize("name", PACKED)
def test_records_are_read_whatever_their_file_is_called(tmp_path, name):
    path = _write(tmp_path / name, PACKED[name])
    assert _texts(path) == TEXTS
    place = "[1]" if "array" in name else ":2"
    assert _documents(path)[1].origin == f"{path}{place}"


def test_shards_as_fineweb_ships_them(tmp_path):
    columns = {"text": TEXTS, "id": ["a", "b", "c"], "token_count": [1, 2, 3]}
    for name in ("000_00000.parquet", "001.PARQUET", "002.parq", "003"):
        path = tmp_path / name
        pq.write_table(pa.table(columns), path, row_group_size=2, compression="zstd")
        assert _texts(path) == TEXTS
    _refused(_write(tmp_path / "x.parquet.gz", gzip.compress(path.read_bytes())), "unpack it")
    _refused(_write(tmp_path / "y.zst", zstandard.compress(path.read_bytes())), "unpack it")


@pytest.mark.parametrize("name", ["LICENSE", "a.md", "b.TXT", "c.py.gz", "d.html", ".profile"])
def test_names_of_text_are_text(tmp_path, name):
    raw = gzip.compress(b"plain [1]") if name.endswith("gz") else b"plain [1]"
    assert _texts(_write(tmp_path / name, raw)) == ["plain [1]"]


@pytest.mark.parametrize("name", ["a.csv", "b.tsv.gz", "c.xml", "d.arrow", "part.0001", "e.tar.gz"])
def test_other_names_are_refused_but_for_format_text(tmp_path, name):
    raw = b"text,id\nx,1\n"
    path = _write(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw)
    _refused(path, "--format")
    assert _texts(path, format="text") == [raw.decode()]


@pytest.mark.parametrize("start", [LINES, ARRAY, json.dumps({"a": 1}, indent=2).encode()])
@pytest.mark.parametrize("name", ["part-00000", "a.txt", "b.txt.gz"])
def test_json_by_another_name_is_refused_until_a_format_is_set(tmp_path, name, start):
    path = _write(tmp_path / name, gzip.compress(start) if name.endswith("gz") else start)
    _refused(path, "begins as JSON, its name says otherwise: set --format")
    assert _texts(path, format="text") == [start.decode()]
    if start != LINES and start != ARRAY:
        return
    assert _texts(path, format="jsonl" if start == LINES else "json") == TEXTS


@pytest.mark.parametrize(
    "raw, match",
    [
        (b"PK\x03\x04 and so on", "is a zip archive: unpack it"),
        (b"%PDF-1.7 and so on", "is a PDF: extract its text"),
        (b"\x04\x22\x4d\x18 and so on", "packed with lz4"),
        ("text".encode("utf-16"), "is UTF-16: convert it to UTF-8"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\0", "is a tar archive"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.bin"])
def test_what_is_no_text_is_named(tmp_path, name, raw, match):
    _refused(_write(tmp_path / name, raw), match)


def test_a_long_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    packed = io.BytesIO()
    packer = zstandard.ZstdCompressor(compression_params=parameters)
    with packer.stream_writer(packed, closefd=False) as writer:
        writer.write(LINES)
    assert zstandard.get_frame_parameters(packed.getvalue()).window_size == 1 << 28
    assert _texts(_write(tmp_path / "a.jsonl.zst", packed.getvalue())) == TEXTS


def test_a_dictionary_that_is_not_there_is_named(tmp_path):
    dictionary = zstandard.train_dictionary(1024, [b"some text %d" % i * 20 for i in range(999)])
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(b"some text 7" * 9)
    _refused(_write(tmp_path / "a.txt.zst", packed), "needs the dictionary it was packed with")


@pytest.mark.parametrize("packing, kind", [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")])
def test_an_archive_that_was_unpacked_on_its_way_says_so(tmp_path, packing, kind):
    path = _write(tmp_path / f"a.jsonl.{packing}", LINES)
    _refused(path, rf"no?t a valid {kind} file .*unpacked on its way, name it a\.jsonl")


@pytest.mark.parametrize("pack, name", [(bz2.compress, "a.txt.bz2"), (lzma.compress, "a.txt.xz")])
def test_damage_to_bzip2_and_xz_is_told_from_truncation(tmp_path, pack, name):
    packed = pack(bytes(range(32, 127)) * 50)
    for length in (len(packed) - 1, len(packed) // 2, 20, 5, 2):
        _refused(_write(tmp_path / name, packed[:length]), "is truncated")
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    _refused(_write(tmp_path / name, damaged), "is not a valid|is truncated")
    assert _texts(_write(tmp_path / name, pack(b"one ") + pack(b"two"))) == ["one two"]


def _badly_encoded(path):
    raw = pa.py_buffer(b"fine" + b"ab\xff" + b"good")
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 7, 11)))
    column = pa.StringArray.from_buffers(3, offsets, raw)
    pq.write_table(pa.table({"text": column}), path)


def test_bytes_of_parquet_that_are_not_utf8_name_their_row(tmp_path):
    path = tmp_path / "a.parquet"
    _badly_encoded(path)
    _refused(path, r"a\.parquet#1 is not UTF-8: byte 0xff at byte 2 of the text; write the column")
    assert _texts(path, bad=BadRecords("skip")) == ["fine", "good"]


def test_deep_nesting_is_refused_with_its_place(tmp_path):
    deep = b'{"meta": ' + b"[" * 3000 + b"]" * 3000 + b', "text": "x"}'
    _refused(_write(tmp_path / "a.jsonl", LINES + deep), r"a\.jsonl:4 is nested deeper than 200")
    _refused(_write(tmp_path / "a.json", b"[" + deep + b"]"), r"a\.json\[0\] is nested deeper")
    many = b'{"meta": [' + b",".join([b"[]"] * 3000) + b'], "text": "x"}'
    assert _texts(_write(tmp_path / "b.jsonl", many)) == ["x"]


def test_scores_that_are_no_number_are_no_harm(tmp_path):
    assert _texts(_write(tmp_path / "a.jsonl", b'{"score": NaN, "text": "x"}')) == ["x"]


@pytest.mark.parametrize(
    "raw, match",
    [
        (ARRAY[:-1], "ends inside its JSON array"),
        (ARRAY[:40], "ends inside its JSON array"),
        (ARRAY + b" ]", "goes on after its JSON array"),
        (b'[{"text": "a"}, 3]', r"\[1\] is a number"),
        (b'[{"text": "a"}, {"text": }]', r"\[1\] is not JSON"),
        (b'["a", "b"]', r"\[0\] is a string"),
        (b'[{"text": "a"},]', r"\[1\] is empty"),
        (b"[]", "is empty"),
        (b'{\n "text": "x"\n}', r":1 is not JSON .*put one object on each line"),
    ],
)
def test_bad_arrays_and_objects_name_the_place(tmp_path, raw, match):
    _refused(_write(tmp_path / "a.json", raw), match)


@given(
    values=st.lists(
        st.recursive(
            st.text(max_size=5) | st.integers(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
            max_leaves=6,
        ),
        max_size=6,
    ),
    texts=st.lists(st.text(min_size=1), min_size=1, max_size=6),
    chunk=st.integers(1, 9),
    ascii_only=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_an_array_is_cut_as_the_json_reader_would(
    tmp_path_factory, values, texts, chunk, ascii_only
):
    records = [{"meta": values, "text": text} for text in texts]
    # A lone surrogate or NUL in the text is another test's.
    raw = json.dumps(records, ensure_ascii=ascii_only).encode(errors="replace")
    path = _write(tmp_path_factory.mktemp("a") / "a.json", raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stem_jax.data.packing._CHUNK_BYTES", chunk)
        assert _texts(path, format="json") == [r["text"] for r in json.loads(raw)]


BAD_LINES = [b'{"text": null}', b"not json", b'{"other": "x"}', b'{"text": "\xff"}', b"[]"]


def test_bad_records_are_left_out_counted_and_listed(tmp_path):
    path = _write(tmp_path / "a.jsonl", b"\n".join([LINES.rstrip(), *BAD_LINES, LINES]))
    empty = _write(tmp_path / "b.jsonl", b"")
    listed = tmp_path / "skipped.jsonl"
    with BadRecords("skip", listed) as bad:
        assert _texts(path, empty, bad=bad) == TEXTS * 2
    places = [f"{path}:{3 + i}" for i in range(1, 6)] + [str(empty)]
    found = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [record["place"] for record in found] == places
    assert bad.count == 6 and "field 'text' is null" in found[0]["reason"]
    with pytest.raises(BadRecord, match=r"a\.jsonl:4: field 'text' is null"):
        _documents(path)
    with pytest.raises(InputError, match="on_bad 'go on' is unknown: use one of stop, skip"):
        BadRecords("go on")


def test_damaged_files_end_it_whatever_is_done_about_records(tmp_path):
    path = _write(tmp_path / "a.jsonl.gz", gzip.compress(LINES)[:-9])
    _refused(path, "is truncated", bad=BadRecords("skip"))


def test_a_file_is_read_once_by_whatever_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "c.txt"):
        _write(tmp_path / name, name.encode())
    os.symlink("b.txt", tmp_path / "a.txt")
    os.symlink(tmp_path, tmp_path / "again")
    names = ["*.txt", "./b.txt", str(tmp_path / "c.txt"), "again/*.txt", "facts", "facts"]
    documents = list(read_sources(names, AS_FOUND))
    assert [d.origin for d in documents[:3]] == ["a.txt", "c.txt", "facts#0"]
    assert len({d.origin for d in documents}) == len(documents)


def test_one_list_of_formats():
    assert _CHOICES["data.format"] == FORMATS
    with pytest.raises(InputError, match="format 'csv' is unknown: use one of auto, text"):
        Reading(format="csv")
    flags = ["--workdir=x", "--text-field=body", "--format=jsonl"]
    args = evaluate_flags([*flags, "--perplexity=facts"], None)
    assert (args.text_field, args.format) == ("body", "jsonl")
    _, options = analyze_flags(flags, None)
    assert (options.text_field, options.format) == ("body", "jsonl")
