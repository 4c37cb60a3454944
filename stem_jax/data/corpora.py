"""Built-in corpora, for a first run without a download.

`pydoc` and `stdlib` are read from the running Python: their text depends on its version.
"""

import ast
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from stem_jax.data.facts import (
    read_changed_documents,
    read_fact_documents,
    read_unchanged_documents,
)
from stem_jax.data.needles import read_name_pairs, read_needles, read_roll_calls
from stem_jax.errors import InputError

BUILTIN = (
    "pydoc",
    "stdlib",
    "facts",
    "facts_changed",
    "facts_unchanged",
    "needles",
    "roll_calls",
    "name_pairs",
)

# Tests are data and repetition rather than prose or programs; packages differ between machines.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
)
# Characters. Over a hundred generated codec modules say one and the same line.
_MIN_DOCUMENTATION = 200
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def read_corpus(name: str) -> Iterator[str]:
    """Yields the documents of a built-in corpus, in the same order every time.

    name: one of BUILTIN. Raises InputError for another name, or if this Python carries no sources.
    """
    readers = {
        "pydoc": _read_pydoc,
        "stdlib": _read_stdlib,
        "facts": read_fact_documents,
        "facts_changed": read_changed_documents,
        "facts_unchanged": read_unchanged_documents,
        "needles": read_needles,
        "roll_calls": read_roll_calls,
        "name_pairs": read_name_pairs,
    }
    if name not in readers:
        raise InputError(f"corpus {name!r} is not built in: use one of {', '.join(BUILTIN)}")
    return readers[name]()


def _read_stdlib() -> Iterator[str]:
    for _, source in _stdlib_sources():
        yield source


def _read_pydoc() -> Iterator[str]:
    # A module of literals without side effects; imported late because it is half a megabyte.
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield _unindented(topics.topics[name])
    for path, source in _stdlib_sources():
        document = _module_documentation(path, source)
        if document is not None:
            yield _unindented(document)


def _unindented(text: str) -> str:
    """The text without indentation, and with single spaces.

    Runs of spaces are a thirtieth of these documents' bytes but a tenth of their tokens, and what a
    small model learns first.
    """
    return re.sub(r"^ +", "", re.sub(r"[ \t]+", " ", text), flags=re.MULTILINE)


def _stdlib_sources() -> Iterator[tuple[Path, str]]:
    """(path below the standard library's folder, source text) of every module, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = False
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        try:
            with tokenize.open(path) as file:
                source = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # files for other Pythons, kept on purpose
        if source.strip():
            found = True
            yield relative, source
    if not found:
        raise InputError(
            f"the standard library folder {root} holds no .py files: use a Python that ships its"
            " sources, or give text with --input"
        )


def _module_documentation(path: Path, source: str) -> str | None:
    """A module's docstrings in source order under their signatures; None if there is little."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in old modules
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    parts = path.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    document = "\n\n".join([f"module {name}", *_docstrings(tree, "")]) + "\n"
    return document if len(document) >= _MIN_DOCUMENTATION else None


def _docstrings(node: ast.AST, prefix: str) -> Iterator[str]:
    if isinstance(node, _Documented):
        docstring = ast.get_docstring(node)
        if docstring:
            header = _signature(node, prefix)
            yield f"{header}\n{docstring}" if header else docstring
        if isinstance(node, ast.ClassDef):
            prefix = f"{prefix}{node.name}."
        for child in ast.iter_child_nodes(node):
            yield from _docstrings(child, prefix)


def _signature(node: _Documented, prefix: str) -> str:
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}" + (f"({bases})" if bases else "")
    return f"{prefix}{node.name}({ast.unparse(node.args)})"
