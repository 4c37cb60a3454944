"""Log-likelihoods of token sequences, in batches of few shapes.

Sequences are sorted by length and padded on the right to a common power of two, in batches of one
size, so that a program is compiled for each power of two and no more. Neither the padding nor the
other sequences of a batch are seen by a sequence.

Several processes divide the batches. Stages by step distance, in each: batch t is read by the host
while batch t+1 computes on the device.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.errors import InputError
from stem_jax.evaluation.division import divide
from stem_jax.evaluation.limits import check_batch_size
from stem_jax.kernels.head_loss import head_loss
from stem_jax.memory.catalogue import memories
from stem_jax.memory.memory import STEM
from stem_jax.mesh import BATCH_AXES, axis_size, divided, replicated
from stem_jax.model.attention import resolve_backend
from stem_jax.model.inputs import Inputs
from stem_jax.model.memory_rows import MemoryRows
from stem_jax.model.transformer import Transformer
from stem_jax.training.blueprint import ModelDef

_SMALLEST_BUCKET = 16
# The splash kernel works on blocks of 128 positions.
_SMALLEST_SPLASH_BUCKET = 128
# Of the logits that exist at a time.
_LOGITS_BYTES = 1 << 28
# Sequences that are scored together, the longest first: ids, and the keys of their rows.
_Batch = list[tuple[Sequence[int], Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model says about n ids, each given those before it; the first is never scored.

    log_likelihoods: [n - 1] float32, nats. greedy: [n - 1] bool, whether the id is the likeliest.
    """

    log_likelihoods: np.ndarray
    greedy: np.ndarray


