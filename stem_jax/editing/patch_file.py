"""Patches as files: small, beside a checkpoint that stays as it is.

A safetensors file holds `ids` [n], `layers` [m] (of the model, all with rows) and `after` [n, m, F]
float32; that of an edit also `before`, of the same shape. Its metadata are fingerprints of run and
tokenizer, a description, and the memory, if that is not STEM's. Reverting a patch is leaving it
out.
"""

import dataclasses
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from stem_jax.checkpoints.files import check_outside
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.editing.array_file import FLOAT32, INTEGERS, check_rows, read_arrays
from stem_jax.errors import InputError
from stem_jax.files import check_writable, new_file, write_whole
from stem_jax.memory.memory import STEM

_FORMAT = "stem_jax patch 1"
# Of another memory than STEM's, which format 1 does not know.
_FORMAT_OF_MEMORY = "stem_jax patch 2"
# Of rows that were trained, without `before`, and always with a memory.
_FORMAT_OF_TUNING = "stem_jax patch 3"
_METADATA = ("format", "run", "tokenizer", "description")
# Tokens that a line names.
_NAMED = 12


@dataclasses.dataclass(frozen=True)
class Patch:
    """Rows before and after an edit, or after a training.

    name: for messages. ids: [n] int32 token ids. layers: [m] int32 layers of the model. before,
    after: [n, m, F] float32; before is None of a training, which began with the checkpoint's. run:
    fingerprint of the checkpoint. tokenizer: its fingerprint. description: what the edit was, for
    people. memory: whose rows they are.
    """

    name: str
    ids: np.ndarray
    layers: np.ndarray
    before: np.ndarray | None
    after: np.ndarray
    run: str
    tokenizer: str
    description: str
    memory: str = STEM

    def save(self, path: str | Path) -> None:
        """Writes the file; raises InputError if it exists or cannot be written."""
        check_new(path)
        arrays = {name: getattr(self, name) for name in ("ids", "layers", "after")}
        own = self.memory == STEM and self.before is not None
        format_ = _FORMAT if own else _FORMAT_OF_MEMORY
        if self.before is None:
            format_ = _FORMAT_OF_TUNING
        else:
            arrays["before"] = self.before
        values = (format_, self.run, self.tokenizer, self.description)
        metadata = dict(zip(_METADATA, values, strict=True))
        metadata |= {} if own else {"memory": self.memory}
        content = safetensors.numpy.save(arrays, metadata)
        write_whole(path, content, "--save")


def write_tuned(
    path: Path,
    patch: Patch,
    pieces: Iterable[tuple[np.ndarray, slice, np.ndarray]],
    flag: str = "--out",
) -> None:
    """Writes the patch of a training, whose rows come piece by piece.

    Args:
        patch: without its rows: `after` has its shape alone. ids: ascending.
        pieces: ids [k] among those of the patch, columns, and these of their rows [k, m, columns].

    Raises:
        InputError: the file cannot be written, or rows are not finite.
    """
    n, m, width = patch.after.shape
    metadata = dict(
        zip(
            _METADATA,
            (_FORMAT_OF_TUNING, patch.run, patch.tokenizer, patch.description),
            strict=True,
        )
    )
    numbers, header, end = (patch.ids, patch.layers), {}, 0
    for name, array in zip(("ids", "layers"), numbers, strict=True):
        header[name] = _described("I32", array.shape, end, 4)
        end += array.nbytes
    header["after"] = _described("F32", (n, m, width), end, 4)
    text = json.dumps({"__metadata__": metadata | {"memory": patch.memory}, **header}).encode()
    # Readers map arrays into memory.
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with new_file(path, flag) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in numbers:
            file.write(array.astype("<i4").tobytes())
        file.truncate(begin + end + 4 * n * m * width)
        for ids_k, columns, rows_kxmxC in pieces:
            check_rows(rows_kxmxC, f"the run of {patch.description} has", "train it again")
            places = np.searchsorted(patch.ids, ids_k)
            rows = np.ascontiguousarray(rows_kxmxC, "<f4")
            for place, row in zip(places.tolist(), rows, strict=True):
                for layer, vector in enumerate(row):
                    number = (place * m + layer) * width + columns.start
                    file.seek(begin + end + 4 * number)
                    file.write(vector.tobytes())


