"""What machine this is, as records name it."""

import platform
from pathlib import Path


def cpu_model() -> str:
    """The name of this machine's processor, as its system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
