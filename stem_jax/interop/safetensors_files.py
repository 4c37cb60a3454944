"""Safetensors files, written and read a piece at a time.

    8 bytes   N, little endian
    N bytes   JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest  the tensors in C order, each at its offsets

A model of several files has an index beside them that says which tensor is in which file.
"""

import errno
import itertools
import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from stem_jax.errors import InputError
from stem_jax.files import read_json
from stem_jax.json_fields import Fields

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Readers map tensors into memory; the format asks for a header that keeps them aligned.
_ALIGNMENT = 8


class SafetensorsWriter:
    """The files of one model, all created at their full size, to be filled in any order.

    Use it as a context: the end closes the files and checks that every tensor was written.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: np.dtype,
        file_bytes: int,
    ):
        """Args:
        folder: exists.
        shapes: of the tensors, in the order in which they lie in the files.
        dtype: of all of them.
        file_bytes: a file is closed before it exceeds this, unless one tensor alone does.

        Raises:
            InputError: there is no space for them.
        """
        self._shapes, self._dtype = dict(shapes), np.dtype(dtype)
        # By tensor: file descriptor, offset in the file, elements still to be written.
        self._places: dict[str, tuple[int, int]] = {}
        self._missing = {name: int(np.prod(shape)) for name, shape in shapes.items()}
        self._descriptors: list[int] = []
        parts = _split(self._shapes, self._dtype.itemsize, file_bytes)
        names = [SINGLE_FILE]
        if len(parts) > 1:
            names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in _from_one(parts)]
        try:
            for name, part in zip(names, parts, strict=True):
                self._create(folder / name, part)
        except BaseException:
            self._close()
            raise
        if len(parts) > 1:
            where = {tensor: name for name, part in zip(names, parts) for tensor in part}
            total = sum(self._missing.values()) * self._dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        self._close()
        missing = [name for name, count in self._missing.items() if count]
        if kind is None and missing:
            raise RuntimeError(f"tensors {missing} were not written whole")

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes a whole tensor."""
        if value.shape != self._shapes[name]:
            raise ValueError(f"{name} is {value.shape}, expected {self._shapes[name]}")
        descriptor, offset = self._places[name]
        value = np.ascontiguousarray(value, self._dtype)
        _write_at(descriptor, _bytes(value), offset)
        self._missing[name] -= value.size

    def write_rows(self, name: str, numbers: np.ndarray, columns: slice, rows: np.ndarray) -> None:
        """Writes some columns of rows of a matrix, in any order, each of them once."""
        descriptor, offset = self._places[name]
        rows = np.ascontiguousarray(rows, self._dtype)
        row_bytes = self._shapes[name][1] * self._dtype.itemsize
        offset += columns.start * self._dtype.itemsize
        for number, row in zip(numbers.tolist(), rows):
            _write_at(descriptor, _bytes(row), offset + number * row_bytes)
        self._missing[name] -= rows.size

    def _create(self, path: Path, names: list[str]) -> None:
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            start, end = end, end + self._missing[name] * self._dtype.itemsize
            header[name] = {
                "dtype": _CODES[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        begin = 8 + len(text)
        _reserve(descriptor, begin + end, path)
        _write_at(descriptor, struct.pack("<Q", len(text)) + text, 0)
        for name in names:
            self._places[name] = (descriptor, begin + header[name]["data_offsets"][0])

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a model in its folder, mapped into memory and read when they are used.

    As transformers does, a single file comes before an index: where a model was saved again into
    a folder of several files, their index stays behind.

    Raises:
        InputError: no such files, one that the index names is missing, or a damaged one.
    """
    if (folder / SINGLE_FILE).is_file():
        if (folder / INDEX_FILE).is_file():
            print(
                f"note: {folder} has {SINGLE_FILE} and {INDEX_FILE}; the single file is read, as "
                "transformers does",
                file=sys.stderr,
            )
        return read_file(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise InputError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model as "
            "safetensors (save_pretrained does)"
        )
    where = _read_index(folder / INDEX_FILE)
    names = sorted(set(where.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder / INDEX_FILE} names {', '.join(missing[:8])}, missing in {folder}; copy all "
            f"{len(names)} files"
        )
    found = {name: read_file(folder / name) for name in names}
    absent = [tensor for tensor, name in where.items() if tensor not in found[name]]
    if absent:
        raise InputError(
            f"{folder / INDEX_FILE} places {absent[0]} in {where[absent[0]]}, which does not have "
            "it; restore the files of one export"
        )
    return {tensor: found[name][tensor] for tensor, name in where.items()}


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file, mapped into memory.

    Raises:
        InputError: no such file, a damaged one, or a dtype other than float32, float16, bfloat16.
    """
    try:
        # The library checks the header: that tensors fill the file, each byte belonging to one.
        with safe_open(path, "numpy") as file:
            names = file.offset_keys()
            slices = [file.get_slice(name) for name in names]
            entries = [(one.get_dtype(), tuple(one.get_shape())) for one in slices]
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}); check the path"
        ) from error
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file ({error}); copy it again") from error
    for name, (code, _) in zip(names, entries, strict=True):
        if code not in _DTYPES:
            raise InputError(
                f"{path}: {name} has dtype {code}; convert it to {', '.join(_DTYPES)} first"
            )
    sizes = [math.prod(shape) * _DTYPES[code].itemsize for code, shape in entries]
    # They lie one after the other, up to the end. Nothing cannot be mapped.
    begin = path.stat().st_size - sum(sizes)
    data = (
        np.memmap(path, np.uint8, mode="r", offset=begin) if sum(sizes) else np.zeros(0, np.uint8)
    )
    tensors = {}
    for name, (code, shape), size, end in zip(
        names, entries, sizes, itertools.accumulate(sizes), strict=True
    ):
        try:
            tensors[name] = data[end - size : end].view(_DTYPES[code]).reshape(shape)
        except ValueError as error:
            # Of no elements, but too large in one dimension for an array.
            raise InputError(f"{path}: {name} is {shape}; no tensor is so large") from error
    return tensors


