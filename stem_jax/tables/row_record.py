"""A row as bytes on disk: its fields one after the other, then a checksum of them.

The checksum (CRC-32) starts from the row's number: a record that lies where another row's is looked
for is found wrong, as a torn one is.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

# NumPy learns bfloat16 by it.
import ml_dtypes  # noqa: F401
import numpy as np

from stem_jax.tables.spec import TableSpec

_CHECKSUM = np.dtype("<u4")

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RecordField:
    """A field of one row.

    dtype: NumPy's name. shape: of one row, [S, columns], [S] or [].
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class RowRecord:
    """How a row of a block lies on disk.

    fields: in their order.
    """

    fields: tuple[RecordField, ...]

    @classmethod
    def of(cls, spec: TableSpec, columns: int, names: Sequence[str] | None = None) -> "RowRecord":
        """Of the rows of a block.

        Args:
            spec: the table.
            columns: of the block.
            names: fields that it has; None for all.
        """
        return cls(
            tuple(
                RecordField(field.name, field.dtype, tuple(spec.shape(field.name, 1, columns)[1:]))
                for field in spec.fields
                if names is None or field.name in names
            )
        )

    @property
    def size(self) -> int:
        """Bytes of a record."""
        return self.row_bytes + _CHECKSUM.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's fields."""
        return sum(field.num_bytes for field in self.fields)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the fields."""
        return tuple(field.name for field in self.fields)

    def facts(self) -> list[list[Any]]:
        """The fields, for JSON."""
        return [[field.name, field.dtype, list(field.shape)] for field in self.fields]

    def empty(self, count: int) -> dict[str, np.ndarray]:
        """By field, uninitialized [count, ...]."""
        return {
            field.name: np.empty((count, *field.shape), np.dtype(field.dtype))
            for field in self.fields
        }

    def pack(self, rows: np.ndarray, values: Arrays) -> np.ndarray:
        """Records [n, size] uint8 of rows [n] with the first n values of each field."""
        count = len(rows)
        records = np.empty((count, self.size), np.uint8)
        first = 0
        for field in self.fields:
            array = np.ascontiguousarray(values[field.name][:count])
            if array.dtype != np.dtype(field.dtype) or array.shape[1:] != field.shape:
                raise ValueError(
                    f"{field.name} is {array.dtype} {array.shape}, expected {field.dtype} "
                    f"(n, {', '.join(map(str, field.shape))})"
                )
            last = first + field.num_bytes
            records[:, first:last] = array.view(np.uint8).reshape(count, field.num_bytes)
            first = last
        records[:, first:] = self._checksums(rows, records)
        return records

    def unpack(self, records: np.ndarray, out: Arrays, at: np.ndarray) -> None:
        """Copies the fields of records [n, size] to the places `at` [n] of `out`."""
        first = 0
        for field in self.fields:
            last = first + field.num_bytes
            part = np.ascontiguousarray(records[:, first:last]).view(np.dtype(field.dtype))
            out[field.name][at] = part.reshape(len(records), *field.shape)
            first = last

    def wrong(self, rows: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Which of the records [n, size] are not, whole, those of rows [n]."""
        found = records[:, self.row_bytes :]
        return np.flatnonzero((found != self._checksums(rows, records)).any(axis=1))

    def _checksums(self, rows: np.ndarray, records: np.ndarray) -> np.ndarray:
        size, length = self.size, self.row_bytes
        flat = records.reshape(-1).data
        sums = [
            zlib.crc32(flat[first : first + length], row)
            for first, row in zip(range(0, len(rows) * size, size), rows.tolist(), strict=True)
        ]
        return np.array(sums, _CHECKSUM).view(np.uint8).reshape(len(rows), _CHECKSUM.itemsize)
