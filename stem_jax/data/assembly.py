"""The stores as they grow: encoded pieces, kept as files until it is their turn."""

import dataclasses
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from stem_jax.data.bad_records import BadRecords
from stem_jax.data.coverage import Coverage
from stem_jax.data.encoded_piece import EncodedPiece
from stem_jax.data.preparation import Preparation
from stem_jax.data.splitter import Splitter
from stem_jax.data.token_store_writer import StoreSize, TokenStoreWriter
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import BadRecord, InputError
from stem_jax.files import read_json, write_whole

# Between two records of how far it is: what they cost (the disk is waited for) stays small.
_RECORD_SECONDS = 2.0


class Assembly:
    """Puts pieces into the stores in the order of the input, whatever order they come in.

    A piece is a file before anything else is done with it, and stays one until the stores that
    hold it are on the disk and recorded: a kill loses none. Use it as a context manager.
    """

    def __init__(
        self,
        place: Preparation,
        splits: tuple[str, ...],
        tokenizer: Tokenizer,
        name: str,
        validation_fraction: float,
        has_scored: bool = False,
    ):
        """Goes on where the preparation was. has_scored: the pieces say what of them is."""
        self._folder, self._record = place.pieces, place.progress
        self._recorded, self._bad, self._coverage, written = self._read_record(splits)
        # The first piece that is not in the stores, and that is not recorded to be.
        self._next = self._recorded
        self._recorded_at = time.monotonic()
        with ExitStack() as stack:
            self._writers = {
                split: TokenStoreWriter(
                    place.new / split,
                    vocab_size=tokenizer.vocab_size,
                    fingerprint=tokenizer.fingerprint,
                    bos_id=tokenizer.bos_id,
                    eos_id=tokenizer.eos_id,
                    name=name,
                    split=split,
                    written=written[split],
                    has_scored=has_scored,
                )
                for split in splits
            }
            for writer in self._writers.values():
                stack.callback(writer.abort)
            self._stack = stack.pop_all()
        self._splitter = Splitter(self._writers, validation_fraction, settled=self._next > 0)
        self._seen = [False, False]
        # The next one to look at, while no document of one of the splits has been seen.
        self._looked = self._next
        self._remove_damaged()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def has(self, index: int) -> bool:
        """Whether a piece need not be tokenized."""
        return index < self._next or self._file(index).exists()

    def add(self, index: int, content: bytes) -> None:
        """Keeps a piece, and puts all whose turn has come into the stores.

        content: of its file, see `EncodedPiece.to_bytes`.
        """
        # Not written aside first: what was cut is found by its checksums.
        self._file(index).write_bytes(content)
        while not self._may_begin() and self._file(self._looked).exists():
            reached = self._splitter.reaches_both(self._read(self._looked).fractions)
            self._seen = [a or b for a, b in zip(self._seen, reached, strict=True)]
            self._looked += 1
        if self._may_begin():
            self._advance()

    def finish(self, name: str, bad: BadRecords) -> None:
        """Completes the stores, of which the caller has added all pieces.

        bad: takes the documents that are not in them because the tokenizer could not take them.
        Raises InputError if there are too few documents, or if their tokens stand for nothing.
        """
        self._advance()
        for place, reason in self._bad:
            bad.add(BadRecord(reason, place))
        self._splitter.finish(name, bad)
        self._check_coverage(name)
        for writer in self._writers.values():
            writer.close(self._coverage)

    def _may_begin(self) -> bool:
        """Whether the splitter holds nothing back after the pieces that are there.

        Until then they stay files: what it holds is recorded nowhere.
        """
        return self._splitter.settled or all(self._seen)

    def _advance(self) -> None:
        while self._file(self._next).exists():
            piece = self._read(self._next)
            self._splitter.add(piece)
            self._bad += piece.bad
            self._coverage += piece.coverage
            self._next += 1
        late = time.monotonic() - self._recorded_at > _RECORD_SECONDS
        if late and self._splitter.settled and self._next > self._recorded:
            self._write_record()

    def _check_coverage(self, name: str) -> None:
        coverage = self._coverage
        if coverage.text and coverage.left_out == coverage.text:
            raise InputError(
                f"the tokens of corpus {name!r} stand for nothing of its text, first "
                f"{coverage.example!r}: take a tokenizer with byte fallback or all 256 bytes"
            )

    def _write_record(self) -> None:
        for writer in self._writers.values():
            writer.sync()
        record = {
            "pieces": self._next,
            "stores": {s: dataclasses.asdict(w.size) for s, w in self._writers.items()},
            "bad": self._bad,
            "coverage": dataclasses.asdict(self._coverage),
        }
        write_whole(self._record, json.dumps(record) + "\n")
        for index in range(self._recorded, self._next):
            self._file(index).unlink()
        self._recorded, self._recorded_at = self._next, time.monotonic()

    def _read_record(
        self, splits: tuple[str, ...]
    ) -> tuple[int, list[tuple], Coverage, dict[str, StoreSize]]:
        """Pieces in the stores, bad records, coverage and sizes of the stores."""
        try:
            record = read_json(self._record)
        except InputError:
            # There is none before the first pieces are in the stores.
            record = {"pieces": 0, "stores": {split: {} for split in splits}, "bad": []}
        bad = [tuple(entry) for entry in record["bad"]]
        # An earlier version recorded none.
        coverage = Coverage(**record.get("coverage", {}))
        sizes = {split: StoreSize(**record["stores"][split]) for split in splits}
        return record["pieces"], bad, coverage, sizes

    def _remove_damaged(self) -> None:
        """What a kill has cut, or a power failure left without its content."""
        for path in self._folder.iterdir():
            try:
                EncodedPiece.from_bytes(path.read_bytes())
                stale = int(path.stem) < self._recorded
            except ValueError:
                stale = True
            if stale:
                path.unlink()

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:010d}.npz"

    def _read(self, index: int) -> EncodedPiece:
        return EncodedPiece.from_bytes(self._file(index).read_bytes())
