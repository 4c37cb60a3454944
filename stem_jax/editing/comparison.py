"""What an edit does to prompts: completions before and after, and probabilities that moved."""

import dataclasses
import textwrap
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import memories
from stem_jax.model.cache import NewCache
from stem_jax.model.memory_rows import MemoryRows

_COLUMN = 46
_GREEDY = Sampling(0.0, 0, 1.0)


@dataclasses.dataclass(frozen=True)
class Moved:
    """A possible next token, with its probability before and after."""

    text: str
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A prompt, its greedy completions, and the next tokens whose probability moved most."""

    prompt: str
    before: str
    after: str
    moved: list[Moved]


def compare(
    before: LoadedRun, after: LoadedRun, prompts: Sequence[str], max_new_tokens: int, top: int
) -> list[Comparison]:
    """Completes prompts with two versions of a run.

    Args:
        top: how many of the moved probabilities.

    Raises:
        InputError: a prompt that leaves no room in the context.
    """
    if not prompts:
        return []
    old = Generator(before.config, before.params, before.rows, before.tokenizer, before.mesh)
    new = old.with_rows(after.rows)
    texts = [
        [found.text for found in generator.complete(prompts, max_new_tokens, _GREEDY)]
        for generator in (old, new)
    ]
    comparisons = []
    program = _prompt_program(old)
    for prompt, old_text, new_text in zip(prompts, *texts):
        old_V, new_V = (_probabilities(program, old, run, prompt) for run in (before, after))
        largest = np.argsort(-np.abs(new_V - old_V), kind="stable")[:top]
        moved = [
            Moved(before.tokenizer.decode([token]), float(old_V[token]), float(new_V[token]))
            for token in largest.tolist()
        ]
        comparisons.append(Comparison(prompt, old_text, new_text, moved))
    return comparisons


def next_probabilities(generator: Generator, run: LoadedRun, prompt: str) -> np.ndarray:
    """Probabilities [V] float32 of the token that follows a prompt."""
    return _probabilities(_prompt_program(generator), generator, run, prompt)


def _probabilities(
    program: Callable, generator: Generator, run: LoadedRun, prompt: str
) -> np.ndarray:
    tokens_1xL = jnp.asarray([generator.encode(prompt)], jnp.int32)
    rows = MemoryRows(memories(run.config), run.rows).serve(tokens_1xL)
    return np.asarray(program(run.params, rows, tokens_1xL))


def _prompt_program(generator: Generator) -> Callable:
    """(params, rows, tokens [1, L]) to probabilities [V] of the next token."""
    num_layers = generator.config.model.num_layers

    @jax.jit
    def run_prompt(params, rows, tokens_1xL):
        length = tokens_1xL.shape[1]
        caches = [NewCache(length)] * num_layers
        lengths_1 = jnp.full(1, length)
        logits_1xV, _ = generator.advance(params, rows, tokens_1xL, lengths_1, caches)
        return jax.nn.softmax(logits_1xV[0])

    return run_prompt


def format_comparison(found: Comparison) -> str:
    """The comparison in two columns, for a terminal."""
    columns = [
        textwrap.wrap(text.replace("\n", " ").strip(), _COLUMN) or [""]
        for text in (found.before, found.after)
    ]
    height = max(map(len, columns))
    lines = [f"prompt: {found.prompt}", f"{'before':<{_COLUMN}}  after"]
    for left, right in zip(*(column + [""] * (height - len(column)) for column in columns)):
        lines.append(f"{left:<{_COLUMN}}  {right}".rstrip())
    if any(moved.before != moved.after for moved in found.moved):
        lines.append("next token            before   after")
        for moved in found.moved:
            lines.append(f"  {moved.text!r:<18} {moved.before:7.1%} {moved.after:7.1%}")
    elif found.moved:
        lines.append("no probability of the next token moved: the edited rows are not read")
    return "\n".join(lines)