class Scorer:
    """Compiled programs that score sequences with one set of parameters."""

    def __init__(self, run: LoadedRun, batch_size: int = 16, keyed: str = STEM):
        """Args: `keyed` is the memory whose rows `score` may be given keys of.

        Raises InputError for a batch without sequences.
        """
        check_batch_size(batch_size)
        self._run = run
        self._keyed = keyed
        # Every shard of the batch has as many.
        self._batch_size = batch_size + -batch_size % axis_size(run.mesh, BATCH_AXES)
        # Nothing is differentiated here, so there is nothing to rematerialise. A scan would stack
        # the weights first, a second copy of them.
        model = dataclasses.replace(run.config.model, remat="none", scan_layers=False)
        self._config = dataclasses.replace(run.config, model=model)
        self._model = ModelDef(self._config, divided(run.mesh))
        self._rows = MemoryRows(memories(self._config), run.rows)
        splash = resolve_backend(model, run.mesh) == "splash"
        self._smallest = _SMALLEST_SPLASH_BUCKET if splash else _SMALLEST_BUCKET
        self._whole = replicated(run.mesh)
        self.program = jax.jit(self._program, out_shardings=self._whole)

    @property
    def context(self) -> int:
        """Ids that a scored one may follow: the length trained on."""
        return self._config.train.seq_len

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        on_scored: Callable[[int], object] | None = None,
        keys: Sequence[Sequence[int]] | None = None,
    ) -> list[Scores]:
        """Scores every id but the first of each sequence.

        Args:
            sequences: of 2 to `context` + 1 ids, the same in every process.
            on_scored: called with a number of sequences whenever that many more are done.
            keys: of `keyed`'s rows that are read at the ids of each sequence, as the run's source
                of them knows them; None: the ids.

        Raises:
            InputError: a sequence of another length, an unknown id, or batches with more distinct
                ids than the device has rows.
        """
        self._check(sequences)
        keys = sequences if keys is None else keys
        # The longest first: if memory does not suffice, that shows at the start.
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        batches = [
            [(sequences[index], keys[index]) for index in order[first : first + self._batch_size]]
            for first in range(0, len(order), self._batch_size)
        ]

        def on_done(done: Sequence[_Batch]) -> None:
            if on_scored is not None:
                on_scored(sum(map(len, done)))

        results = itertools.chain.from_iterable(divide(batches, self._results, on_done))
        found = dict(zip(order, results, strict=True))
        return [found[index] for index in range(len(sequences))]

    def _results(self, batches: Sequence[_Batch]) -> Iterator[list[Scores]]:
        """The scores of each batch, one batch behind the device."""
        before: tuple[_Batch, tuple[jax.Array, jax.Array]] | None = None
        for batch in batches:
            following = batch, self._dispatch(batch)
            if before is not None:
                yield _read(*before)
            before = following
        if before is not None:
            yield _read(*before)

    def _dispatch(self, batch: _Batch) -> tuple[jax.Array, jax.Array]:
        length = min(self._bucket(len(batch[0][0]) - 1), self.context)
        shape = (self._batch_size, length)
        tokens_BxL, targets_BxL, keys_BxL = (np.zeros(shape, np.int32) for _ in range(3))
        lengths_B = np.zeros(self._batch_size, np.int32)
        for row, (ids, of_rows) in enumerate(batch):
            n = lengths_B[row] = len(ids) - 1
            tokens_BxL[row, :n], targets_BxL[row, :n] = ids[:-1], ids[1:]
            keys_BxL[row, :n] = of_rows[:-1]
        arrays = tokens_BxL, targets_BxL, lengths_B, keys_BxL
        tokens_BxL, targets_BxL, lengths_B, keys_BxL = (
            jax.device_put(x, self._whole) for x in arrays
        )
        segment_ids_BxL = _within(lengths_B, length)
        rows = self._rows.serve(tokens_BxL, segment_ids_BxL, keys={self._keyed: keys_BxL})
        return self.program(self._run.params, rows, tokens_BxL, targets_BxL, lengths_B, keys_BxL)

    def _bucket(self, length: int) -> int:
        """The next power of two."""
        return max(self._smallest, 1 << (length - 1).bit_length())

    def _program(self, params, rows, tokens_BxL, targets_BxL, lengths_B, keys_BxL):
        """Log-likelihoods [B, L] float32 of the targets, and whether they are the likeliest."""
        B, L = tokens_BxL.shape
        model = self._model.bind(params)
        positions_BxL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
        segment_ids_BxL = _within(lengths_B, L)
        dtype, keys = self._config.model.compute_dtype, {self._keyed: keys_BxL}
        blocks, index = self._rows.blocks(rows, tokens_BxL, segment_ids_BxL, dtype, keys=keys)
        inputs = Inputs(tokens_BxL, positions_BxL, segment_ids_BxL, index)
        hidden_BxLxD = model(inputs, blocks).hidden
        chunk = max(1, _LOGITS_BYTES // (4 * B * self._config.model.vocab_size))
        if chunk >= L:
            return _chunk_scores(model, hidden_BxLxD, targets_BxL)

        def split(x_BxL):
            x_BxL = jnp.pad(x_BxL, ((0, 0), (0, -L % chunk)) + ((0, 0),) * (x_BxL.ndim - 2))
            return x_BxL.reshape(B, -1, chunk, *x_BxL.shape[2:]).swapaxes(0, 1)

        pieces = split(hidden_BxLxD), split(targets_BxL)
        scores = jax.lax.map(lambda piece: _chunk_scores(model, *piece), pieces)
        return tuple(x.swapaxes(0, 1).reshape(B, -1)[:, :L] for x in scores)

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        vocab_size = self._config.model.vocab_size
        for number, ids in enumerate(sequences, start=1):
            if not 2 <= len(ids) <= self.context + 1:
                raise InputError(
                    f"sequence {number} has {len(ids)} ids, the context of train.seq_len="
                    f"{self.context} takes 2 to {self.context + 1}; cut it"
                )
            if not (min(ids) >= 0 and max(ids) < vocab_size):
                raise InputError(
                    f"sequence {number} has ids from {min(ids)} to {max(ids)}, the model knows 0 "
                    f"to {vocab_size - 1}; use the tokenizer that it was trained with"
                )


def _within(lengths_B: jax.Array, length: int) -> jax.Array:
    return (jnp.arange(length) < lengths_B[:, None]).astype(jnp.int32)


def _read(batch: _Batch, scores: tuple[jax.Array, jax.Array]) -> list[Scores]:
    likelihoods_BxL, greedy_BxL = map(np.asarray, scores)
    return [
        Scores(likelihoods_BxL[row, :n].copy(), greedy_BxL[row, :n].copy())
        for row, n in enumerate(len(ids) - 1 for ids, _ in batch)
    ]


def _chunk_scores(model: Transformer, hidden_BxCxD, targets_BxC) -> tuple[jax.Array, jax.Array]:
    head_DxV = model.head_weight()
    one = jnp.ones((1, 1), jnp.float32)

    def token_loss(hidden_D, target):
        # The training loss of a batch of one token: there is one definition of it.
        return head_loss(hidden_D[None, None], head_DxV, target[None, None], one, 0.0, 1, None)[1]

    losses_BxC = jax.vmap(jax.vmap(token_loss))(hidden_BxCxD, targets_BxC)
    best_BxC = jnp.argmax(model.logits(hidden_BxCxD), axis=-1)
    return -losses_BxC, best_BxC == targets_BxC
