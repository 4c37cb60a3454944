"""What a folder of checkpoints is refused for."""

import errno

import numpy as np
import pytest
import tensorstore

from stem_jax.checkpoints.refusals import writing
from stem_jax.errors import InputError


def test_what_tensorstore_meets_in_the_system_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    base = {"driver": "file", "path": f"{file}/array/"}
    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base}}
    why = r"^cannot write a checkpoint to .*: Not a directory; free space, or [^\n]*$"
    with pytest.raises(InputError, match=why), writing(tmp_path):
        array = tensorstore.open(spec, create=True, dtype="float32", shape=[4]).result()
        array.write(np.ones(4, np.float32)).result()


def test_a_mistake_of_the_program_and_a_refusal_stay_as_they_are(tmp_path):
    with pytest.raises(ValueError, match=r"^of another kind$"), writing(tmp_path):
        raise ValueError("of another kind")
    with pytest.raises(InputError, match=r"^a refusal$"), writing(tmp_path):
        raise InputError("a refusal")


def test_waiting_for_another_process_is_not_a_refusal(tmp_path):
    """Which a launcher would take for the end."""
    with pytest.raises(TimeoutError, match="while waiting"), writing(tmp_path):
        raise TimeoutError("Timed out while waiting for a barrier.")
    with pytest.raises(InputError, match="Connection timed out"), writing(tmp_path):
        raise OSError(errno.ETIMEDOUT, "Connection timed out")
