"""Prompts for `niah`: haystacks that fill a given length, with needles at given depths."""

import dataclasses
import random
from collections.abc import Sequence

from tqdm import tqdm

from stem_jax.data.needles import draw_needles, filler, haystack, needle, question
from stem_jax.errors import InputError
from stem_jax.generation.generator import Generator

_MOST_FILLER = 1 << 20


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and the value that completes it. sentences: of the filler."""

    prompt: str
    value: str
    sentences: int


@dataclasses.dataclass(frozen=True)
class Grid:
    """All prompts of one number of needles. samples: by length, then by depth."""

    keys: int
    lengths: list[int]
    samples: list[list[list[Sample]]]


class _TooShortError(InputError):
    """A length in which the needles do not fit, or not at different places."""


def draw_grid(
    generator: Generator,
    lengths: Sequence[int] | None,
    depths: Sequence[float],
    count: int,
    samples: int,
    seed: int,
    bar: tqdm,
) -> Grid:
    """Draws every prompt with `count` needles.

    Args:
        lengths: tokens of prompt and answer; None: the context, its half, quarter and eighth, as
            far as the needles fit and the depths are different places.
        samples: of each length and depth.
        bar: counts prompts.

    Raises:
        InputError: a length over the context, or too short for the needles or the depths.
    """
    context = generator.context
    for length in lengths or ():
        if length > context:
            raise InputError(
                f"--lengths={length} is over the context of train.seq_len={context} that the model "
                f"was trained on; give at most {context}, or train with a longer train.seq_len"
            )
    grid = Grid(count, [], [])
    for length in sorted(set(lengths or (context // 8, context // 4, context // 2, context))):
        cells: list[list[Sample]] = []
        try:
            for depth in depths:
                cells.append([])
                for number in range(samples):
                    # Other names in every cell: the mean is one over as many names as prompts.
                    rng = random.Random(f"{seed} {count} {length} {depth} {number}")
                    sample = draw_sample(generator, rng, length, depth, count, bool(lengths))
                    _check_places(sample.sentences, length, depths, count, bool(lengths))
                    cells[-1].append(sample)
                    bar.update()
        except _TooShortError:
            if lengths or length == context:
                raise
            continue
        grid.lengths.append(length)
        grid.samples.append(cells)
    return grid


def draw_sample(
    generator: Generator,
    rng: random.Random,
    length: int,
    depth: float,
    count: int,
    given: bool = True,
) -> Sample:
    """A prompt that with its answer takes at most `length` tokens, and nearly as many.

    Args:
        count: needles.
        given: the length is one of --lengths, not the context; refusals say which.

    Raises:
        InputError: the needles alone take more.
    """
    facts = draw_needles(rng, count)
    key, value = facts[0]
    needles = [(depth, needle(key, value))]
    needles += [(rng.random(), needle(*fact)) for fact in facts[1:]]
    # Those that come to stand at one place are told in the order of their depths too.
    needles.sort(key=lambda pair: pair[0])
    first = rng.randrange(_MOST_FILLER)

    def prompt(sentences: int) -> str:
        return f"{haystack(filler(sentences, first), needles)}\n{question(key)}"

    room = length - answer_tokens(generator, value)
    low, high = 0, 1
    while len(generator.encode(prompt(high))) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(generator.encode(prompt(middle))) <= room
        low, high = (middle, high) if fits else (low, middle)
    needed = len(generator.encode(prompt(low))) + length - room
    if needed > length:
        raise _TooShortError(
            f"{_named(length, given)} is too short for --keys={count}, which takes {needed} "
            f"tokens; {_longer(given)}, or give fewer keys"
        )
    return Sample(prompt(low), value, low)


def answer_tokens(generator: Generator, value: str) -> int:
    """Tokens of a completion that shows where the value ends: with a full stop, or another."""
    assert generator.tokenizer is not None
    with_stop, alone = (generator.tokenizer.encode_behind(f" {value}{end}") for end in (".", ""))
    return max(len(with_stop), len(alone) + 1)


def _named(length: int, given: bool) -> str:
    return f"--lengths={length}" if given else f"the context of train.seq_len={length}"


def _longer(given: bool) -> str:
    return "give longer ones" if given else "train with a longer one"


def _check_places(
    sentences: int, length: int, depths: Sequence[float], count: int, given: bool
) -> None:
    if len({round(depth * sentences) for depth in depths}) < len(depths):
        listed = ",".join(f"{depth:g}" for depth in depths)
        raise _TooShortError(
            f"{_named(length, given)} with --keys={count} leaves room for {sentences} other "
            f"sentences, too few for --depths={listed} to be different places; "
            f"{_longer(given)}, or give fewer keys or fewer depths"
        )
