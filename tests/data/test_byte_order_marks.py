"""A byte order mark is no text where a text or a line begins, also in joined files."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stem_jax.byte_order_mark import MARK, without_marks
from stem_jax.data.documents import find_files, read_documents
from stem_jax.errors import InputError
from stem_jax.files import parse_json
from stem_jax.generation.completion import read_prompts

RAW = MARK.encode()


def _texts(path):
    return [document.text for document in read_documents(find_files([str(path)]))]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_marks_of_joined_text_files_are_no_text(tmp_path, newline):
    one, two = (f"{MARK}{name}{newline}" for name in ("one", "two"))
    (tmp_path / "a.txt").write_bytes((one + two + "\ufeff" * 2 + "three").encode())
    assert _texts(tmp_path / "a.txt") == [f"one{newline}two{newline}three"]
    (tmp_path / "b.txt.gz").write_bytes(b"".join(gzip.compress(x.encode()) for x in (one, two)))
    assert _texts(tmp_path / "b.txt.gz") == [f"one{newline}two{newline}"]


def test_a_mark_inside_a_line_is_text(tmp_path):
    text = f"zero{MARK}width and {MARK}more{MARK}\nend{MARK}"
    (tmp_path / "a.txt").write_text(text, "utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert _texts(tmp_path / "*") == [text, text]


def test_marks_that_records_were_given_are_no_text(tmp_path):
    records = [{"text": f"{MARK}one"}, {"text": f"two\n{MARK}three"}, {"text": MARK}]
    lines = [json.dumps(record, ensure_ascii=index == 0) for index, record in enumerate(records)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    (tmp_path / "b.json").write_text(f"{MARK * 2}[{','.join(lines)}]", "utf-8")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet")
    assert _texts(tmp_path / "*") == ["one", "two\nthree", ""] * 3


@pytest.mark.parametrize("marks", [1, 2])
def test_marks_before_json_are_left_out_on_every_line(tmp_path, marks):
    line = RAW * marks + b'{"text": "x"}\n'
    (tmp_path / "a.jsonl").write_bytes(line + line)
    (tmp_path / "b.txt").write_bytes(RAW * marks + b'{"a": 1}')
    assert _texts(tmp_path / "a.jsonl") == ["x", "x"]
    assert parse_json(RAW * marks + b"[1]", "x") == [1]
    with pytest.raises(InputError, match="begins as JSON"):
        _texts(tmp_path / "b.txt")


def test_a_file_of_marks_alone_is_empty(tmp_path):
    (tmp_path / "a.txt").write_bytes(RAW * 2)
    with pytest.raises(InputError, match="is empty"):
        _texts(tmp_path / "a.txt")


def test_bytes_are_counted_with_the_mark_before_them(tmp_path):
    (tmp_path / "a.txt").write_bytes(RAW + b"abc\xff")
    with pytest.raises(InputError, match="byte 0xff at byte 6"):
        _texts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(RAW + b"abc\0")
    with pytest.raises(InputError, match="NUL byte at byte 6"):
        _texts(tmp_path / "a.txt")


def test_marks_of_joined_prompt_files_are_no_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(RAW + b"one\r\n" + RAW + b"two\n" + RAW + b"\n" + b"th\xef\xbb\xbfree\n")
    assert read_prompts(path) == ["one", "two", f"th{MARK}ree"]


@given(st.lists(st.text(alphabet=["a", " ", "\n", "\r", MARK])))
def test_joining_with_marks_and_without_them_is_the_same(lines):
    """What a mark is does not depend on how many files a text came in."""
    texts = [without_marks(line) for line in lines]
    assert without_marks("\n".join(MARK + text for text in texts)) == "\n".join(texts)
    assert all(without_marks(text) == text for text in texts)
