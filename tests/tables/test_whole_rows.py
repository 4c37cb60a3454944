"""Rows copied whole: what NumPy's own assignment gives, for every type and shape."""

import ml_dtypes
import numpy as np
import pytest

from stem_jax.tables.whole_rows import put_rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_puts_what_an_assignment_does(dtype, shape, count):
    rng = np.random.default_rng(count)
    array = rng.normal(0, 100, (20, *shape)).astype(dtype)
    # Every second one: their bytes do not lie side by side.
    values = rng.normal(0, 100, (2 * count, *shape)).astype(dtype)[::2]
    places = rng.permutation(20)[:count]
    expected = array.copy()
    expected[places] = values
    put_rows(array, places, values)
    assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "values",
    [np.zeros((2, 4), np.float32), np.zeros((3, 4), ml_dtypes.bfloat16), np.zeros((2, 5), "int16")],
    ids=["dtype", "rows", "width"],
)
def test_values_of_another_form_are_refused(values):
    array = np.zeros((8, 4), ml_dtypes.bfloat16 if len(values) == 3 else np.int16)
    with pytest.raises(ValueError, match="are not 2 rows of"):
        put_rows(array, np.array([1, 2]), values)
    assert not array.any()
