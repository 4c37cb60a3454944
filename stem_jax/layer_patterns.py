"""Which layers a text in a configuration names: a pattern, or indices."""

from stem_jax.errors import InputError

_PATTERNS = {
    "none": lambda n: (),
    "third": lambda n: tuple(range(1, n, 3)),
    "half": lambda n: tuple(range(1, n, 2)),
    "all_but_first": lambda n: tuple(range(1, n)),
    "all": lambda n: tuple(range(n)),
}


def layer_indices(key: str, value: str | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """The layers that the value of a key names, of so many; indices as they are, unchecked.

    Raises:
        InputError: neither a pattern nor indices.
    """
    if value in _PATTERNS:
        return _PATTERNS[value](num_layers)
    if isinstance(value, str):
        try:
            parts = value.strip("()[] ").split(",")
            return tuple(int(part) for part in parts if part.strip())
        except ValueError:
            raise InputError(
                f"{key}={value!r} is neither one of {', '.join(_PATTERNS)} nor "
                "comma-separated layer indices such as 1,3"
            ) from None
    return tuple(value)
