"""Documents as ids: what a worker makes of a piece of the input, and its file."""

import dataclasses
import io
import json
import zipfile
from typing import Any, Self

import numpy as np

from stem_jax.data.coverage import UNSEEN, Coverage


@dataclasses.dataclass(frozen=True)
class EncodedPiece:
    """Some documents in their order.

    tokens: [T] ids with bos and eos, as in tokens.bin. lengths: [n] int64, tokens of each document.
    num_bytes: [n] int64, UTF-8 bytes of each text. fractions: [n] float64, see `fraction_of`.
    bad: (place, reason) of documents that the tokenizer cannot take; they are not among the n.
    coverage: of what was looked at of the piece; `documents` keeps none.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    fractions: np.ndarray
    bad: tuple[tuple[str, str], ...] = ()
    coverage: Coverage = UNSEEN

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
        coverage = dataclasses.asdict(self.coverage)
        np.savez(file, bad=_as_array(self.bad), coverage=_as_array(coverage), **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises ValueError for content that was cut or damaged."""
        try:
            with np.load(io.BytesIO(content)) as arrays:
                bad = json.loads(arrays["bad"].tobytes())
                # A piece of an earlier version is made again.
                coverage = Coverage(**json.loads(arrays["coverage"].tobytes()))
                found = {name: arrays[name] for name in _ARRAYS}
                return cls(**found, bad=tuple(map(tuple, bad)), coverage=coverage)
        except (KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"no whole piece: {error}") from error


def _as_array(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


_ARRAYS = ("tokens", "lengths", "num_bytes", "fractions")
