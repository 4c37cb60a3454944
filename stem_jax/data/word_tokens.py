"""Which tokens a word has where it stands in a text."""

from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError

# At the start of a text a word has other tokens than after a space.
_START = "^"
# What a word inside a sentence is looked at behind.
_BEFORE = "a"


def word_ids(tokenizer: Tokenizer, word: str) -> list[int]:
    """The tokens of a word as it stands in a sentence, or with "^" at the start of a text.

    Raises:
        InputError: it has none, or one that stands for unknown characters.
    """
    word = word.strip()
    plain = word.removeprefix(_START)
    if not plain.strip():
        raise InputError(f"{word!r} has no tokens; give a word")
    first = [] if word.startswith(_START) else tokenizer.encode(_BEFORE)
    ids = tokenizer.encode_behind(f" {plain}") if first else tokenizer.encode(plain)
    # Some tokenizers leave out spaces at the start of a text, so it is looked at inside one.
    expected, read = f"{_BEFORE} {plain}" if first else plain, tokenizer.decode([*first, *ids])
    if read != expected:
        raise InputError(
            f"{word!r} has characters that the tokenizer does not know: it reads "
            f"{read.removeprefix(f'{_BEFORE} ' if first else '')!r}; give a word of the training "
            "text"
        )
    return ids
