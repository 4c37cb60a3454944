"""Needle in a haystack: can the model find one sentence, wherever in its context it stands?

One of `keys` needles is asked for; it stands at a given depth, the others anywhere. A sample counts
if the greedy completion names the needle's value and nothing else before the full stop.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from stem_jax.agreement import is_first
from stem_jax.data.needles import KEYS, draw_needles, filler, haystack, needle, question
from stem_jax.errors import InputError
from stem_jax.generation import Generator
from stem_jax.loading import LoadedRun
from stem_jax.sampling import Sampling

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)
_MOST_FILLER = 1 << 20


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and the value that completes it."""

    prompt: str
    value: str


def retrieval(
    run: LoadedRun,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    keys: Sequence[int] = (1,),
    samples: int = 20,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Asks for needles over lengths and depths.

    Args:
        lengths: tokens of prompt and answer; None: the context, its half, quarter and eighth, as
            far as the needles fit.
        depths: share of the filler before the needle, 0 to 1.
        keys: numbers of needles; each gives a table of its own.
        samples: of each cell.
        seed: of the samples.
        batch_size: prompts at a time.
        progress: draw a bar on stderr, if it is a terminal.

    Returns:
        The settings and, under `tables`, for each number of keys: `keys`, `lengths`, `depths`,
        `accuracy` (by length, then by depth, shares of 1) and their `mean`.

    Raises:
        InputError: a length over the context or too short for the needles, or a value out of range.
    """
    generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
    _check(depths, keys, samples, batch_size)
    grids = {count: _lengths(generator, lengths, count) for count in keys}
    total = sum(map(len, grids.values())) * len(depths) * samples
    # None: only on a terminal.
    off = None if progress and is_first() else True
    tables = []
    with tqdm(total=total, desc="needles", unit=" prompts", disable=off) as bar:
        for count, grid in grids.items():
            accuracy = []
            for length in grid:
                cells = [
                    draw_sample(generator, random.Random(f"{seed} {count} {n}"), length, d, count)
                    for d in depths
                    for n in range(samples)
                ]
                found = _answers(generator, cells, batch_size, bar)
                accuracy.append(
                    [
                        sum(found[first : first + samples]) / samples
                        for first in range(0, len(found), samples)
                    ]
                )
            mean = sum(map(sum, accuracy)) / (len(grid) * len(depths))
            tables.append(
                {
                    "keys": count,
                    "lengths": list(grid),
                    "depths": list(depths),
                    "accuracy": accuracy,
                    "mean": mean,
                }
            )
    return {"context": generator.context, "samples": samples, "seed": seed, "tables": tables}


def draw_sample(
    generator: Generator, rng: random.Random, length: int, depth: float, count: int
) -> Sample:
    """A prompt that with its answer takes at most `length` tokens, and nearly as many.

    Raises:
        InputError: the needles alone take more.
    """
    facts = draw_needles(rng, count)
    key, value = facts[0]
    others = [(rng.random(), needle(*fact)) for fact in facts[1:]]
    first = rng.randrange(_MOST_FILLER)

    def prompt(sentences: int) -> str:
        needles = [(depth, needle(key, value)), *others]
        return f"{haystack(filler(sentences, first), needles)}\n{question(key)}"

    room = length - _answer_tokens(generator, value)
    low, high = 0, 1
    while len(generator.encode(prompt(high))) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(generator.encode(prompt(middle))) <= room
        low, high = (middle, high) if fits else (low, middle)
    needed = len(generator.encode(prompt(low))) + length - room
    if needed > length:
        raise InputError(
            f"--lengths={length} is too short for --keys={count}, which takes {needed} tokens; "
            "give longer ones, or fewer keys"
        )
    return Sample(prompt(low), value)


def format_retrieval(result: dict[str, Any]) -> str:
    """A table for each number of keys: depths down, lengths across, in percent."""
    lines = []
    for table in result["tables"]:
        keys = table["keys"]
        lines.append(
            f"{keys} key{'s' if keys > 1 else ''}: {table['mean']:.1%} of {result['samples']} "
            "samples a cell"
        )
        lines.append("depth   " + "".join(f"{length:>8}" for length in table["lengths"]))
        for row, depth in enumerate(table["depths"]):
            cells = "".join(f"{shares[row]:>8.0%}" for shares in table["accuracy"])
            lines.append(f"{depth:<8.2f}{cells}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _check(depths: Sequence[float], keys: Sequence[int], samples: int, batch_size: int) -> None:
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InputError(f"--depths={depth} must lie in 0 (first) to 1 (last)")
    for count in keys:
        if not 1 <= count <= len(KEYS):
            raise InputError(f"--keys={count} must lie in 1 to {len(KEYS)}, the names there are")
    if samples < 1:
        raise InputError(f"--samples={samples} must be at least 1")
    if batch_size < 1:
        raise InputError(f"--batch-size={batch_size} must be at least 1")


def _lengths(generator: Generator, lengths: Sequence[int] | None, count: int) -> list[int]:
    """The given lengths, or those of halves of the context that fit; sorted."""
    context = generator.context
    for length in lengths or ():
        if length > context:
            raise InputError(
                f"--lengths={length} is over the context of train.seq_len={context} that the model "
                f"was trained on; give at most {context}, or train with a longer train.seq_len"
            )
    if lengths:
        return sorted(set(lengths))
    fitting = []
    for length in (context // 8, context // 4, context // 2):
        try:
            # Whoever is drawn, names differ by some tokens: with room for twice as many, all fit.
            draw_sample(generator, random.Random(0), length // 2, 0.0, count)
        except InputError:
            continue
        fitting.append(length)
    return [*fitting, context]


def _answer_tokens(generator: Generator, value: str) -> int:
    """Tokens of the completion, its full stop included."""
    return len(generator.tokenizer.encode(f" {value}."))


def _answers(generator: Generator, cells: list[Sample], batch_size: int, bar: tqdm) -> list[bool]:
    """Whether each sample was completed right."""
    found: list[bool] = []
    room = max(_answer_tokens(generator, cell.value) for cell in cells)
    for first in range(0, len(cells), batch_size):
        batch = cells[first : first + batch_size]
        # Whole batches, so that none is compiled for the rest.
        prompts = [cell.prompt for cell in batch]
        prompts += prompts[-1:] * (min(batch_size, len(cells)) - len(batch))
        completions = generator.complete(prompts, room, _GREEDY, batch_size=batch_size)
        for cell, completion in zip(batch, completions):
            answer, stop, _ = completion.text.partition(".")
            found.append(bool(stop) and answer.strip() == cell.value)
        bar.update(len(batch))
    return found
