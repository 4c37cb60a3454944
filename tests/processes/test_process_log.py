"""The file of what a process says."""

import pytest

from stem_jax.errors import InputError
from stem_jax.processes.process_log import log, log_path, process_log


def test_a_log_without_room_is_one_line_and_the_error_stays(tmp_path, capfd):
    path = log_path(tmp_path, 0)
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"^no room"), process_log(tmp_path, 0):
        log.info("a line")
        raise InputError("no room")
    out, err = capfd.readouterr()
    assert "a line" in out
    assert f"{path} lacks lines (No space left on device)" in err and "Traceback" not in err
