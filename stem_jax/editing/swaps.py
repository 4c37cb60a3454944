"""Which rows an edit writes, and from which rows they are made.

A swap of "Spain" by "Germany" writes the rows of Spain's tokens with those of Germany's. Where the
two have different numbers of tokens a strategy decides (STEM, arXiv 2601.10639, section on
knowledge editing):

    pad_left, pad_right   the target's rows come last or first, zeros fill the rest: there the
                          layer adds nothing
    copy                  the target's rows again and again
    subset                the source has fewer: the target's rarest tokens, in their order
    average               the mean of all rows of the target, at every token of the source
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from stem_jax.data.tokenizer import Tokenizer
from stem_jax.data.word_tokens import word_ids
from stem_jax.editing.array_file import FLOAT32, check_rows, read_arrays
from stem_jax.editing.choices import STRATEGIES
from stem_jax.errors import InputError

_ARROW = "=>"
# Between terms; that of an exponent, as in 1e+3, is none.
_PLUS = r"(?<!\d[eE])\+"


@dataclasses.dataclass(frozen=True)
class RowRecipe:
    """One row to write: of token `token_id`, the sum of weight times the row of each token id.

    given: [S, F] or, for every layer the same, [F] float32, added to the sum; None: nothing.
    """

    token_id: int
    parts: tuple[tuple[float, int], ...] = ()
    given: np.ndarray | None = None


def recipes_of(
    tokenizer: Tokenizer, swaps: Sequence[str], injections: Sequence[str], strategy: str
) -> list[RowRecipe]:
    """The rows of several edits; raises InputError as they do, and if two write the same row."""
    recipes = [recipe for swap in swaps for recipe in swap_recipes(tokenizer, swap, strategy)]
    recipes += [injection_recipe(tokenizer, injection) for injection in injections]
    _check_apart(recipes, tokenizer)
    return recipes


def swap_recipes(tokenizer: Tokenizer, swap: str, strategy: str = "average") -> list[RowRecipe]:
    """The rows of a swap.

    Args:
        swap: "SOURCE=>TARGET", words as they stand inside a sentence, after a space; "^SOURCE" is
            one that begins a text.
        strategy: one of STRATEGIES; it matters only if the numbers of tokens differ.

    Raises:
        InputError: no such form, words without tokens or with characters that the tokenizer does
            not know, the same word twice, a source in which a token repeats, or numbers of tokens
            that the strategy does not fit.
    """
    source, arrow, target = swap.partition(_ARROW)
    if not arrow or _ARROW in target:
        raise InputError(f"--swap={swap} must be SOURCE=>TARGET, such as 'Spain=>Germany'")
    source_ids, target_ids = word_ids(tokenizer, source), word_ids(tokenizer, target)
    if source_ids == target_ids:
        raise InputError(f"--swap={swap} puts rows in their own place; give two different words")
    if len(set(source_ids)) < len(source_ids):
        raise InputError(
            f"--swap={swap}: a token of {source.strip()!r} comes twice in it, and has one row "
            "only; choose another source"
        )
    return [
        RowRecipe(token, parts)
        for token, parts in zip(source_ids, _parts(source_ids, target_ids, swap, strategy))
    ]


def injection_recipe(tokenizer: Tokenizer, injection: str) -> RowRecipe:
    """The row of an injection.

    Args:
        injection: "WORD=0.5*FIRST+0.5*SECOND", words of one token each; or "WORD=@FILE", a
            safetensors file with the array `row`, [S, F] or [F].

    Raises:
        InputError: no such form, a word that is not one token, or a file without a row.
    """
    word, equals, terms = injection.partition("=")
    if not equals:
        raise InputError(
            f"--inject={injection} must be WORD=WEIGHT*WORD+WEIGHT*WORD+..., or WORD=@FILE"
        )
    if terms.startswith("@"):
        return RowRecipe(_one_token(tokenizer, word, injection), given=_read_row(terms[1:]))
    parts = []
    for term in re.split(_PLUS, terms):
        weight, star, of = term.partition("*")
        try:
            number = float(weight) if star else 1.0
        except ValueError as error:
            raise InputError(
                f"--inject={injection}: {weight!r} is not a number; write 0.5*{of}"
            ) from error
        parts.append((number, _one_token(tokenizer, of if star else term, injection)))
    return RowRecipe(_one_token(tokenizer, word, injection), tuple(parts))


def _check_apart(recipes: Sequence[RowRecipe], tokenizer: Tokenizer) -> None:
    """Raises InputError if two recipes write the same row."""
    seen = set()
    for recipe in recipes:
        if recipe.token_id in seen:
            raise InputError(
                f"two edits write the rows of token {recipe.token_id} "
                f"({tokenizer.decode([recipe.token_id])!r}); make them one after the other, each "
                "with a patch of its own"
            )
        seen.add(recipe.token_id)


def _parts(
    source: list[int], target: list[int], swap: str, strategy: str
) -> list[tuple[tuple[float, int], ...]]:
    """What each source token's row is made of."""
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy={strategy} must be one of {', '.join(STRATEGIES)}")
    n, m = len(source), len(target)
    whole: list[tuple[tuple[float, int], ...]] = [((1.0, token),) for token in target]
    if n == m:
        return whole
    if strategy == "average":
        return [tuple((1 / m, token) for token in target)] * n
    if strategy == "subset":
        if n > m:
            raise InputError(
                f"--swap={swap}: subset needs a target with more tokens than the source's {n}, it "
                f"has {m}; use pad_left, pad_right, copy or average"
            )
        # Later ids are the rarer pieces, which tell more about the word.
        rarest = sorted(sorted(range(m), key=lambda place: -target[place])[:n])
        return [whole[place] for place in rarest]
    if n < m:
        raise InputError(
            f"--swap={swap}: {strategy} needs a target with fewer tokens than the source's {n}, it "
            f"has {m}; use subset or average"
        )
    if strategy == "copy":
        return [whole[place % m] for place in range(n)]
    zeros: list[tuple[tuple[float, int], ...]] = [()] * (n - m)
    return zeros + whole if strategy == "pad_left" else whole + zeros


def _read_row(path: str) -> np.ndarray:
    arrays, _ = read_arrays(path, f"--inject: {path}", {"row": FLOAT32})
    row = arrays.get("row")
    if row is None or row.ndim not in (1, 2):
        raise InputError(f"--inject: {path} has no float32 array `row` of shape [S, F] or [F]")
    check_rows(row, f"--inject: {path} has", "give rows like those of the model")
    return row


def _one_token(tokenizer: Tokenizer, word: str, injection: str) -> int:
    ids = word_ids(tokenizer, word)
    if len(ids) != 1:
        raise InputError(
            f"--inject={injection}: {word.strip()!r} has {len(ids)} tokens; give words of one token"
        )
    return ids[0]
