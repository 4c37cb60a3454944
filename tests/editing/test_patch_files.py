"""Files of patches and rows that others made, or that were damaged: refused before the work."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from stem_jax import edit
from stem_jax.editing.patch import PatchStack
from stem_jax.editing.patch_file import read_patch
from stem_jax.editing.swaps import recipes_of
from stem_jax.errors import InputError
from stem_jax.memory.stem import StemMemory
from tests.saved_models import BYTES

METADATA = {"format": "stem_jax patch 1", "run": "r", "tokenizer": "t", "description": ""}


def _arrays(**changes):
    """Those of a patch of two tokens in three layers, rows of width 4."""
    rows = np.ones((2, 3, 4), np.float32)
    numbers = {"ids": np.array([5, 9], np.int32), "layers": np.array([0, 1, 2], np.int32)}
    return {**numbers, "before": rows, "after": 2 * rows, **changes}


def _write(path, metadata=METADATA, **changes):
    safetensors.numpy.save_file(_arrays(**changes), path, metadata)
    return path


def test_a_patch_comes_back(tmp_path):
    found = read_patch(_write(tmp_path / "x", ids=np.array([9, 5], np.uint64)))
    assert (found.ids.tolist(), found.ids.dtype, found.layers.dtype) == ([9, 5], "int32", "int32")
    assert (found.run, found.tokenizer) == ("r", "t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.array([5, 2**40])}, "ids has 1099511627776, which no model has"),
        ({"ids": np.array([5, -1])}, "ids has -1, which no model has"),
        ({"ids": np.array([5, 2**64 - 1], np.uint64)}, "ids has 18446744073709551615, which no"),
        ({"ids": np.array([5, 5])}, "ids has a number twice"),
        ({"ids": np.array([5.0, 9.0], np.float32)}, "ids is F32, it must be I8 or I16 or I32"),
        ({"ids": np.array([True, False])}, "ids is BOOL, it must be I8"),
        ({"ids": np.array([[5], [9]])}, "ids is int64[2, 1], it must be a list of integers"),
        ({"layers": np.array([0, 1, 2**33])}, "layers has 8589934592, which no model has"),
        ({"layers": np.array([0, 1, 1])}, "layers has a number twice"),
        (
            {"ids": np.zeros(0, np.int32), "before": np.zeros((0, 3, 4), np.float32)},
            "ids is int32[0], it must be a list of integers",
        ),
        ({"after": np.full((2, 3, 4), 1e300)}, "after is F64, it must be F32"),
        ({"after": np.full((2, 3, 4), np.inf, np.float32)}, "after has rows that are not finite"),
        ({"after": np.full((2, 3, 4), 3.4e38, np.float32)}, "after has rows that are not finite"),
        ({"before": np.full((2, 3, 4), np.nan, np.float32)}, "before has rows that are not finite"),
        ({"before": np.ones((2, 3, 5), np.float32)}, "before is (2, 3, 5), its 2 tokens and 3"),
        ({"after": np.ones(4, np.float32)}, "ask for one row of each; make the patch again"),
    ],
)
def test_arrays_that_are_refused(changes, message, tmp_path):
    with pytest.raises(InputError) as refused:
        read_patch(_write(tmp_path / "x", **changes))
    assert f"patch {tmp_path / 'x'}: " in str(refused.value)
    assert message in str(refused.value)


def test_dtypes_that_numpy_has_not(tmp_path):
    arrays = {name: torch.from_numpy(value) for name, value in _arrays().items()}
    for dtype, code in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.bfloat16, "BF16")):
        changed = arrays | {"after": arrays["after"].to(dtype)}
        safetensors.torch.save_file(changed, tmp_path / "x", METADATA)
        with pytest.raises(InputError, match=f"after is {code}, it must be F32"):
            read_patch(tmp_path / "x")
        row = {"row": torch.ones(4).to(dtype)}
        safetensors.torch.save_file(row, tmp_path / "row")
        with pytest.raises(InputError, match=f"row is {code}, it must be F32; make the file again"):
            recipes_of(BYTES, [], [f"^a=@{tmp_path / 'row'}"], "average")


def test_what_is_no_patch(tmp_path):
    _write(tmp_path / "other", {"format": "something"})
    safetensors.numpy.save_file({"ids": np.zeros(2, np.int32)}, tmp_path / "part", METADATA)
    for name in ("other", "part"):
        with pytest.raises(InputError, match=f"{name} is not a patch of stem_jax.edit"):
            read_patch(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        read_patch(tmp_path)


def test_tokens_that_the_model_has_not(tmp_path):
    model = StemMemory(9, 4, (0, 1, 2))
    patch = read_patch(_write(tmp_path / "x"))
    with pytest.raises(InputError, match="patch x writes the rows of token 9, the model has 9 tok"):
        PatchStack([patch], ("r",), "t", model)
    PatchStack([patch], ("r",), "t", StemMemory(10, 4, (0, 1, 2)))


def test_a_patch_that_cannot_be_saved_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    # No run is there to be read: the place comes first.
    flags = [f"--workdir={tmp_path / 'none'}", "--swap=a=>b"]
    for place in (tmp_path / "file" / "x", "/proc/none/x", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=r"--save=.* cannot be (created|written)"):
            edit.main([*flags, f"--save={place}"])
    with pytest.raises(InputError, match=r"--save=.* exists; choose another name"):
        edit.main([*flags, f"--save={tmp_path}"])
    assert [path.name for path in Path(tmp_path).iterdir()] == ["file"]
