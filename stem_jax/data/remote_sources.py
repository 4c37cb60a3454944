"""Sources in buckets: token stores and files of text, copied to this machine before they are read.

A copy is of one version of all its objects, see `staging`; a store's is compared with the store's
own checksums, once, when it was downloaded.
"""

import glob
import re
from pathlib import Path

from stem_jax.bucket import list_objects, read_object
from stem_jax.data.token_store import META_FILE, TokenStore
from stem_jax.errors import InputError
from stem_jax.staging import staged
from stem_jax.storage import Place, is_remote, place

_TRAIN, _VALIDATION = (f"{split}/{META_FILE}" for split in ("train", "validation"))
# Of the stores that this process has opened; they stay what they are while it lives.
_stores: dict[str, Path] = {}


def source_path(source: str | Path, key: str = "data.sources") -> Path | None:
    """Where a source is on this machine: a path, or the copy of a token store in a bucket.

    None for what is in a bucket and no token store.

    Args:
        key: that the source was given by, or a flag, for messages.

    Raises:
        InputError: see `place` and `staged`; a store that does not match its checksums.
    """
    found = place(source, key)
    if not is_remote(found):
        return Path(found)
    name = str(found)
    if name not in _stores:
        if glob.has_magic(name) or read_object(found / _TRAIN) is None:
            return None
        _stores[name] = staged(
            found, key, wanted=_is_of_store, asked=(_TRAIN, _VALIDATION), check=_verify
        )
    return _stores[name]


def check_is_text(source: str, name: str = "") -> None:
    """Raises InputError for a folder of a bucket in which there are no stores.

    name: of the folder in messages, as for `sources.check_folder`.
    """
    address = place(source, "data.sources")
    if glob.has_magic(source) or not list_objects(address):
        return
    what = f"{name or f'source {source!r}'} is a folder without {_TRAIN}"
    pattern = "" if name else f", or give a file pattern, such as {source}/*.txt"
    raise InputError(f"{what}: run prepare{pattern}")


def text_files(pattern: Place) -> list[Path]:
    """Copies of the objects that a pattern of a bucket matches, by their names; none if none does.

    Raises:
        InputError: see `staged`.
    """
    parts = str(pattern).split("/")
    # Scheme, nothing and bucket come first.
    first = next((i for i in range(3, len(parts)) if glob.has_magic(parts[i])), len(parts) - 1)
    if first < 3:
        return []
    folder = place("/".join(parts[:first]), "input")
    matches = re.compile(_expression(parts[first:])).fullmatch
    if not any(matches(name) for name in list_objects(folder)):
        return []
    copy = staged(folder, "input", wanted=lambda name: matches(name) is not None)
    return [path for path in sorted(copy.rglob("*")) if path.is_file()]


def _is_of_store(name: str) -> bool:
    return name.partition("/")[0] in ("train", "validation", "tokenizer")


def _verify(folder: Path) -> None:
    for split in ("train", "validation"):
        if (folder / split).exists():
            TokenStore.open(folder / split, verify=True)


def _expression(parts: list[str]) -> str:
    """A pattern of files as a regular expression of names, as glob understands it."""
    found = ""
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            found += ".*" if last else "(?:.*/)?"
            continue
        # A star does not cross folders; a set is one of the two's alike.
        for piece in re.split(r"(\*|\?|\[!?\]?[^]]*\])", part):
            if piece == "*":
                found += "[^/]*"
            elif piece == "?":
                found += "[^/]"
            elif piece.startswith("[") and piece.endswith("]") and len(piece) > 2:
                body = piece[1:-1].replace("\\", "\\\\")
                found += f"[^/{body[1:]}]" if body.startswith("!") else f"[{body}]"
            else:
                found += re.escape(piece)
        found += "" if last else "/"
    return found