def forget(tensor: np.ndarray) -> None:
    """Gives back the memory of what was read of a mapped file; it is there again when asked for."""
    _advise(tensor, "MADV_DONTNEED")


def read_apart(tensor: np.ndarray) -> None:
    """Says of a mapped tensor that its rows are read in no order: what lies beside is not read."""
    _advise(tensor, "MADV_RANDOM")


def _advise(tensor: np.ndarray, advice: str) -> None:
    mapped = getattr(tensor, "_mmap", None)
    if not (isinstance(mapped, mmap.mmap) and tensor.size and hasattr(mmap, advice)):
        return
    begin = tensor.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
    start = begin // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(getattr(mmap, advice), start, begin + tensor.nbytes - start)


def _read_index(path: Path) -> dict[str, str]:
    """File names by tensor, all of them within the folder."""
    remedy = "restore the files of one export"
    index = Fields(read_json(path, "the index", remedy), f"the index {path}", remedy)
    where = index.inner("weight_map").values
    for tensor, name in where.items():
        inside = isinstance(name, str) and name.endswith(_SUFFIX) and "\0" not in name
        if not inside or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise InputError(
                f"the index {path} places {tensor} in {name!r}, expected the name of a {_SUFFIX} "
                f"file of its folder; {remedy}"
            )
    return dict(where)


def _split(shapes: dict[str, tuple[int, ...]], itemsize: int, file_bytes: int) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * itemsize
        if parts[-1] and filled + size > file_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def _from_one(items: list) -> range:
    return range(1, len(items) + 1)


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Takes the space now, so that a full disk is found before the work."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"no space for the {size / 2**30:.1f} GiB of {path.name} in {path.parent.parent}; "
                "free some, or choose another --out"
            ) from error
        # Not every file system and platform can; a full disk then shows while writing.
        os.ftruncate(descriptor, size)


def _bytes(value: np.ndarray) -> memoryview:
    return value.reshape(-1).view(np.uint8).data


def _write_at(descriptor: int, data, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        # The system writes at most 2 GiB at a time.
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
