"""Rows as they are before their first update, made from a random key and their numbers."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from stem_jax.errors import InputError
from stem_jax.tables.spec import TableSpec, initial_rows

# Rows are made this many bytes at a time, which takes about three times as much.
_PIECE_BYTES = 2**25
_FEWEST_ROWS, _MOST_ROWS = 256, 2**14


@dataclasses.dataclass(frozen=True)
class FirstRows:
    """What the first rows of a table are a function of, beside their numbers and shape.

    key_data: of a key of JAX's default kind, uint32. std: of the normal distribution. row_format:
    to which its numbers are rounded. scale: of the rounded ones, by which rows have decayed that
    came from another run.
    """

    key_data: tuple[int, ...]
    std: float
    row_format: str = "float32"
    scale: float = 1.0

    @classmethod
    def of(cls, spec: TableSpec, key: jax.Array) -> "FirstRows":
        """Those that `init_table` makes with this key."""
        key_data = np.asarray(jax.random.key_data(key)).tolist()
        return cls(tuple(key_data), spec.init_std, spec.row_format)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "FirstRows":
        """The inverse of `record`."""
        return cls(**{**record, "key_data": tuple(record["key_data"])})

    def record(self) -> dict[str, Any]:
        """What JSON can hold."""
        return dataclasses.asdict(self)

    def scaled(self, factor: float) -> "FirstRows":
        """The rows times a number."""
        return dataclasses.replace(self, scale=self.scale * factor)

    def made(self, spec: TableSpec, rows: np.ndarray) -> np.ndarray:
        """[n, S, F] in the table's format, of rows [n] of the whole table.

        Made on the CPU; they pass through no other device. Bit for bit the same as on a CPU mesh;
        other platforms round the normal distribution differently. May run in several threads.

        Raises:
            InputError: JAX has no CPU backend.
        """
        cpu = _cpu_device()
        made = np.empty(spec.shape("rows", len(rows)), spec.row_format)
        make = _maker(dataclasses.replace(spec, init_std=self.std, row_format=self.row_format))
        most = _most_rows(spec)
        # The mesh that a run has set is of other devices.
        with jax.set_mesh(
            jax.make_mesh((1,), ("cpu",), axis_types=(AxisType.Auto,), devices=[cpu])
        ):
            key_data = jax.device_put(np.array(self.key_data, np.uint32), cpu)
            for first in range(0, len(rows), most):
                piece = rows[first : first + most].astype(np.int32)
                # Few sizes, each a program.
                size = min(most, max(_FEWEST_ROWS, 1 << (len(piece) - 1).bit_length()))
                numbers = jax.device_put(np.resize(piece, size), cpu)
                found = np.asarray(make(key_data, numbers))[: len(piece)]
                if self.scale != 1:
                    found = found.astype(np.float32) * np.float32(self.scale)
                made[first : first + len(piece)] = found
        return made

    def compile(self, spec: TableSpec, most: int) -> None:
        """Compiles what it takes to make up to so many rows at a time."""
        size = _FEWEST_ROWS
        while True:
            self.made(spec, np.zeros(size, np.int64))
            if size >= min(most, _most_rows(spec)):
                return
            size *= 2


@functools.cache
def _maker(spec: TableSpec):
    return jax.jit(
        lambda key_data, rows: initial_rows(spec, jax.random.wrap_key_data(key_data), rows)
    )


def _most_rows(spec: TableSpec) -> int:
    """Rows that are made at a time, a power of two."""
    fit = max(1, _PIECE_BYTES // (4 * spec.row_size))
    return min(_MOST_ROWS, 1 << (fit.bit_length() - 1))


def _cpu_device() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise InputError(
            "resident_rows needs JAX's CPU backend to create a table in host memory; add "
            f"cpu to JAX_PLATFORMS, as in JAX_PLATFORMS=cuda,cpu ({error})"
        ) from error
