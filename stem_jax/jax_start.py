"""What a program settles before it imports JAX, which flags and `--help` do without."""

import os
import sys
from pathlib import Path

from stem_jax.compilation_cache import keep_programs
from stem_jax.cuda_plugin import hide_cuda_plugin

# Files that a TPU of this machine has: its devices, or its entry on the PCI bus.
_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_PCI_VENDORS = "/sys/bus/pci/devices/*/vendor"
_GOOGLE = "0x1ae0"


def start_jax(cache: bool = True, cache_folder: Path | None = None) -> None:
    """Call it after the flags are parsed and before JAX is imported.

    cache: keep compiled programs, in `cache_folder` or that of the user. Changes `jax.config`.
    """
    if "jax" not in sys.modules and not _tpu_expected():
        # libtpu comes with `jax[tpu]`, for plans; on a machine without a TPU each start would
        # begin with its error messages. JAX takes a module that is None for one not installed.
        sys.modules.setdefault("libtpu", None)  # type: ignore[arg-type]  # as the import system has it
    hide_cuda_plugin()
    keep_programs(cache, cache_folder)


def _tpu_expected() -> bool:
    """Whether there is a TPU, or somebody says so."""
    names = [name for name in os.environ if name.startswith(("TPU_", "LIBTPU_"))]
    if names or os.environ.get("JAX_PLATFORMS") or "JAX_FORCE_TPU_INIT" in os.environ:
        return True
    if any(_matches(pattern) for pattern in _TPU_DEVICES):
        return True
    vendors = (path.read_text().strip() for path in _matches(_PCI_VENDORS))
    return _GOOGLE in vendors


def _matches(pattern: str) -> list[Path]:
    return list(Path("/").glob(pattern.removeprefix("/")))
