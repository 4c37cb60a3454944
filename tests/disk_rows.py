"""Rows on disk for tests: small records, values that tell row and version, small files."""

import os

import numpy as np

from stem_jax.tables import data_files, disk_index
from stem_jax.tables.row_record import RecordField, RowRecord

# [S, columns] = [2, 3] of bfloat16, as a block with row-wise moments has them.
RECORD = RowRecord(
    (
        RecordField("rows", "bfloat16", (2, 3)),
        RecordField("v", "float32", (2,)),
        RecordField("last_step", "int32", ()),
    )
)
MANY = 2**31 - 1


def values_of(rows, versions, record: RowRecord = RECORD) -> dict[str, np.ndarray]:
    """What rows [n] hold in their versions [n], or one version for all."""
    rows = np.asarray(rows, np.int64)
    versions = np.broadcast_to(np.asarray(versions, np.int64), rows.shape)
    values = record.empty(len(rows))
    for field in record.fields:
        mixed = (rows * 31 + versions * 17) % 251 if field.name != "last_step" else versions
        values[field.name][...] = mixed.reshape(-1, *[1] * len(field.shape))
    return values


def assert_versions(found: dict[str, np.ndarray], rows, versions) -> None:
    """The first n of each field are those of rows [n] in their versions."""
    expected = values_of(rows, versions)
    for name, array in expected.items():
        np.testing.assert_array_equal(
            found[name][: len(rows)].astype(np.float32), array.astype(np.float32), err_msg=name
        )


def make_small(monkeypatch) -> None:
    """Data files of 32 records, which grow by 4 to 16, and an index that grows from 4 rows.

    Nothing waits for the disk: what a crash of the machine leaves no test sees.
    """
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(data_files, "_FILE_BYTES", 32 * RECORD.size)
    monkeypatch.setattr(data_files, "_LEAST_STEP", 4 * RECORD.size)
    monkeypatch.setattr(data_files, "_MOST_STEP", 16 * RECORD.size)
    monkeypatch.setattr(disk_index, "_FEWEST", 4)
