"""launch/local_multihost.sh with processes that end at once."""

import os
import signal
import subprocess

import pytest

from tests.children import ROOT


# Which of them bash hears of while it does not wait is chance.
@pytest.mark.parametrize("_", range(3))
def test_it_ends_when_all_are_killed_at_once(_, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nsleep 0.5\nkill -9 $$\n")
    program.chmod(0o755)
    settings = {"PYTHON": str(program), "COORDINATOR_PORT": "1", "GRACE_SECONDS": "3"}
    script = subprocess.Popen(
        ["launch/local_multihost.sh", "8", "--config=any"],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert script.wait(60) == 128 + signal.SIGKILL
    finally:
        # A trap keeps it from ending by anything else.
        script.kill()
