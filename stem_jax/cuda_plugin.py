"""JAX's CUDA plugin on machines without a GPU: out of the way of runs, at hand for plans.

Installed, it prints 25 lines of errors at every start of JAX: its libraries look for a driver
as soon as they are imported, and then it asks for the version of CUDA.
"""

import contextlib
import importlib
import os
import sys
import types
from pathlib import Path

# Two packages, one for each version of CUDA: libraries that JAX imports, and the plugin proper.
_LIBRARIES = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
# Devices of the driver: of cards, of modules for embedded systems, of Windows' Linux.
_DEVICES = ("nvidia*", "nvhost*", "nvmap", "dxg")


class _NoPlugin(types.ModuleType):
    """Stands where JAX looks for the plugin."""

    def initialize(self) -> None:
        """What JAX asks of each plugin."""


def hide_cuda_plugin() -> None:
    """Call it before JAX is imported; does nothing where there may be a GPU or is no plugin."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    named = "cuda" in platforms or "gpu" in platforms
    driven = not platforms and any(any(Path("/dev").glob(name)) for name in _DEVICES)
    if "jax" in sys.modules or named or driven:
        return
    # JAX takes a module that is None for one not installed.
    for name in _LIBRARIES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # as the import system has it
    for name in _PLUGINS:
        sys.modules.setdefault(name, _NoPlugin(name))


def show_cuda_plugin() -> None:
    """Undoes `hide_cuda_plugin`, once programs are to be compiled for GPUs."""
    hidden = [name for name in _PLUGINS if isinstance(sys.modules.get(name), _NoPlugin)]
    if hidden:
        # JAX looks for plugins once: what it finds later would be taken in a second time.
        importlib.import_module("jax").devices("cpu")
    for name in _LIBRARIES:
        if sys.modules.get(name, "") is None:
            del sys.modules[name]
    for name in hidden:
        del sys.modules[name]
        with contextlib.suppress(ModuleNotFoundError), _no_messages():
            importlib.import_module(name).initialize()


@contextlib.contextmanager
def _no_messages():
    """Without what libraries write to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
