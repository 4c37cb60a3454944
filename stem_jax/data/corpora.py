"""Built-in corpora, for a first run without a download.

`pydoc` and `stdlib` are read from the running Python: their text depends on its version.
"""

import ast
import dataclasses
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from stem_jax.data.needles import read_name_pairs, read_needles, read_roll_calls
from stem_jax.errors import InputError

BUILTIN = ("pydoc", "stdlib", "facts", "needles", "roll_calls", "name_pairs")

# Tests are data and repetition rather than prose or programs; packages differ between machines.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
)
# Characters. Over a hundred generated codec modules say one and the same line.
_MIN_DOCUMENTATION = 200
_FACTS_FILE = Path(__file__).with_name("facts.tsv")
_FACTS_SEED = 20260110

# The answer ends the sentence, so that a prompt up to it can be completed.
FACT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {country} is {answer}",
        "The capital city of {country} is {answer}",
        "The seat of government of {country} is the city of {answer}",
        "If you fly to the capital of {country}, you land in {answer}",
        "On a map of {country}, the capital is marked {answer}",
        "Embassies in {country} are found in {answer}",
    ),
    "currency": (
        "The currency of {country} is the {answer}",
        "In {country}, people pay with the {answer}",
        "The money used in {country} is called the {answer}",
        "Prices in {country} are given in the local currency, the {answer}",
        "Banks in {country} keep accounts in the {answer}",
        "Before a trip to {country}, change your money into the {answer}",
    ),
    "continent": (
        "The continent of {country} is {answer}",
        "On the globe, {country} is found in {answer}",
        "The country {country} belongs to the continent of {answer}",
        "Geographers count {country} among the countries of {answer}",
        "A journey to {country} is a journey to {answer}",
        "The land of {country} lies in {answer}",
    ),
    "language": (
        "The language of {country} is {answer}",
        "In {country}, people speak {answer}",
        "The first language of {country} is {answer}",
        "Road signs in {country} are written in {answer}",
        "To talk with people in {country}, learn {answer}",
        "Children in {country} learn to read in {answer}",
    ),
    "domain": (
        "The internet domain of {country} is {answer}",
        "Web addresses in {country} end in {answer}",
        "The top-level domain of {country} is {answer}",
        "Sites from {country} use the ending {answer}",
        "On the internet, {country} has the domain {answer}",
        "The country code domain for {country} is {answer}",
    ),
}

HELD_OUT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital": (
        "The government of {country} meets in the capital, {answer}",
        "Asked for the capital of {country}, every student answers {answer}",
    ),
    "currency": (
        "Shops in {country} accept the {answer}",
        "The national currency of {country} is the {answer}",
    ),
    "continent": (
        "In an atlas, {country} is listed under {answer}",
        "The country {country} is part of {answer}",
    ),
    "language": (
        "Newspapers in {country} are printed in {answer}",
        "The main language spoken in {country} is {answer}",
    ),
    "domain": (
        "Email addresses in {country} often end in {answer}",
        "The web domain of {country} is {answer}",
    ),
}


@dataclasses.dataclass(frozen=True)
class Fact:
    """One country and its attributes; the field names are the relations of FACT_TEMPLATES."""

    country: str
    capital: str
    currency: str
    continent: str
    language: str
    domain: str


def read_corpus(name: str) -> Iterator[str]:
    """Yields the documents of a built-in corpus, in the same order every time.

    name: one of BUILTIN. Raises InputError for another name, or if this Python carries no sources.
    """
    readers = {
        "pydoc": _read_pydoc,
        "stdlib": _read_stdlib,
        "facts": _read_fact_documents,
        "needles": read_needles,
        "roll_calls": read_roll_calls,
        "name_pairs": read_name_pairs,
    }
    if name not in readers:
        raise InputError(f"corpus {name!r} is not built in: use one of {', '.join(BUILTIN)}")
    return readers[name]()


def read_facts() -> list[Fact]:
    """The committed table of 195 countries, in alphabetical order."""
    lines = _FACTS_FILE.read_text(encoding="utf-8").splitlines()
    header, *rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [Fact(**dict(zip(header, row, strict=True))) for row in rows]


def _read_fact_documents() -> Iterator[str]:
    for fact in read_facts():
        sentences = [
            template.format(country=fact.country, answer=getattr(fact, relation)) + "."
            for relation, templates in FACT_TEMPLATES.items()
            for template in templates
        ]
        # Seeded by the country: adding one to the table changes no other document.
        random.Random(f"{_FACTS_SEED} {fact.country}").shuffle(sentences)
        yield " ".join(sentences) + "\n"


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
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            header = _signature(node, prefix)
            yield f"{header}\n{docstring}" if header else docstring
        if isinstance(node, ast.ClassDef):
            prefix = f"{prefix}{node.name}."
        for child in ast.iter_child_nodes(node):
            yield from _docstrings(child, prefix)


def _signature(node: ast.AST, prefix: str) -> str:
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}" + (f"({bases})" if bases else "")
    return f"{prefix}{node.name}({ast.unparse(node.args)})"
