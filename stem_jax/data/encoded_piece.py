"""Documents as ids: what a worker makes of a piece of the input, and its file."""

import dataclasses
import io
import json
import zipfile
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class EncodedPiece:
    """Some documents in their order.

    tokens: [T] ids with bos and eos, as in tokens.bin. lengths: [n] int64, tokens of each document.
    num_bytes: [n] int64, UTF-8 bytes of each text. fractions: [n] float64, see `fraction_of`.
    bad: (place, reason) of documents that the tokenizer cannot take; they are not among the n.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    fractions: np.ndarray
    bad: tuple[tuple[str, str], ...] = ()

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> "EncodedPiece":
        """One of them."""
        start = int(self.lengths[:index].sum())
        one = slice(index, index + 1)
        tokens = self.tokens[start : start + int(self.lengths[index])]
        return EncodedPiece(tokens, self.lengths[one], self.num_bytes[one], self.fractions[one])

    def documents(self, chosen_n: np.ndarray) -> "EncodedPiece":
        """Those where a mask is true."""
        if chosen_n.all():
            return self
        return EncodedPiece(
            self.tokens[np.repeat(chosen_n, self.lengths)],
            self.lengths[chosen_n],
            self.num_bytes[chosen_n],
            self.fractions[chosen_n],
        )

    def to_bytes(self) -> bytes:
        """The content of a file, with checksums; `from_bytes` reads it."""
        file = io.BytesIO()
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        bad = np.frombuffer(json.dumps(self.bad).encode(), np.uint8)
        np.savez(file, bad=bad, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises ValueError for content that was cut or damaged."""
        try:
            with np.load(io.BytesIO(content)) as arrays:
                bad = json.loads(arrays["bad"].tobytes())
                return cls(**{name: arrays[name] for name in _ARRAYS}, bad=tuple(map(tuple, bad)))
        except (KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"no whole piece: {error}") from error


_ARRAYS = ("tokens", "lengths", "num_bytes", "fractions")
