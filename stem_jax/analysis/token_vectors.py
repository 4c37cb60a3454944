"""The vectors that stand for tokens in feed-forward layers: rows of tables, means of projections.

A row is what a STEM layer multiplies its gate with, whatever the context. A dense layer multiplies
with W_up n, which the context changes; its mean over the places of a token in a text is what a row
can be compared with. Both are taken for the same tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from stem_jax.analysis.geometry import LayerGeometry
from stem_jax.analysis.token_text import TokenText, reading_config
from stem_jax.analysis.up_means import UpMeans
from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.editing.patch import read_rows
from stem_jax.training.step import TrainStep

# Tokens that the text lacks, of which the norms are shown beside the others'.
_UNSEEN = 256
# Of the sums over tokens [V, D] that exist at a time; more layers are read in several passes.
_SUMS_BYTES = 1 << 31


@dataclasses.dataclass(frozen=True)
class TokenSample:
    """Tokens whose vectors are looked at.

    ids: [n] int32, sorted. counts: [n] int64, times seen in the text. distinct: tokens that the
    text has. tokens: of the text that were counted.
    """

    ids: np.ndarray
    counts: np.ndarray
    distinct: int
    tokens: int

    @property
    def seen(self) -> int:
        """Sampled tokens that the text has."""
        return int((self.counts > 0).sum())


def sample_tokens(
    text: TokenText, tokens: int | None, vocab_size: int, known: int, rows: int, seed: int = 0
) -> TokenSample:
    """Draws distinct tokens of a text, each as likely as any other, and some that it lacks.

    Args:
        text, tokens: see `TokenText.batches`.
        vocab_size: of the model. known: ids that the tokenizer has.
        rows: the most to draw of those that the text has.

    Raises:
        InputError: a text that is too short.
    """
    counts_V = np.zeros(vocab_size, np.int64)
    for batch in text.batches(tokens):
        counts_V += np.bincount(batch["tokens"][batch["segment_ids"] > 0], minlength=vocab_size)
    rng = np.random.default_rng(seed)
    seen, unseen = np.flatnonzero(counts_V), np.flatnonzero(counts_V[:known] == 0)
    drawn = [
        rng.choice(ids, min(most, len(ids)), replace=False)
        for ids, most in ((seen, rows), (unseen, _UNSEEN))
    ]
    ids = np.sort(np.concatenate(drawn)).astype(np.int32)
    return TokenSample(ids, counts_V[ids], len(seen), int(counts_V.sum()))


def row_geometry(run: LoadedRun, sample: TokenSample) -> list[LayerGeometry]:
    """Geometry of the rows of each STEM layer."""
    rows_nxSxF = read_rows(run, sample.ids)
    return [
        LayerGeometry.of(layer, rows_nxSxF[:, index], sample.counts)
        for index, layer in enumerate(run.config.model.stem_layers)
    ]


def mean_geometry(
    run: LoadedRun,
    sample: TokenSample,
    text: TokenText,
    tokens: int | None,
    layers: tuple[int, ...],
    bar: Callable[[Iterable], Iterable] = iter,
) -> list[LayerGeometry]:
    """Geometry of the mean up values of some layers of a dense model.

    Args:
        text, tokens: that the means are over; those of `sample`, whose tokens they are taken for.
        bar: draws the progress of an iterator.
    """
    config = reading_config(run.config, text)
    programs = TrainStep(config, run.mesh)
    at_once = max(1, _SUMS_BYTES // (4 * config.model.vocab_size * config.model.embed_dim))
    # Of a token that the text lacks there is no mean.
    seen = sample.counts > 0
    found = []
    for first in range(0, len(layers), at_once):
        part = layers[first : first + at_once]
        means = UpMeans(programs, run.params, part)
        means.read(bar(text.batches(tokens)))
        found += [
            LayerGeometry.of(layer, means.rows(index, sample.ids[seen]), sample.counts[seen])
            for index, layer in enumerate(part)
        ]
    return found
