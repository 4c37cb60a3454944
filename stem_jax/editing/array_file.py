"""Arrays that an edit needs, from a safetensors file that a user names."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from stem_jax.errors import InputError

FLOAT32 = ("F32",)
INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


def read_arrays(
    path: str | Path, where: str, codes: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Some arrays of a file, and its metadata; arrays that the file has not are left out.

    Args:
        where: for messages: "patch edits/spain.safetensors".
        codes: the dtypes that each array may have, as the format names them.

    Raises:
        InputError: no such file, a damaged one, or an array of another dtype.
    """
    try:
        with safe_open(path, "numpy") as file:
            arrays, metadata = {}, file.metadata() or {}
            for name in codes.keys() & set(file.keys()):
                found = file.get_slice(name).get_dtype()
                if found not in codes[name]:
                    raise InputError(
                        f"{where}: {name} is {found}, it must be {' or '.join(codes[name])}; make "
                        "the file again"
                    )
                arrays[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{where} cannot be read ({error}); check the path") from error
    return arrays, metadata


def check_rows(rows: np.ndarray, where: str, remedy: str) -> None:
    """Raises InputError for rows that a model would read as infinite or as no number.

    They travel in the compute dtype: the largest floats of 32 bits are infinite in bfloat16.

    where: begins the message, with its verb. remedy: ends it.
    """
    with np.errstate(over="ignore"):
        narrow = rows.astype(ml_dtypes.bfloat16)
    if not np.isfinite(narrow.astype(np.float32)).all():
        raise InputError(f"{where} rows that are not finite, or not in bfloat16; {remedy}")
