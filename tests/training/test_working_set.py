"""What is read of the data before a run begins, to know the rows that it needs at a time."""

from types import SimpleNamespace

import numpy as np
import pytest

from stem_jax.training.working_set import working_set

SPEC = SimpleNamespace(num_rows=64, layout=SimpleNamespace(row_numbers=lambda keys: keys))
MEMORY = SimpleNamespace(keys=lambda tokens, segment_ids: tokens)


class Batches:
    """Batch i has two tokens, i and i + 1."""

    def __init__(self):
        self.read = []

    def batch(self, step: int) -> dict[str, np.ndarray]:
        self.read.append(step)
        tokens = np.array([[step, step + 1]]) % SPEC.num_rows
        return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}


@pytest.mark.parametrize(
    ("tokens", "steps", "read"),
    [(2, 10**6, 1000), (2, 40, 30), (2**21, 10**6, 3), (2**14, 10**6, 256)],
)
def test_as_many_batches_as_take_seconds(tokens, steps, read):
    config = SimpleNamespace(
        tokens_per_step=tokens,
        tables=SimpleNamespace(prefetch=2),
        train=SimpleNamespace(steps=steps),
    )
    data = SimpleNamespace(batches=Batches(), held_out=None)
    found = working_set(config, MEMORY, SPEC, 1, data, 10)
    assert data.batches.read == list(range(10, 10 + read))
    assert (found.batch, found.in_flight) == (2, 4)
