"""Which documents are trained on and which are held out: by seed and text alone."""

import hashlib
from collections.abc import Mapping

import numpy as np

from stem_jax.data.bad_records import BadRecords
from stem_jax.data.encoded_piece import EncodedPiece
from stem_jax.data.token_store_writer import TokenStoreWriter
from stem_jax.errors import InputError

SPLITS = ("train", "validation")


def fraction_of(seed: int, raw: bytes) -> float:
    """A number in [0, 1), uniform over texts; below the validation fraction it is held out."""
    digest = hashlib.blake2b(raw, digest_size=8, key=str(seed).encode()[:64]).digest()
    return int.from_bytes(digest, "big") / 2**64


class Splitter:
    """Sends documents to the writers; with two of them, neither stays empty.

    Until both splits have been seen, the document nearest to the missing one is held back. It goes
    there if the corpus ends before a document does.
    """

    def __init__(
        self, writers: Mapping[str, TokenStoreWriter], validation_fraction: float, settled: bool
    ):
        """settled: the writers continue stores of which neither is empty."""
        self._writers = writers
        self._fraction = validation_fraction
        self._settled = settled or len(writers) == 1
        self._held: tuple[float, EncodedPiece] | None = None

    @property
    def settled(self) -> bool:
        """Whether nothing is held back any more: all that was added is with the writers."""
        return self._settled

    def reaches_both(self, fractions_n: np.ndarray) -> tuple[bool, bool]:
        """Whether some documents belong to train, and some to validation."""
        held_out_n = fractions_n < self._fraction
        return bool((~held_out_n).any()), bool(held_out_n.any())

    def add(self, piece: EncodedPiece) -> None:
        """Takes the documents of a piece, in their order."""
        index = 0
        while not self._settled and index < piece.num_documents:
            self._add_one(float(piece.fractions[index]), piece.document(index))
            index += 1
        rest = piece.documents(np.arange(piece.num_documents) >= index)
        held_out_n = rest.fractions < self._fraction
        for split, writer in self._writers.items():
            chosen = rest.documents(held_out_n == (split == "validation"))
            if chosen.num_documents:
                _extend(writer, chosen)

    def finish(self, name: str, bad: BadRecords) -> None:
        """Places the held document. Raises InputError if there are too few documents.

        bad: what was left out of the corpus, for that.
        """
        written = sum(writer.num_documents for writer in self._writers.values())
        if self._held is None and written == 0:
            raise InputError(
                f"corpus {name!r} has no text: give documents that are not empty{bad.told}"
            )
        if self._held is not None and written == 0:
            raise InputError(
                f"corpus {name!r} has a single document, which cannot be both train and"
                " validation: give more documents or set validation_fraction to 0" + bad.told
            )
        if self._held is not None:
            split = self._split_of(self._held[0])
            self._write("train" if split == "validation" else "validation", self._held[1])

    def _add_one(self, fraction: float, document: EncodedPiece) -> None:
        split = self._split_of(fraction)
        if self._held is None:
            self._held = fraction, document
            return
        held_split = self._split_of(self._held[0])
        if held_split != split:
            self._write(held_split, self._held[1])
            self._held, self._settled = None, True
        elif fraction != self._held[0] and (fraction < self._held[0]) == (split == "train"):
            (fraction, document), self._held = self._held, (fraction, document)
        self._write(self._split_of(fraction), document)

    def _split_of(self, fraction: float) -> str:
        return "validation" if fraction < self._fraction else "train"

    def _write(self, split: str, document: EncodedPiece) -> None:
        _extend(self._writers[split], document)


def _extend(writer: TokenStoreWriter, piece: EncodedPiece) -> None:
    writer.extend(piece.tokens, piece.lengths, piece.num_bytes, piece.scored)
