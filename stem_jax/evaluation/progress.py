"""Whether a measurement draws bars."""

from stem_jax.processes.agreement import is_first


def bars_off(progress: bool) -> bool | None:
    """tqdm's `disable`. None: bars on a terminal only. Process 0 draws for all."""
    return None if progress and is_first() else True
