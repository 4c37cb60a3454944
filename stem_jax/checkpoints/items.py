"""What a checkpoint consists of: its items, each in a folder of its own."""

import contextlib
from pathlib import Path

from stem_jax.errors import InputError
from stem_jax.files import read_json
from stem_jax.memory.memory import STEM, prefix

PLAIN_ITEMS = ("data", "config", "layout")
ITEMS = ("params", "opt_state", *PLAIN_ITEMS)
# What Orbax calls the file of a plain item.
_JSON = "metadata"


def table_items(name: str) -> tuple[str, str]:
    """The items of a memory's rows, and of what their optimizer keeps."""
    return f"{prefix(name)}_rows", f"{prefix(name)}_{'slots' if name == STEM else 'moments'}"


def plain_item(folder: Path, item: str) -> dict | None:
    """The object of a plain item; None without its file, or if that holds anything else."""
    with contextlib.suppress(InputError):
        found = read_json(folder / item / _JSON)
        return found if isinstance(found, dict) else None
    return None
