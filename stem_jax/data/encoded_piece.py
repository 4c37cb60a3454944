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
    coverage: of what was looked at of the piece; `documents` keeps none. scored: [T] bool, which
    tokens are scored as targets; None: all that can be.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    fractions: np.ndarray
    bad: tuple[tuple[str, str], ...] = ()
    coverage: Coverage = UNSEEN
    scored: np.ndarray | None = None

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> "EncodedPiece":
        """One of them."""
        start = int(self.lengths[:index].sum())
        one, tokens = slice(index, index + 1), slice(start, start + int(self.lengths[index]))
        return EncodedPiece(
            self.tokens[tokens],
            self.lengths[one],
            self.num_bytes[one],
            self.fractions[one],
            scored=None if self.scored is None else self.scored[tokens],
        )

    def documents(self, chosen_n: np.ndarray) -> "EncodedPiece":
        """Those where a mask is true."""
        if chosen_n.all():
            return self
        chosen_T = np.repeat(chosen_n, self.lengths)
        return EncodedPiece(
            self.tokens[chosen_T],
            self.lengths[chosen_n],
            self.num_bytes[chosen_n],
            self.fractions[chosen_n],
            scored=None if self.scored is None else self.scored[chosen_T],
        )

    def to_bytes(self) -> bytes:
        """The content of a file, with checksums; `from_bytes` reads it."""
        file = io.BytesIO()
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        if self.scored is not None:
            arrays["scored"] = self.scored
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
                scored = arrays.get("scored")
                return cls(**found, bad=tuple(map(tuple, bad)), coverage=coverage, scored=scored)
        except (KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"no whole piece: {error}") from error


def _as_array(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


_ARRAYS = ("tokens", "lengths", "num_bytes", "fractions")
