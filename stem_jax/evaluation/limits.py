"""How much is asked for, and how much at a time."""

from stem_jax.errors import InputError

# Of a needle in its haystack; 0 is the beginning.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def check_limit(limit: int | None, items: str) -> None:
    """Refuses a --limit without items; None is all of them.

    Raises:
        InputError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit={limit} must be at least 1; leave it out for all {items}")


def check_batch_size(batch_size: int) -> None:
    """Refuses a batch without sequences.

    Raises:
        InputError: the size is below 1.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size={batch_size} must be at least 1")
