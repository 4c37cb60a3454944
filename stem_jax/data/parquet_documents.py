"""The texts of a Parquet file, row group by row group."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stem_jax.data.packing import one_line, optional
from stem_jax.errors import BadRecord, InputError

_BATCH_ROWS = 1024


def read_parquet(path: Path, text_field: str) -> Iterator[tuple[Any, str] | BadRecord]:
    """(value, `file#row`) of a column, or why it has none.

    Raises InputError for a file that is no Parquet, or has no such column.
    """
    optional("pyarrow", f"input file {path}")
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise InputError(
                    f"input file {path} has no column {text_field!r}: set --text-field"
                    f" (data.text_field) to one of {', '.join(map(repr, columns))}"
                )
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(
                    _BATCH_ROWS, row_groups=[group], columns=[text_field]
                ):
                    for value in _values(batch.column(0)):
                        where = f"{path}#{row}"
                        row += 1
                        yield (
                            _not_utf8(value, where)
                            if isinstance(value, UnicodeDecodeError)
                            else (value, where)
                        )
    except (arrow.ArrowException, OSError) as error:
        raise InputError(
            f"input file {path} is not a readable Parquet file ({one_line(error)}): fetch it again"
        ) from error


def _values(column: Any) -> list[Any]:
    """The values of a column; for bytes that are not UTF-8, the error."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _not_utf8(error: UnicodeDecodeError, where: str) -> BadRecord:
    return BadRecord(
        f"{where} is not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start} of"
        " the text; write the column as UTF-8",
        where,
    )
