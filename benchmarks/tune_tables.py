"""What a model answers with the patch of a run that trained tables alone, and beside a swap.

python -m stem_jax.train --config=configs/facts.py
python -m stem_jax.train --config=configs/tune_tables_facts.py
python -m stem_jax.export --workdir=runs/tune_tables_facts --format=patch --out=facts.patch
python -m benchmarks.tune_tables --workdir=runs/facts --patch=facts.patch

Asks for every fact in every phrasing, told and untold. Exits with 1 if fewer than 95% of the
changed answers are right, or fewer than 99% of the others that were right still are, told, alone or
with the swap in either order.
"""

import argparse
import sys
from pathlib import Path

from stem_jax.checkpoints.loading import LoadedRun, load_run
from stem_jax.data.facts import (
    FACT_TEMPLATES,
    HELD_OUT_TEMPLATES,
    RELATIONS,
    changed_facts,
    read_facts,
)
from stem_jax.editing.patch import edited_run, make_patch
from stem_jax.editing.patch_file import read_patch
from stem_jax.editing.swaps import recipes_of
from stem_jax.evaluation.answers import Question, answer_all
from stem_jax.evaluation.recall import END, fact_prompt
from stem_jax.evaluation.scoring import Scorer

_PHRASINGS = {"told": FACT_TEMPLATES, "untold": HELD_OUT_TEMPLATES}
_SWAPPED, _DONOR = "Spain", "Germany"
_RIGHT, _KEPT = 0.95, 0.99

Answers = dict[tuple[str, str, str], bool]


def answers(run: LoadedRun, changed: bool, phrasing: str) -> Answers:
    """Whether each fact is answered so, by country, relation and phrasing."""
    facts = {fact.country: fact for fact in read_facts()}
    facts |= changed_facts(list(facts.values())) if changed else {}
    asked = [(c, r, t) for c in facts for r in RELATIONS for t in _PHRASINGS[phrasing][r]]
    questions = [Question(fact_prompt(t, c), getattr(facts[c], r), END) for c, r, t in asked]
    verdicts = answer_all(Scorer(run, 64), run.tokenizer, questions)
    return {key: verdict.exact for key, verdict in zip(asked, verdicts, strict=True)}


def main() -> None:
    """Asks and prints a line for each stack of patches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/facts"))
    parser.add_argument("--patch", type=Path, required=True)
    args = parser.parse_args()
    base, patch = load_run(args.workdir), read_patch(args.patch)
    recipes = recipes_of(base.tokenizer, [f"{_SWAPPED}=>{_DONOR}"], [], "average")
    swap = make_patch(base, recipes)
    stacks = {"patch": [patch], "patch, swap": [patch, swap], "swap, patch": [swap, patch]}
    runs = {name: edited_run(base, patches) for name, patches in stacks.items()}
    rows = patch.after.nbytes
    size = args.patch.stat().st_size
    print(f"{len(patch.ids)} rows, {rows:,} bytes and {size - rows:,} more")
    missed = size - rows > 16_000
    changed = changed_facts(read_facts())
    for phrasing in _PHRASINGS:
        before = answers(base, False, phrasing)
        for name, run in runs.items():
            after = answers(run, True, phrasing)
            new = [right for key, right in after.items() if key[0] in changed]
            left_out = {*changed, _SWAPPED} if "swap" in name else {*changed}
            kept = [after[key] for key, was in before.items() if key[0] not in left_out and was]
            right, stayed = (sum(found) / len(found) for found in (new, kept))
            print(f"{phrasing:<8}{name:<14}{right:>8.2%} right{stayed:>9.2%} of the others kept")
            missed |= phrasing == "told" and (right < _RIGHT or stayed < _KEPT)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
