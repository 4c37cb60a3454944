"""What a folder of checkpoints is refused for, on this machine or in a bucket."""

import contextlib
import os
import re
from collections.abc import Iterator

from stem_jax.bucket_errors import bucket_errors, explain
from stem_jax.errors import InputError
from stem_jax.storage import Place, is_remote

# How TensorStore, whose errors are of one kind, says which one of the system's it met.
_OF_SYSTEM = re.compile(r"\[os_error_code='(\d+)'\]")


@contextlib.contextmanager
def writing(folder: Place) -> Iterator[None]:
    """While checkpoints are written to a folder.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with bucket_errors(folder):
            yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = _of_system(error)
        if reason is None:
            raise
        raise InputError(
            f"cannot write a checkpoint to {folder}: {reason}; free space, or choose another "
            "--workdir"
        ) from error


def _of_system(error: OSError | ValueError) -> str | None:
    """What the system says; None for a mistake of the program, and for another process's delay."""
    if isinstance(error, TimeoutError) and error.errno is None:
        return None
    if isinstance(error, OSError):
        return str(error.strerror or error)
    found = _OF_SYSTEM.search(str(error))
    return os.strerror(int(found[1])) if found else None


def damaged(checkpoint: Place, reason: str) -> InputError:
    """The refusal of a checkpoint that is not whole."""
    return InputError(
        f"checkpoint {checkpoint} is incomplete or damaged ({reason}); delete that folder to go "
        "on from the one before"
    )


def unreadable(checkpoint: Place, error: Exception) -> InputError | None:
    """The refusal of a checkpoint that Orbax could not read; None for an error of the program."""
    if is_remote(checkpoint) and (said := explain(error, checkpoint)) is not None:
        return InputError(f"{checkpoint}: {said}")
    # Where a value cannot be read, Orbax raises a bare Exception from the reason.
    cause = error.__cause__ if type(error) is Exception else error
    if not isinstance(cause, OSError | KeyError | ValueError):
        return None
    reason = " ".join(str(cause).split())[:300]
    return damaged(checkpoint, f"{type(cause).__name__}: {reason}")
