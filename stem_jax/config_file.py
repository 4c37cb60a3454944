"""A config file: a Python file with `get_config()`, run with the `configs` package beside it."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stem_jax.errors import InputError

_PACKAGE = "configs"


def read_config_file(path: Path) -> dict[str, dict[str, Any]]:
    """What the file's `get_config()` returns, as plain values.

    It imports its base as `configs.base`: that of its own checkout, wherever it is called from, and
    else the one that is installed or in the working directory.

    Raises:
        InputError: no such file, not Python, or a program that fails.
    """
    if not path.is_file():
        raise InputError(f"config file {path} does not exist; see configs/ for the shipped ones")
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config file {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with _beside(path):
            spec.loader.exec_module(module)
            return module.get_config().to_dict()
    # A config file is the user's program and may fail in any way.
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        raise InputError(
            f"config file {path}: {type(error).__name__}: {message}; every key is declared in "
            "configs/base.py"
        ) from error


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Imports of `configs` find the package of the file's checkout, if it is in one."""
    folders = path.resolve().parents[:2]
    roots = [root for root in reversed(folders) if (root / _PACKAGE / "base.py").is_file()]
    if not roots:
        yield
        return
    before, others = list(sys.path), _modules()
    # Another checkout's may have been imported before.
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(roots[0]))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
        for name in _modules():
            del sys.modules[name]
        sys.modules.update(others)


def _modules() -> dict[str, Any]:
    return {
        name: module
        for name, module in sys.modules.items()
        if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")
    }
