"""How much easier a run finds text that it was trained on than like text that it was not.

Both are scored in the parts in which training reads text: what a row of `train.seq_len` inputs has
of one document. Every held-out part is paired with a seen one that is like it, of the same kind
(the source, if nothing else is said), about as long, of a document about as long, and as it a
beginning or not. Seen is what was in a batch before the checkpoint: of a run that did one pass over
part of its text, that part alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.data.trained_pairs import Piece
from stem_jax.errors import InputError
from stem_jax.evaluation.like_pieces import KindOf, draw_pairs
from stem_jax.evaluation.limits import check_limit
from stem_jax.evaluation.progress import bars_off
from stem_jax.evaluation.scoring import Scorer
from stem_jax.evaluation.tally import Tally, number, token_bytes
from stem_jax.evaluation.training_text import TrainingText

# A character has at most four tokens: that of the piece's first byte begins among these.
_BEFORE = 4


class NothingAlike(InputError):
    """A run was trained on no text that held-out text is like."""


def memorization(
    run: LoadedRun,
    text: TrainingText,
    *,
    held_out: TokenStore | None = None,
    kind_of: KindOf | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Bits per byte of held-out text less those of like text that the run was trained on.

    Args:
        text: of the run, see `open_training_text`.
        held_out: text that it was not trained on; None: the validation documents of its sources.
        kind_of: the kind of a document; None: its source, or with `held_out` one for all.
        limit: pairs; None: as many as there are.
        batch_size: pieces at a time.
        progress: draw a bar on stderr, if it is a terminal.

    Returns:
        `gap`: bits per byte, positive where seen text is easier, and its `standard_error`, with
        documents as what is independent (None with one of them). `held_out` and `seen`: the records
        of `Tally`, with bytes of the decoded tokens. `pairs`, `unpaired`: held-out pieces with a
        seen one and without. `times`: how often a seen piece was trained on, on average.

    Raises:
        InputError: no held-out text. NothingAlike: none that seen text is like.
    """
    check_limit(limit, "held-out pieces")
    pairs, unpaired = draw_pairs(text, held_out, kind_of, limit)
    if not pairs:
        raise NothingAlike(
            "--memorization: the run was trained on no text that its held-out text is like; give "
            "a run of more steps"
        )
    scorer = Scorer(run, batch_size)
    pieces = [piece for pair in pairs for piece in (pair.held_out, pair.seen)]
    with tqdm(
        total=len(pieces), desc="memorization", unit=" pieces", disable=bars_off(progress)
    ) as bar:
        scores = scorer.score([piece.ids.tolist() for piece in pieces], bar.update)
    nats = [-float(score.log_likelihoods.astype(np.float64).sum()) for score in scores]
    sizes = [_bytes_of(run.tokenizer, piece) for piece in pieces]
    sides = [_Side(pieces[i::2], nats[i::2], sizes[i::2]) for i in (0, 1)]
    tallies = [side.tally() for side in sides]
    if not all(tally.bytes for tally in tallies):
        raise InputError("--memorization: the tokens of the text have no bytes; give other text")
    unseen, seen = (tally.nats / math.log(2) / tally.bytes for tally in tallies)
    errors = [error for side in sides if (error := side.standard_error()) is not None]
    return {
        "context": scorer.context,
        "gap": unseen - seen,
        "standard_error": math.hypot(*errors) if len(errors) == 2 else None,
        "held_out": tallies[0].record(),
        "seen": tallies[1].record(),
        "pairs": len(pairs),
        "unpaired": unpaired,
        "times": float(np.mean([pair.times for pair in pairs])),
    }


def format_memorization(result: dict[str, Any]) -> str:
    """A line for each side, and the gap."""
    lines = [f"{'text':<9}  bits/byte  nats/token      tokens       bytes"]
    for name in ("held_out", "seen"):
        record = result[name]
        lines.append(
            f"{name.replace('_', ' '):<9}  {number(record['bits_per_byte']):>9}  "
            f"{number(record['loss']):>10}  {record['tokens']:>10,}  {record['bytes']:>10,}"
        )
    lines.append(
        f"{'gap':<9}  {number(result['gap']):>9}  +- {number(result['standard_error'])} (standard "
        "error); positive: seen text is easier"
    )
    lines.append(
        f"{result['pairs']:,} pairs of pieces that are alike; a seen one was trained on "
        f"{result['times']:,.1f} times; {result['unpaired']:,} held-out pieces have none like them"
    )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Side:
    """The pieces of one side, with their nats and bytes."""

    pieces: Sequence[Piece]
    nats: Sequence[float]
    sizes: Sequence[int]

    def tally(self) -> Tally:
        tokens = sum(piece.scored for piece in self.pieces)
        return Tally(math.fsum(self.nats), tokens, sum(self.sizes))

    def standard_error(self) -> float | None:
        """Of bits per byte, a ratio of two sums over documents; None with one document."""
        ratio = math.fsum(self.nats) / sum(self.sizes)
        sums: dict[tuple[str, int], float] = {}
        for piece, nats, size in zip(self.pieces, self.nats, self.sizes, strict=True):
            document = str(piece.store.folder), piece.document
            sums[document] = sums.get(document, 0.0) + nats - ratio * size
        if len(sums) == 1:
            return None
        squares = math.fsum(x * x for x in sums.values()) * len(sums) / (len(sums) - 1)
        return math.sqrt(squares) / (math.log(2) * sum(self.sizes))


def _bytes_of(tokenizer: Tokenizer, piece: Piece) -> int:
    """UTF-8 bytes of the scored tokens."""
    ids = piece.ids_behind(_BEFORE).tolist()
    return sum(token_bytes(tokenizer, ids)[-piece.scored :])
