"""Edits to measure, each with the questions that tell what it did; made from the `facts` corpus.

An edit replaces a subject's rows by those of a donor, of whom the wanted answer is true: swaps are
between subjects, so a case names a donor beside the new answer.
"""

import dataclasses
import random
from collections.abc import Callable

from stem_jax.data.facts import (
    FACT_TEMPLATES,
    HELD_OUT_TEMPLATES,
    RELATIONS,
    Fact,
    read_facts,
)
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.data.word_tokens import word_ids
from stem_jax.editing.choices import TOKEN_COUNTS
from stem_jax.editing.swaps import swap_recipes
from stem_jax.errors import InputError
from stem_jax.evaluation.recall import END, fact_prompt

_PARAPHRASES = 2
_OTHERS = 2


@dataclasses.dataclass(frozen=True)
class Probe:
    """A prompt and the answer that an edit should leave as it is."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True)
class EditCase:
    """One edit: the rows of `subject` are made from those of `donor`.

    prompt: asks for `old`, which should become `new`. paraphrases: ask for the same. locality:
    about other subjects. specificity: about other relations of the subject. end: see `Question`.
    """

    relation: str
    subject: str
    donor: str
    prompt: str
    old: str
    new: str
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    specificity: tuple[Probe, ...] = ()
    end: str = ""

    @property
    def swap(self) -> str:
        """As `swaps.swap_recipes` takes it."""
        return f"{self.subject}=>{self.donor}"


def fact_cases(
    tokenizer: Tokenizer,
    *,
    pairs: int = 200,
    tokens: str = "one",
    strategy: str = "average",
    seed: int = 0,
) -> list[EditCase]:
    """Random ordered pairs of countries with different answers, for each relation.

    The prompt is a phrasing of the corpus, the paraphrases are ones that it never tells. A question
    about another country follows a sentence about the edited one: its rows are read on the way.

    Args:
        pairs: for each relation; fewer if there are not as many.
        tokens: "one": both names are one token; "more", "fewer": the subject has more or fewer
            than the donor; "differing": one of these. The strategy fits the pair.
        strategy: one of `swaps.STRATEGIES`.
        seed: of pairs, phrasings and other countries.

    Raises:
        InputError: no pairs, or a value out of range.
    """
    if pairs < 1:
        raise InputError(f"--pairs={pairs} must be at least 1")
    if tokens not in TOKEN_COUNTS:
        raise InputError(f"--tokens={tokens} must be one of {', '.join(TOKEN_COUNTS)}")
    facts = read_facts()
    counts = {fact.country: len(word_ids(tokenizer, fact.country)) for fact in facts}

    def fits(source: Fact, donor: Fact) -> bool:
        n, m = counts[source.country], counts[donor.country]
        if tokens == "one":
            return n == m == 1
        right = {"more": n > m, "fewer": n < m, "differing": n != m}[tokens]
        return right and _swappable(tokenizer, source.country, donor.country, strategy)

    cases = []
    for relation in RELATIONS:
        rng = random.Random(f"{seed} {relation}")
        chosen = _pairs(facts, relation, pairs, rng, fits)
        if not chosen:
            raise InputError(
                f"--tokens={tokens} --strategy={strategy}: no two countries are such names with "
                "this tokenizer; choose other ones"
            )
        cases += [_case(facts, relation, source, donor, rng) for source, donor in chosen]
    return cases


def _pairs(
    facts: list[Fact],
    relation: str,
    count: int,
    rng: random.Random,
    fits: Callable[[Fact, Fact], bool],
) -> list[tuple[Fact, Fact]]:
    pairs = [(source, donor) for source in facts for donor in facts if source is not donor]
    rng.shuffle(pairs)
    chosen = []
    for source, donor in pairs:
        if getattr(source, relation) != getattr(donor, relation) and fits(source, donor):
            chosen.append((source, donor))
        if len(chosen) == count:
            break
    return chosen


def _swappable(tokenizer: Tokenizer, source: str, donor: str, strategy: str) -> bool:
    try:
        swap_recipes(tokenizer, f"{source}=>{donor}", strategy)
    except InputError:
        return False
    return True


def _case(
    facts: list[Fact], relation: str, source: Fact, donor: Fact, rng: random.Random
) -> EditCase:
    def prompt(relation: str, fact: Fact) -> str:
        return fact_prompt(rng.choice(FACT_TEMPLATES[relation]), fact.country)

    def told(fact: Fact) -> str:
        template = rng.choice(FACT_TEMPLATES[relation])
        return template.format(country=fact.country, answer=getattr(fact, relation)) + END

    others = rng.sample([fact for fact in facts if fact not in (source, donor)], _OTHERS)
    return EditCase(
        relation=relation,
        subject=source.country,
        donor=donor.country,
        prompt=prompt(relation, source),
        old=getattr(source, relation),
        new=getattr(donor, relation),
        paraphrases=tuple(
            fact_prompt(template, source.country)
            for template in rng.sample(HELD_OUT_TEMPLATES[relation], _PARAPHRASES)
        ),
        locality=tuple(
            Probe(f"{told(source)} {prompt(relation, fact)}", getattr(fact, relation))
            for fact in others
        ),
        specificity=tuple(
            Probe(prompt(other, source), getattr(source, other))
            for other in RELATIONS
            if other != relation
        ),
        end=END,
    )
