"""A config file as a Python program: found by path or name, run with a `configs` package."""

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from stem_jax.errors import InputError

_PACKAGE = "configs"
# The folder that holds `configs`: a wheel has it in this package, a checkout beside it.
_HERE = Path(__file__).resolve().parent
_SHIPPED = _HERE if (_HERE / _PACKAGE).is_dir() else _HERE.parent


def read_config_file(path: Path) -> dict[str, dict[str, Any]]:
    """What the file's `get_config()` returns, as plain values.

    It imports its base as `configs.base`: that of its own checkout, wherever it is called from,
    else that in the working directory, else the one that came with this package.

    path: the file, or the name of a shipped one, such as `tiny`.

    Raises:
        InputError: no such file or name, not Python, or a program that fails.
    """
    path = _found(path)
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config file {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with _base_of(path):
            spec.loader.exec_module(module)
            return module.get_config().to_dict()
    # A config file is the user's program and may fail in any way.
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        raise InputError(
            f"config file {path}: {type(error).__name__}: {message}; every key is declared in "
            "configs/base.py"
        ) from error


def _found(path: Path) -> Path:
    # A file must end in .py, so a bare name is none.
    if len(path.parts) == 1 and path.suffix != ".py":
        shipped = _SHIPPED / _PACKAGE / f"{path}.py"
        if shipped.is_file():
            return shipped
    if path.is_file():
        return path
    names = sorted(file.stem for file in (_SHIPPED / _PACKAGE).glob("[!_]*.py"))
    close = difflib.get_close_matches(path.stem, names, n=1)
    meant = f"did you mean --config={close[0]}? " if close else ""
    raise InputError(f"config file {path} does not exist; {meant}known by name: {', '.join(names)}")


@contextlib.contextmanager
def _base_of(path: Path) -> Iterator[None]:
    """Imports of `configs` find the package that is the file's, whatever else has that name."""
    importlib.invalidate_caches()
    folders = [*reversed(path.resolve().parents[:2]), Path(), _SHIPPED]
    roots = [folder for folder in folders if (folder / _PACKAGE / "base.py").is_file()]
    spec = PathFinder.find_spec(_PACKAGE, [str(roots[0])]) if roots else None
    if spec is None or spec.loader is None:
        # The file may not need any.
        yield
        return
    before, others = list(sys.path), _modules()
    # Another checkout's may have been imported before.
    for name in others:
        del sys.modules[name]
    # Inside this package lie names such as `data`, which no config file means.
    if roots[0] != _HERE:
        sys.path.insert(0, str(roots[0].resolve()))
    package = sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
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
