"""Documents to token stores, split into train and validation by document."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Self

from tqdm import tqdm

from stem_jax.data.assembly import Assembly
from stem_jax.data.bad_records import BadRecords
from stem_jax.data.chat_template import Chat
from stem_jax.data.documents import Document
from stem_jax.data.encoded_piece import EncodedPiece
from stem_jax.data.encoder_pool import Piece, cores, encode_pieces
from stem_jax.data.piece_encoder import PieceEncoder, cut_pieces
from stem_jax.data.preparation import Preparation
from stem_jax.data.splitter import SPLITS
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import BadRecord, InputError
from stem_jax.unfinished import exit_on_sigterm


def prepare_stores(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    name: str,
    validation_fraction: float,
    seed: int,
    progress: bool,
    processes: int | None = None,
) -> dict[str, TokenStore]:
    """Writes `out/train` and, unless the fraction is 0, `out/validation`; returns them opened.

    Both appear when they are whole. `write_stores` says more, and what is raised.
    """
    with Preparation(out, None) as place:
        write_stores(
            place,
            documents,
            tokenizer,
            name=name,
            validation_fraction=validation_fraction,
            seed=seed,
            progress=progress,
            processes=processes,
        )
    return open_stores(out, tokenizer)


def write_stores(
    place: Preparation,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    name: str,
    validation_fraction: float,
    seed: int,
    progress: bool,
    processes: int | None = None,
    bad: BadRecords | None = None,
    chat: Chat | None = None,
) -> tuple[int, int]:
    """Makes the stores of a preparation and puts them, with all that is in `place.new`, in place.

    Documents without text are left out. A document's split depends on the seed and its text alone,
    so it stays when others come or go, and copies of it stay together. If a split would be empty,
    the document whose hash is nearest to it moves there. The stores are the same for any number of
    processes, and however often they were begun.

    Args:
        validation_fraction: share of the documents, in [0, 1).
        progress: draw a bar (documents, MB, tokens per second) on stderr if it is a terminal.
        processes: that tokenize; None: one for each core.
        bad: takes the documents that the tokenizer cannot take; None: the first one is raised.
        chat: of documents that are conversations, of which the answers are scored.

    Returns:
        Pieces of the input, and how many of them an earlier call of the same job had tokenized.

    Raises:
        InputError: a fraction out of range, a corpus without text, or a single document that would
            have to fill both splits.
        TrainingError: a process was killed.
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction {validation_fraction} must lie in [0, 1)")
    processes = cores() if processes is None else processes
    if processes < 1:
        raise InputError(f"--processes={processes} must be at least 1")
    bad = bad or BadRecords()
    splits = SPLITS if validation_fraction > 0 else SPLITS[:1]
    with ExitStack() as stack:
        stack.enter_context(exit_on_sigterm(place.consequence))
        has_scored = chat is not None
        assembly = Assembly(place, splits, tokenizer, name, validation_fraction, has_scored)
        stack.enter_context(assembly)
        bar = stack.enter_context(_Progress(name, enabled=progress))
        found = 0

        def missing() -> Iterator[Piece]:
            nonlocal found
            for piece in cut_pieces(documents):
                index, found = found, found + 1
                if assembly.has(index):
                    bar.add(sum(len(document.text.encode()) for document in piece), 0, len(piece))
                else:
                    yield index, piece

        done = 0
        encoder = PieceEncoder(tokenizer, seed, chat)
        encoded = encode_pieces(missing(), encoder, processes)
        for index, content in stack.enter_context(closing(encoded)):
            piece = EncodedPiece.from_bytes(content)
            if piece.bad and bad.stops:
                origin, reason = piece.bad[0]
                bad.add(BadRecord(reason, origin))
            assembly.add(index, content)
            done += 1
            bar.add(int(piece.num_bytes.sum()), len(piece.tokens), piece.num_documents)
        assembly.finish(name, bad)
        bad.close()
        place.publish()
    return found, found - done


def open_stores(
    folder: str | Path, tokenizer: Tokenizer, vocab_size: int | None = None
) -> dict[str, TokenStore]:
    """Opens the splits in a folder: "train" always, "validation" if there is one.

    vocab_size: of the model, if there is one. Raises InputError as `TokenStore.open` does.
    """
    found = [s for s in SPLITS if s == "train" or (Path(folder) / s).exists()]
    return {
        split: TokenStore.open(
            Path(folder) / split,
            fingerprint=tokenizer.fingerprint,
            ends=(tokenizer.bos_id, tokenizer.eos_id),
            vocab_size=vocab_size,
        )
        for split in found
    }


class _Progress:
    """A tqdm bar on stderr that counts documents."""

    def __init__(self, name: str, enabled: bool):
        self._bar = tqdm(
            desc=f"prepare {name}",
            unit=" documents",
            file=sys.stderr,
            disable=None if enabled else True,  # None: only on a terminal
            mininterval=0.5,
        )
        self._began = time.monotonic()
        self._bytes = self._tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, num_bytes: int, num_tokens: int, num_documents: int) -> None:
        self._bytes += num_bytes
        self._tokens += num_tokens
        rate = self._tokens / max(time.monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(
            f"{self._bytes / 1e6:.1f} MB, {rate:,.0f} tokens/s", refresh=False
        )
        self._bar.update(num_documents)
