"""The runs of 13 words of a text, as numbers: what duplicates and overlap are counted in."""

import hashlib
import re

import numpy as np

RUN_WORDS = 13
_WORD = re.compile(r"\w+")
# Odd, so that no word's place in a run is lost.
_FACTOR = 0x9E3779B97F4A7C15


class WordRuns:
    """Numbers of runs; remembers those of words, of which a text has few distinct ones."""

    def __init__(self) -> None:
        self._number_of: dict[str, int] = {}

    def of(self, text: str) -> np.ndarray:
        """[n] uint64, sorted, each once: a hash of each run of 13 words.

        Words are runs of letters, digits and underscores, in lower case. A text of fewer than 13
        words is one run, and one without words none. Two of a billion runs have the same number
        with probability 3 %, whatever the machine.
        """
        words = _WORD.findall(text.lower())
        numbers_n = np.fromiter(map(self._number, words), np.uint64, len(words))
        if not words:
            return numbers_n
        length = min(RUN_WORDS, len(words))
        runs_n = np.zeros(len(words) - length + 1, np.uint64)
        factor = np.uint64(_FACTOR)
        for place in range(length):
            # Horner's rule modulo 2^64.
            runs_n = runs_n * factor + numbers_n[place : place + len(runs_n)]
        return np.unique(runs_n)

    def _number(self, word: str) -> int:
        number = self._number_of.get(word)
        if number is None:
            digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
            number = self._number_of[word] = int.from_bytes(digest, "little")
        return number
