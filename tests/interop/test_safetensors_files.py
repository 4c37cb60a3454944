"""Safetensors files of other people: headers that lie, folders saved twice, stray indices."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from stem_jax.errors import InputError
from stem_jax.interop.safetensors_files import read_file, read_folder


def _entry(start, end, *shape, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_values_are_those_of_the_library(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.normal(size=(3, 5)).astype(np.float32),
        "a": rng.normal(size=7).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"of": "somebody"})
    found = read_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(found[name], value)
    # An odd header, without padding, and tensors in another order than their names.
    header = {"z": _entry(0, 2, 1, dtype="BF16"), "a": _entry(2, 10, 2)}
    data = b"\x80\x3f" + np.float32([1, 2]).tobytes()
    found = read_file(_write(tmp_path / "y.safetensors", header, data))
    assert {name: value.tolist() for name, value in found.items()} == {"z": [1.0], "a": [1.0, 2.0]}


DEEP = b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": _entry(0, 8, 2), "b": _entry(4, 12, 2)}, "invalid offset for tensor `b`"),
        ({"a": _entry(0, 8, 2), "b": _entry(0, 8, 2), "c": _entry(8, 12, 1)}, "invalid offset"),
        ({"a": _entry(0, 4, 1), "b": _entry(8, 12, 1)}, "invalid offset for tensor `b`"),
        ({"a": _entry(0, 8, 2)}, "file not fully covered"),
        ({"a": _entry(0, 16, 4)}, "file not fully covered"),
        ({"a": _entry(0, 12, 2)}, "copy it again"),
        ({"a": _entry(0, 12, -3)}, "copy it again"),
        ({"a": _entry(0, 12, 2**40, 2**40)}, "overflow"),
        ({"a": _entry(0, 12, 3.0)}, "invalid type: floating point"),
        ({"a": _entry(0, 12, 3, dtype="F33")}, "unknown variant"),
        ({"a": _entry(0, 12, 12, dtype="I8")}, "a has dtype I8; convert it to F32, F16, BF16"),
        (DEEP, "recursion limit exceeded"),
        ("x".encode("utf-16"), "is not a safetensors file"),
        (b"[]", "is not a safetensors file"),
    ],
)
def test_headers_that_are_refused(header, message, tmp_path):
    path = _write(tmp_path / "x.safetensors", header, bytes(12))
    with pytest.raises(InputError) as refused:
        read_file(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    for content in (struct.pack("<Q", 2**60) + b"{}", b"1234"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is not a safetensors file .*; copy it again"):
            read_file(path)


INDEX = "model.safetensors.index.json"


def _folder(path, weight_map):
    """Shards with `a` as 1 and `b` as 2, and this index of them."""
    path.mkdir()
    for number, name in enumerate("ab", 1):
        safetensors.numpy.save_file({name: np.float32([number])}, path / f"{name}.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def _read(folder):
    return {name: value.tolist() for name, value in read_folder(folder).items()}


def test_a_single_file_comes_before_an_index(tmp_path, capsys):
    folder = _folder(tmp_path / "x", {"a": "a.safetensors", "b": "b.safetensors"})
    assert _read(folder) == {"a": [1], "b": [2]}
    assert capsys.readouterr().err == ""
    # As it is after a model was saved again, with larger files.
    safetensors.numpy.save_file({"a": np.float32([8])}, folder / "model.safetensors")
    assert _read(folder) == {"a": [8]}
    assert "model.safetensors.index.json; the single file is read" in capsys.readouterr().err
    # transformers removes the files of several, not their index.
    (folder / "a.safetensors").unlink()
    assert _read(folder) == {"a": [8]}


@pytest.mark.parametrize(
    "name",
    [
        1,
        ["a.safetensors"],
        None,
        {},
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "{outside}",
        "a.safetensors\0",
        "",
        ".",
        "pytorch_model.bin",
    ],
)
def test_an_index_that_leads_elsewhere(name, tmp_path):
    outside = tmp_path / "outside.safetensors"
    safetensors.numpy.save_file({"b": np.float32([3])}, outside)
    name = name.format(outside=outside) if isinstance(name, str) else name
    folder = _folder(tmp_path / "x", {"a": "a.safetensors", "b": name})
    with pytest.raises(InputError, match=r"index.json places b in .*, expected the name of a \.s"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000 + "]" * 3000, "is nested deeper than 200 levels"),
        ("{}", "weight_map is missing"),
        ("[]", r"is \[\], expected an object"),
        ('{"weight_map": ["a.safetensors"]}', "weight_map is .*, expected an object"),
        (
            '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
            "the key 'a' stands twice",
        ),
    ],
)
def test_an_index_that_is_none(text, message, tmp_path):
    folder = _folder(tmp_path / "x", {})
    (folder / INDEX).write_text(text)
    with pytest.raises(InputError, match=f"{INDEX}.* .?{message}.*restore the files of one export"):
        read_folder(folder)


def test_an_index_within_its_folder(tmp_path):
    folder = _folder(tmp_path / "x", {"a": "sub/a.safetensors", "b": "b.safetensors"})
    (folder / "sub").mkdir()
    (folder / "a.safetensors").rename(folder / "sub" / "a.safetensors")
    # Downloads are links to files elsewhere.
    (folder / "b.safetensors").rename(tmp_path / "blob")
    (folder / "b.safetensors").symlink_to(tmp_path / "blob")
    assert _read(folder) == {"a": [1], "b": [2]}
