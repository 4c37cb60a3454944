"""A config file as a Python program: found by path or name, run with a `configs` package."""

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar

from stem_jax.errors import InputError

Result = TypeVar("Result")
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
    path = found_program(path, "config file", "--config=")
    return run_program(path, "config file", lambda module: module.get_config().to_dict())


def run_program(path: Path, what: str, use: Callable[[Any], Result]) -> Result:
    """Runs a Python file with the `configs` package beside it, and gives what `use` makes of it.

    Args:
        path: the file.
        what: it is called in errors.
        use: takes the module; `configs` is still that of the file then.

    Raises:
        InputError: not Python, or a program that fails.
    """
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{what} {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        with _base_of(path):
            spec.loader.exec_module(module)
            return use(module)
    except InputError as error:
        raise InputError(f"{what} {path}: {error}") from error
    # It is the user's program and may fail in any way.
    except Exception as error:
        message = " ".join(str(error).split())[:300]
        raise InputError(
            f"{what} {path}: {type(error).__name__}: {message}; every key is declared in "
            "configs/base.py"
        ) from error


def found_program(path: Path, what: str, flag: str, folder: str = "") -> Path:
    """The file that a path is, or the shipped one that it names.

    Args:
        what: it is called in errors.
        flag: that says it, such as `--config=`.
        folder: in `configs`, whose files are known by name.

    Raises:
        InputError: there is neither.
    """
    shipped = _SHIPPED / _PACKAGE / folder
    # A file must end in .py, so a bare name is none.
    if len(path.parts) == 1 and path.suffix != ".py":
        named = shipped / f"{path}.py"
        if named.is_file():
            return named
    if path.is_file():
        return path
    names = sorted(file.stem for file in shipped.glob("[!_]*.py"))
    close = difflib.get_close_matches(path.stem, names, n=1)
    meant = f"did you mean {flag}{close[0]}? " if close else ""
    raise InputError(f"{what} {path} does not exist; {meant}known by name: {', '.join(names)}")


@contextlib.contextmanager
def _base_of(path: Path) -> Iterator[None]:
    """Imports of `configs` find the package that is the file's, whatever else has that name."""
    importlib.invalidate_caches()
    parents = path.resolve().parents
    own = [above.parent for above in parents if above.name == _PACKAGE]
    folders = [*own, *reversed(parents[:2]), Path(), _SHIPPED]
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
