"""Copies of whole rows into arrays of rows, a row at a time and not a number at a time.

`array[places] = values` does the second where NumPy has no numbers of that kind itself, as of
bfloat16, in twice the time, and keeps all other threads of Python waiting.
"""

import math

import numpy as np


def put_rows(array: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
    """Does `array[places] = values`.

    Args:
        array: [N, ...], C-contiguous.
        places: [n] distinct integers in [0, N).
        values: [n, ...] of the array's dtype.

    Raises:
        ValueError: values of another shape or dtype.
    """
    if values.dtype != array.dtype or values.shape != (len(places), *array.shape[1:]):
        raise ValueError(
            f"{values.dtype} {values.shape} are not {len(places)} rows of {array.dtype} "
            f"{array.shape[1:]}"
        )
    np.put(_as_items(array), places, _as_items(np.ascontiguousarray(values)))


def _as_items(array: np.ndarray) -> np.ndarray:
    """[N] a view with the bytes of a row as one item."""
    numbers = math.prod(array.shape[1:])
    flat = array.view()
    # Assigned, as that never copies.
    flat.shape = (len(array), numbers)
    return flat.view(np.dtype((np.void, numbers * array.itemsize)))[:, 0]