def _described(dtype: str, shape: tuple[int, ...], start: int, size: int) -> dict[str, Any]:
    offsets = [start, start + size * int(np.prod(shape, dtype=np.int64))]
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}


def check_new(path: str | Path) -> None:
    """Asks before the work whether a patch can be saved there.

    Raises:
        InputError: there is such a file, or none can be written.
    """
    if os.path.lexists(path):
        raise InputError(f"--save={path} exists; choose another name, or remove it first")
    check_outside(path, "--save")
    check_writable(path, "--save")


def read_patch(path: str | Path) -> Patch:
    """Reads a patch file.

    Raises:
        InputError: no such file, not a patch, or arrays that do not fit each other.
    """
    path = Path(path)
    codes = {"ids": INTEGERS, "layers": INTEGERS, "before": FLOAT32, "after": FLOAT32}
    arrays, metadata = read_arrays(path, f"patch {path}", codes)
    format_, needed = metadata.get("format"), set(codes)
    if format_ == _FORMAT_OF_TUNING:
        needed.remove("before")
    of_memory = format_ in (_FORMAT_OF_MEMORY, _FORMAT_OF_TUNING) and "memory" in metadata
    if (format_ != _FORMAT and not of_memory) or arrays.keys() != needed:
        raise InputError(
            f"{path} is not a patch of stem_jax.edit; give a file that --save wrote, or "
            "stem_jax.export --format=patch"
        )
    for name in ("ids", "layers"):
        arrays[name] = _distinct(arrays[name], f"patch {path}: {name}")
    n, m = len(arrays["ids"]), len(arrays["layers"])
    for name in sorted(needed - {"ids", "layers"}, reverse=True):
        shape = arrays[name].shape
        if len(shape) != 3 or shape[:2] != (n, m) or shape != arrays["after"].shape:
            raise InputError(
                f"patch {path}: {name} is {shape}, its {n} tokens and {m} layers ask for one row "
                "of each; make the patch again"
            )
        check_rows(arrays[name], f"patch {path}: {name} has", "make the patch again")
    described = {name: metadata.get(name, "") for name in ("run", "tokenizer", "description")}
    described["memory"] = metadata["memory"] if of_memory else STEM
    values: dict[str, Any] = {"before": None, **arrays, **described}
    return Patch(name=path.name, **values)


def _distinct(numbers: np.ndarray, where: str) -> np.ndarray:
    """Numbers of tokens or layers as int32."""
    if numbers.ndim != 1 or not len(numbers):
        raise InputError(
            f"{where} is {numbers.dtype}{list(numbers.shape)}, it must be a list of integers; make "
            "the patch again"
        )
    least, most = int(numbers.min()), int(numbers.max())
    if least < 0 or most >= 2**31:
        raise InputError(
            f"{where} has {least if least < 0 else most}, which no model has; make the patch again"
        )
    if len(np.unique(numbers)) < len(numbers):
        raise InputError(f"{where} has a number twice; make the patch again")
    return numbers.astype(np.int32)


def format_patch(patch: Patch, tokenizer: Tokenizer | None = None) -> str:
    """A line for people: what the patch writes, where, and how far it moves the rows.

    tokenizer: shows what the tokens stand for.
    """
    layers = ",".join(map(str, patch.layers.tolist()))
    named = patch.ids.tolist() if patch.before is not None else patch.ids.tolist()[:_NAMED]
    tokens = ",".join(map(str, named))
    if tokenizer is not None:
        tokens += f" ({' '.join(repr(tokenizer.decode([token])) for token in named)})"
    tokens += "" if len(named) == len(patch.ids) else f" and {len(patch.ids) - len(named)} more"
    rows = "rows" if patch.memory == STEM else f"{patch.memory} rows"
    if patch.before is None:
        moved = "trained"
    else:
        norm = np.linalg.norm(patch.before, axis=-1).mean()
        far = np.linalg.norm(patch.after - patch.before, axis=-1).mean()
        moved = f"moved by {far:.3f} (their norm {norm:.3f})"
    what = patch.description or "rows"
    return f"{patch.name}: {what}; tokens {tokens}, layers {layers}, {rows} {moved}"
