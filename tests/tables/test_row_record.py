"""A row as bytes: every field of every format comes back bit for bit, and only whole."""

import ml_dtypes
import numpy as np
import pytest

from stem_jax.tables.row_record import RowRecord
from tests.disk_rows import RECORD, values_of
from tests.tables.test_row_optimizer import make_spec

FORMATS = {
    (row_format, moments): {"row_format": row_format, "moments": moments}
    for row_format in ("float32", "bfloat16")
    for moments in ("adamw", "rowwise")
}


@pytest.mark.parametrize("name", FORMATS, ids=" ".join)
def test_any_bits_come_back(name):
    spec = make_spec(**FORMATS[name])
    record = RowRecord.of(spec, spec.width // 2)
    assert record.names == tuple(field.name for field in spec.fields)
    rng = np.random.default_rng(0)
    values = {
        # Also those that are no numbers.
        field.name: rng.integers(0, 256, (9, field.num_bytes), np.uint8)
        .view(np.dtype(field.dtype))
        .reshape(9, *spec.shape(field.name, 1, spec.width // 2)[1:])
        for field in record.fields
    }
    rows = rng.permutation(2**31 - 1 - np.arange(7))
    packed = record.pack(rows, values)
    assert packed.shape == (7, record.size) and not len(record.wrong(rows, packed))
    out = record.empty(9)
    at = rng.permutation(9)[:7]
    record.unpack(packed, out, at)
    for field, array in out.items():
        assert array[at].tobytes() == values[field][:7].tobytes()


def test_bytes_of_a_row():
    """128 numbers of bfloat16 with a v and a step."""
    record = RowRecord.of(make_spec(row_format="bfloat16", moments="rowwise"), 128)
    vectors = record.fields[0].shape[0]
    assert record.row_bytes == vectors * (2 * 128 + 4) + 4
    assert record.size == record.row_bytes + 4
    assert RowRecord.of(make_spec(), 128, ["rows"]).row_bytes == vectors * 4 * 128


def test_each_byte_and_the_number_count():
    rows = np.array([3, 4])
    packed = RECORD.pack(rows, values_of(rows, 1))
    for byte in range(RECORD.size):
        torn = packed.copy()
        torn[1, byte] ^= 16
        assert RECORD.wrong(rows, torn).tolist() == [1]
    assert RECORD.wrong(rows[::-1], packed).tolist() == [0, 1]
    assert RECORD.wrong(rows, np.zeros_like(packed)).tolist() == [0, 1]


def test_values_of_another_format_are_no_record():
    rows = np.arange(2)
    values = values_of(rows, 1)
    with pytest.raises(ValueError, match=r"rows is float32 \(2, 2, 3\), expected bfloat16 \(n, 2,"):
        RECORD.pack(rows, values | {"rows": np.zeros((2, 2, 3), np.float32)})
    with pytest.raises(ValueError, match=r"v is float32 \(2, 1\), expected float32 \(n, 2\)"):
        RECORD.pack(rows, values | {"v": np.zeros((2, 1), np.float32)})
    assert RECORD.empty(1)["rows"].dtype == ml_dtypes.bfloat16
