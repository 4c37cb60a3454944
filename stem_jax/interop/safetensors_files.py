"""Safetensors files, written and read a piece at a time.

    8 bytes   N, little endian
    N bytes   JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest  the tensors in C order, each at its offsets

A model of several files has an index beside them that says which tensor is in which file.
"""

import errno
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from stem_jax.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Readers map tensors into memory; the format asks for a header that keeps them aligned.
_ALIGNMENT = 8
_LONGEST_HEADER = 100_000_000


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
        header, end = {"__metadata__": {"format": "pt"}}, 0
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

    Raises:
        InputError: no such files, one that the index names is missing, or a damaged one.
    """
    index_path = folder / INDEX_FILE
    if not index_path.is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise InputError(
                f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; save the model as "
                "safetensors (save_pretrained does)"
            )
        return read_file(folder / SINGLE_FILE)
    try:
        where = dict(json.loads(index_path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{index_path} is not an index of safetensors files; restore it"
        ) from error
    names = sorted(set(where.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{index_path} names {', '.join(missing)}, missing in {folder}; copy all "
            f"{len(names)} files"
        )
    found = {name: read_file(folder / name) for name in names}
    absent = [tensor for tensor, name in where.items() if tensor not in found[name]]
    if absent:
        raise InputError(
            f"{index_path} places {absent[0]} in {where[absent[0]]}, which does not have it; "
            "restore the files of one export"
        )
    return {tensor: found[name][tensor] for tensor, name in where.items()}


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file, mapped into memory.

    Raises:
        InputError: no such file, a damaged one, or a dtype other than float32, float16, bfloat16.
    """
    try:
        with path.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {
            name: (
                entry["dtype"],
                tuple(map(int, entry["shape"])),
                *map(int, entry["data_offsets"]),
            )
            for name, entry in header.items()
        }
        data = np.memmap(path, np.uint8, mode="r", offset=8 + length) if entries else None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{path} is not a safetensors file ({error}); copy it again") from error
    tensors = {}
    for name, (code, shape, start, end) in entries.items():
        if code not in _DTYPES:
            raise InputError(
                f"{path}: {name} has dtype {code}; convert it to {', '.join(_DTYPES)} first"
            )
        size = int(np.prod(shape, dtype=object)) * _DTYPES[code].itemsize
        if min(shape, default=0) < 0 or not 0 <= start <= end <= len(data) or end - start != size:
            raise InputError(
                f"{path}: {name} {shape} does not lie within the file ({len(data)} bytes of "
                "tensors); the file is damaged or cut short: copy it again"
            )
        tensors[name] = data[start:end].view(_DTYPES[code]).reshape(shape)
    return tensors


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
