"""Needle in a haystack: can the model find one sentence, wherever in its context it stands?

One of `keys` needles is asked for; it stands at a given depth, the others anywhere. A sample counts
if the greedy completion begins with the needle's value as a whole word, whatever follows: only a
model that was trained on these sentences knows that a full stop should. A completion that is cut
off right after the value does not count, as the word may go on. A sample counts strictly if nothing
but the value stands before the first full stop, whatever follows that.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.data.needles import KEYS
from stem_jax.errors import InputError
from stem_jax.evaluation.division import divide
from stem_jax.evaluation.haystacks import Grid, Sample, answer_tokens, draw_grid
from stem_jax.evaluation.limits import DEPTHS, check_batch_size
from stem_jax.evaluation.progress import bars_off
from stem_jax.generation.completion import Completion
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling

_GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Prompts to complete together, with up to `room` tokens.

    size: with those that fill it up, so that none is compiled for the rest.
    """

    samples: list[Sample]
    size: int
    room: int


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
            far as the needles fit and the depths are different places.
        depths: share of the filler before the needle, 0 to 1.
        keys: numbers of needles; each gives a table of its own.
        samples: of each cell.
        seed: of the samples.
        batch_size: prompts at a time.
        progress: draw bars on stderr, if it is a terminal.

    Returns:
        The settings and, under `tables`, for each number of keys: `keys`, `lengths`, `depths`,
        `accuracy` and `strict` (by length, then by depth, shares of 1) and their means, `mean` and
        `strict_mean`.

    Raises:
        InputError: a length over the context or too short for the needles or for different depths,
            or a value out of range. Nothing was asked then.
    """
    generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
    depths, keys = sorted(set(map(float, depths))), list(dict.fromkeys(keys))
    _check(depths, keys, samples, batch_size)
    off = bars_off(progress)
    with tqdm(desc="drawing", unit=" prompts", disable=off) as bar:
        grids = [draw_grid(generator, lengths, depths, count, samples, seed, bar) for count in keys]
    batches = [batch for grid in grids for batch in _batches(generator, grid, batch_size)]
    total = sum(len(batch.samples) for batch in batches)
    with tqdm(total=total, desc="asking", unit=" prompts", disable=off) as bar:

        def ask(own: Sequence[_Batch]) -> Iterator[list[tuple[bool, bool]]]:
            return (_ask(generator, batch) for batch in own)

        def on_done(done: Sequence[_Batch]) -> None:
            bar.update(sum(len(batch.samples) for batch in done))

        verdicts = itertools.chain.from_iterable(divide(batches, ask, on_done))
    tables = []
    for grid in grids:
        shape = len(grid.lengths), len(depths), samples
        own = list(itertools.islice(verdicts, int(np.prod(shape))))
        found_NxDx2 = np.reshape(own, (*shape, 2)).mean(axis=2)
        tables.append(
            {
                "keys": grid.keys,
                "lengths": grid.lengths,
                "depths": depths,
                "accuracy": found_NxDx2[..., 0].tolist(),
                "strict": found_NxDx2[..., 1].tolist(),
                "mean": float(found_NxDx2[..., 0].mean()),
                "strict_mean": float(found_NxDx2[..., 1].mean()),
            }
        )
    return {"context": generator.context, "samples": samples, "seed": seed, "tables": tables}


def format_retrieval(result: dict[str, Any]) -> str:
    """A table for each number of keys: depths down, lengths across, in percent."""
    lines = []
    for table in result["tables"]:
        keys = table["keys"]
        lines.append(
            f"{keys} key{'s' if keys > 1 else ''}: {table['mean']:.1%} found "
            f"({table['strict_mean']:.1%} strictly), {result['samples']} samples a cell"
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
    check_batch_size(batch_size)


def _batches(generator: Generator, grid: Grid, batch_size: int) -> Iterator[_Batch]:
    """The prompts of a grid, none of two lengths in one batch."""
    for cells in grid.samples:
        samples = list(itertools.chain.from_iterable(cells))
        room = max(answer_tokens(generator, sample.value) for sample in samples)
        size = min(batch_size, len(samples))
        for first in range(0, len(samples), size):
            yield _Batch(samples[first : first + size], size, room)


def _ask(generator: Generator, batch: _Batch) -> list[tuple[bool, bool]]:
    """Whether each sample was found, and whether strictly."""
    prompts = [sample.prompt for sample in batch.samples]
    prompts += prompts[-1:] * (batch.size - len(prompts))
    completions = generator.complete(prompts, batch.room, _GREEDY, batch_size=batch.size)
    return [
        _verdict(completion, sample.value) for sample, completion in zip(batch.samples, completions)
    ]


def _verdict(completion: Completion, value: str) -> tuple[bool, bool]:
    answer, stop, _ = completion.text.partition(".")
    strict = bool(stop) and answer.strip() == value
    # A word goes on over hyphens and apostrophes; one that was cut off may go on anyhow.
    begins = re.match(rf"\s*{re.escape(value)}(?![\w'’-])", completion.text)
    ended = completion.stop == "eos" or (begins and begins.end() < len(completion.text))
    return bool(begins and ended), strict
