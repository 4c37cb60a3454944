"""Pairs of pieces of text that are alike, one held out and one that a run was trained on."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator

import numpy as np

from stem_jax.data.token_store import TokenStore
from stem_jax.data.trained_pairs import Piece, pieces_of
from stem_jax.errors import InputError
from stem_jax.evaluation.training_text import TrainingText

# Rows of each store that pieces are drawn from, spread over it.
_ROWS = 1 << 16
_SEED = 0
# (store, number of a document): what documents it is compared with.
KindOf = Callable[[TokenStore, int], Hashable]


@dataclasses.dataclass(frozen=True)
class LikePieces:
    """A held-out piece, a seen one like it, and how often that was trained on."""

    held_out: Piece
    seen: Piece
    times: int


def draw_pairs(
    text: TrainingText,
    held_out: TokenStore | None = None,
    kind_of: KindOf | None = None,
    limit: int | None = None,
) -> tuple[list[LikePieces], int]:
    """Pairs, the same whenever they are drawn, and how many held-out pieces have none like them.

    Alike are pieces of one kind whose numbers of scored tokens lie between the same powers of two,
    as do those of their documents, and that both begin their document or both do not.

    Args:
        held_out: text that the run was not trained on; None: the validation documents of its
            sources.
        kind_of: None: the source of a document, or with `held_out` one kind for all.
        limit: pairs; None: as many as there are.

    Raises:
        InputError: no source has validation documents.
    """
    unseen: list[tuple[str, TokenStore]]
    if held_out is not None:
        unseen = [("", held_out)]
    else:
        unseen = [(s.source, s.validation) for s in text.sources if s.validation is not None]
    if not unseen:
        raise InputError(
            "--memorization: no source of the run has held-out documents; train on text that was "
            "prepared with a part held out (--validation-fraction, data.validation_fraction)"
        )

    def pieces(kind: str, store: TokenStore, rows: np.ndarray) -> Iterator[tuple[tuple, Piece]]:
        kept = min(len(rows), _ROWS)
        for piece in pieces_of(store, text.seq_len, rows[np.arange(kept) * len(rows) // kept]):
            start, stop = (int(n) for n in store.document_starts[piece.document :][:2])
            like = kind_of(store, piece.document) if kind_of else kind
            of_document, own = (stop - start - 1).bit_length(), piece.scored.bit_length()
            yield (like, of_document, own, piece.start == start), piece

    rng = np.random.default_rng(_SEED)
    seen: dict[tuple, list[tuple[Piece, int]]] = {}
    for source, times_R in zip(text.sources, text.times, strict=True):
        kind = source.source if held_out is None else ""
        for like, piece in pieces(kind, source.train, np.flatnonzero(times_R)):
            times = int(times_R[piece.start // text.seq_len])
            seen.setdefault(like, []).append((piece, times))
    left = {like: [alike[i] for i in rng.permutation(len(alike))] for like, alike in seen.items()}
    candidates = []
    for kind, store in unseen:
        rows = np.arange(store.num_rows(text.seq_len, drop_last=False))
        candidates += list(pieces(kind, store, rows))
    pairs: list[LikePieces] = []
    unpaired = 0
    for index in rng.permutation(len(candidates)):
        if len(pairs) == limit:
            break
        like, piece = candidates[index]
        if left.get(like):
            pairs.append(LikePieces(piece, *left[like].pop()))
        else:
            unpaired += 1
    return pairs, unpaired
