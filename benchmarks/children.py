"""Programs that a benchmark starts: they compile anew, and leave the user's cache alone."""

import os

# JAX's own name for it.
_COMPILE_ANEW = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: this one's and `more`."""
    return {**os.environ, **_COMPILE_ANEW, **more}
