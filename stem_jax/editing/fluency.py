"""Whether an edited model still writes text, rather than the same words again and again."""

import collections
import dataclasses
import math
from collections.abc import Sequence

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.editing.cases import EditCase
from stem_jax.editing.measurement import lay_edits
from stem_jax.editing.swaps import swap_recipes
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.memory import STEM
from stem_jax.tables.overlaid_rows import SequenceKeys

# Of the n-gram entropies, as for CounterFact.
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
_SAMPLING = Sampling(temperature=1.0, top_k=5, top_p=1.0)


@dataclasses.dataclass(frozen=True)
class Fluency:
    """Mean `ngram_entropy` in bits of completions without and with an edit, of some edits."""

    before: float
    after: float
    edits: int


def fluency(
    run: LoadedRun,
    cases: Sequence[EditCase],
    strategy: str = "average",
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 100,
    edits: int = 32,
    memory: str = STEM,
) -> Fluency:
    """Samples a completion of each prompt before and after its edit (the five likeliest tokens).

    Args:
        strategy, layers, memory: see `measure_edits`.
        max_new_tokens: of a completion; the context may end it before.
        edits: how many of the cases, spread evenly.

    Raises:
        InputError: a prompt that leaves no room in the context, or as `measure_edits` does.
    """
    chosen = [cases[i] for i in sorted({i * len(cases) // edits for i in range(edits)})]
    recipes = [swap_recipes(run.tokenizer, case.swap, strategy) for case in chosen]
    laid = lay_edits(run, recipes, layers, memory)
    run = laid.run
    # One batch, so that one program serves for both: without edits, then with them.
    keys: list[dict[int, int]] = [{} for _ in chosen]
    keys += laid.keys
    assert laid.rows is not None
    rows = SequenceKeys(laid.rows, run.config.model.vocab_size, keys)
    of_run = run.with_rows(memory, rows).rows
    generator = Generator(run.config, run.params, of_run, run.tokenizer, run.mesh)
    prompts = 2 * [case.prompt for case in chosen]
    completions = generator.complete(prompts, max_new_tokens, _SAMPLING, batch_size=len(prompts))
    entropies = [ngram_entropy(found.text) for found in completions]
    n = len(chosen)
    return Fluency(sum(entropies[:n]) / n, sum(entropies[n:]) / n, n)


def ngram_entropy(text: str) -> float:
    """Weighted mean of the entropies of a text's word bigrams and trigrams, in bits.

    Source: GE of CounterFact (arXiv 2202.05262, section 3.3), after Zhang et al. (arXiv
    1809.05972); words are what stands between spaces.
    """
    words = text.split()
    total = 0.0
    for n, weight in _WEIGHTS.items():
        counts = collections.Counter(zip(*(words[i:] for i in range(n))))
        size = sum(counts.values())
        total += weight * sum(-c / size * math.log2(c / size) for c in counts.values())
    return total / len(_WEIGHTS)
