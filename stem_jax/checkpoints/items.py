"""What a checkpoint consists of: its items, each in a folder of its own."""

import contextlib

from stem_jax.bucket import read_file
from stem_jax.errors import InputError
from stem_jax.files import parse_json
from stem_jax.memory.memory import STEM, prefix
from stem_jax.storage import Place

PLAIN_ITEMS = ("data", "config", "layout")
ITEMS = ("params", "opt_state", *PLAIN_ITEMS)
# What Orbax calls the file of a plain item.
_JSON = "metadata"


def table_items(name: str) -> tuple[str, str]:
    """The items of a memory's rows, and of what their optimizer keeps."""
    return f"{prefix(name)}_rows", f"{prefix(name)}_{'slots' if name == STEM else 'moments'}"


def plain_item(folder: Place, item: str) -> dict | None:
    """The object of a plain item; None without its file, or if that holds anything else.

    Raises:
        InputError: see `bucket_errors`.
    """
    try:
        content = read_file(folder / item / _JSON)
    except OSError:
        return None
    with contextlib.suppress(InputError):
        found = parse_json(content, item)
        return found if isinstance(found, dict) else None
    return None
