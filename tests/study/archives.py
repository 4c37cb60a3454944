"""Small source archives, made up, with recipes that name them."""

import hashlib
import io
import tarfile
from pathlib import Path

from stem_jax.study.recipes import Package, TextRecipe

_WORDS = (
    "river stone garden winter letter morning window copper forest island market silver".split()
)


def prose(seed: int, words: int = 240) -> str:
    """Plain words, of which 13 in a row differ between seeds."""
    state, said = seed * 7919 + 1, []
    for _ in range(words):
        state = (state * 1103515245 + 12345) % 2**31
        said.append(_WORDS[(state >> 16) % len(_WORDS)])
    return " ".join(said) + ".\n"


def archive(folder: Path, split: str, name: str, files: dict[str, str | bytes]) -> Package:
    """An archive of those files below a top folder, in a cache folder."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as made:
        for path, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(f"{name}-1.0/{path}")
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    folder.mkdir(exist_ok=True, parents=True)
    file = f"{name}-1.0.tar.gz"
    (folder / file).write_bytes(raw.getvalue())
    digest = hashlib.sha256(raw.getvalue()).hexdigest()
    return Package(split, name, "1.0", "MIT", ("docs/*",), file, digest)


def recipe(*packages: Package) -> TextRecipe:
    return TextRecipe("prose", packages)
