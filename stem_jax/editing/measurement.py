"""What edits do, measured as knowledge-editing benchmarks do (CounterFact, arXiv 2202.05262).

Every edit is made alone and asked about alone, but all of them in one go: the rows of all edits lie
beside the table, and each question reads those of its edit.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.editing.cases import EditCase
from stem_jax.editing.choices import WRITTEN
from stem_jax.editing.patch import make_patch, read_rows, token_memory
from stem_jax.editing.swaps import RowRecipe, swap_recipes
from stem_jax.errors import InputError
from stem_jax.evaluation.answers import Question, Verdict, answer_all
from stem_jax.evaluation.progress import bars_off
from stem_jax.evaluation.scoring import Scorer
from stem_jax.memory.memory import STEM
from stem_jax.tables.overlaid_rows import OverlaidRows

NOT_READ = "not read"
# Of rows that lie beside the table at a time.
_LAID_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class EditOutcome:
    """What one edit did.

    base: the old answer was given before. answer: which one is given after, "new", "old" or
    "other"; NOT_READ if the prompt reads none of the rows that were written, as where the subject
    has other tokens in it (at its start, in quotes, in capitals) or is absent. preferred: the new
    answer is likelier per token than the old one; None likewise. paraphrases: whether each of them
    gives the new answer. locality, specificity: whether each answer that was right before still is;
    those that were wrong are left out, and so is, of all three, what reads no such row: nothing can
    change it, and that says nothing about the edit.
    """

    case: EditCase
    base: bool
    answer: str
    preferred: bool | None
    paraphrases: tuple[bool, ...]
    locality: tuple[bool, ...]
    specificity: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class LaidEdits:
    """The rows of many edits beside a run's table.

    run: reads row V + e as the e-th of them. keys: for each edit, the key read for a token id.
    rows: of the run; None where there are no such rows. memory: whose rows they are.
    """

    run: LoadedRun
    keys: list[dict[int, int]]
    rows: OverlaidRows | None = None
    memory: str = STEM


def measure_edits(
    run: LoadedRun,
    cases: Sequence[EditCase],
    *,
    strategy: str = "average",
    layers: Sequence[int] | None = None,
    written: str = "rows",
    memory: str = STEM,
    batch_size: int = 64,
    progress: bool = True,
) -> list[EditOutcome]:
    """Makes each edit alone and asks its questions before and after.

    Args:
        strategy: see `swaps.swap_recipes`.
        layers: whose rows are written; None: all with tables.
        written: "rows", or "embedding" for contrast: the donor's token embedding is read in place
            of the subject's, whose rows stay.
        memory: whose rows are written.
        batch_size: prompts at a time.
        progress: draw a bar on stderr, if it is a terminal.

    Raises:
        InputError: no edits, names that the strategy does not fit, a dense model, layers without
            tables, layers beside embeddings, or embeddings of names with different numbers of
            tokens.
    """
    if not cases:
        raise InputError("there are no edits to measure")
    if written not in WRITTEN:
        raise InputError(f"--write={written} must be one of {', '.join(WRITTEN)}")
    recipes = [swap_recipes(run.tokenizer, case.swap, strategy) for case in cases]
    if written == "embedding":
        if layers is not None:
            raise InputError(f"--write=embedding writes no rows; leave --layers={layers} out")
        laid = LaidEdits(run, [])
        edits = [{"embedded": _embedded(case, of)} for case, of in zip(cases, recipes)]
        return _ask(laid, cases, edits, batch_size, progress)
    outcomes = []
    of_tokens = token_memory(run.config, memory)
    most = max(1, _LAID_BYTES // (4 * of_tokens.vectors * of_tokens.width))
    for part in _parts(recipes, most):
        laid = lay_edits(run, recipes[part], layers, memory)
        edits = [{"keys": keys} for keys in laid.keys]
        outcomes += _ask(laid, cases[part], edits, batch_size, progress)
    return outcomes


def _parts(recipes: Sequence[Sequence[RowRecipe]], most: int) -> Iterator[slice]:
    """Pieces of the edits that write at most so many rows each, or are one edit."""
    first = rows = 0
    for number, edit in enumerate(recipes):
        if number > first and rows + len(edit) > most:
            yield slice(first, number)
            first, rows = number, 0
        rows += len(edit)
    yield slice(first, len(recipes))


def _ask(
    laid: LaidEdits,
    cases: Sequence[EditCase],
    edits: Sequence[Mapping[str, Mapping[int, int]]],
    batch_size: int,
    progress: bool,
) -> list[EditOutcome]:
    before, after = [], []
    for case, edit in zip(cases, edits, strict=True):
        before += [Question(case.prompt, case.old, case.end), *_unchanged(case, {})]
        after += _asked(case, edit)
    total, off = len(before) + len(after), bars_off(progress)
    with tqdm(total=total, desc="edits", unit=" questions", disable=off) as bar:
        scorer = Scorer(laid.run, batch_size, keyed=laid.memory)
        tokenizer = laid.run.tokenizer
        old = iter(answer_all(scorer, tokenizer, before, bar.update))
        new = iter(answer_all(scorer, tokenizer, after, bar.update))
    return [_outcome(case, old, new) for case in cases]


def lay_edits(
    run: LoadedRun,
    edits: Sequence[Sequence[RowRecipe]],
    layers: Sequence[int] | None = None,
    memory: str = STEM,
) -> LaidEdits:
    """The rows that each edit writes, beside the table instead of in it.

    Raises:
        InputError: layers without tables.
    """
    flat = [recipe for recipes in edits for recipe in recipes]
    patch = make_patch(run, flat, layers=layers, memory=memory)
    rows_ExSxF = read_rows(run, patch.ids, memory)
    having = token_memory(run.config, memory).layers
    columns = [having.index(layer) for layer in patch.layers.tolist()]
    rows_ExSxF[:, columns] = patch.after
    V = run.config.model.vocab_size
    keys, number = [], V
    for recipes in edits:
        keys.append({recipe.token_id: number + i for i, recipe in enumerate(recipes)})
        number += len(recipes)
    # No token id is led anywhere for all questions alike.
    rows = OverlaidRows(run.rows[memory], V, rows_ExSxF, np.full(len(flat), -1))
    return LaidEdits(run.with_rows(memory, rows), keys, rows, memory)


def _embedded(case: EditCase, recipes: Sequence[RowRecipe]) -> dict[int, int]:
    if any(len(recipe.parts) != 1 for recipe in recipes):
        raise InputError(
            f"--write=embedding: {case.subject!r} and {case.donor!r} have different numbers of "
            "tokens; measure names of one token (--tokens=one)"
        )
    return {recipe.token_id: recipe.parts[0][1] for recipe in recipes}


def _unchanged(case: EditCase, edit: Mapping[str, Mapping[int, int]]) -> list[Question]:
    probes = [*case.locality, *case.specificity]
    return [Question(probe.prompt, probe.answer, case.end, **edit) for probe in probes]


def _asked(case: EditCase, edit: Mapping[str, Mapping[int, int]]) -> list[Question]:
    """All that is asked after an edit, in the order in which `_outcome` reads it."""
    return [
        Question(case.prompt, case.new, case.end, **edit),
        Question(case.prompt, case.old, case.end, **edit),
        *(Question(prompt, case.new, case.end, **edit) for prompt in case.paraphrases),
        *_unchanged(case, edit),
    ]


def _outcome(case: EditCase, before, after) -> EditOutcome:
    base: Verdict = next(before)
    to_new, to_old = next(after), next(after)
    rephrased = [next(after) for _ in case.paraphrases]
    kept = []
    for probes in (case.locality, case.specificity):
        pairs = [(next(before), next(after)) for _ in probes]
        kept.append(tuple(now.exact for was, now in pairs if was.exact and now.reads))
    answer = "new" if to_new.exact else "old" if to_old.exact else "other"
    preferred = to_new.log_likelihood > to_old.log_likelihood
    return EditOutcome(
        case=case,
        base=base.exact,
        answer=answer if to_new.reads else NOT_READ,
        preferred=preferred if to_new.reads else None,
        paraphrases=tuple(verdict.exact for verdict in rephrased if verdict.reads),
        locality=kept[0],
        specificity=kept[1],
    )
