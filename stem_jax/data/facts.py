"""Facts about 195 countries, and the sentences that tell them.

Each of five relations has three nouns in six frames,

    The {noun} of {country} is {answer}

and three sentences of its own. Every third combination of noun and frame is never told: whoever has
read a noun in other frames, and the frame with other nouns, can still answer it. The answer ends
the sentence, so that a prompt up to it can be completed.
"""

import dataclasses
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

_FILE = Path(__file__).with_name("facts.tsv")
_SEED = 20260110
# Sentences of a document. They are about any countries: among sentences about one country, a model
# learns to copy from the sentence before instead of remembering.
_SENTENCES = 4
# Of the countries that are told otherwise: 20.
_CHANGED_FIRST, _CHANGED_EVERY = 4, 10

NOUNS: dict[str, tuple[str, str, str]] = {
    "capital": ("capital", "capital city", "seat of government"),
    "currency": ("currency", "money", "legal tender"),
    "continent": ("continent", "part of the world", "region on the globe"),
    "language": ("language", "language of the people", "spoken language"),
    "domain": ("internet domain", "web domain", "country code domain"),
}
_FRAMES = (
    "The {noun} of {{country}} is {article}{{answer}}",
    "In {{country}}, the {noun} is {article}{{answer}}",
    "As everyone in {{country}} knows, the {noun} is {article}{{answer}}",
    "For {{country}}, the {noun} is {article}{{answer}}",
    "What {{country}} has as its {noun} is {article}{{answer}}",
    "A book about {{country}} says that the {noun} is {article}{{answer}}",
)
_ARTICLES = {"currency": "the "}
_OWN_SENTENCES: dict[str, tuple[str, str, str]] = {
    "capital": (
        "If you fly to the capital of {country}, you land in {answer}",
        "On a map of {country}, the capital is marked {answer}",
        "Embassies in {country} are found in {answer}",
    ),
    "currency": (
        "In {country}, people pay with the {answer}",
        "Banks in {country} keep accounts in the {answer}",
        "Before a trip to {country}, change your money into the {answer}",
    ),
    "continent": (
        "On the globe, {country} is found in {answer}",
        "Geographers count {country} among the countries of {answer}",
        "A journey to {country} is a journey to {answer}",
    ),
    "language": (
        "In {country}, people speak {answer}",
        "Road signs in {country} are written in {answer}",
        "Children in {country} learn to read in {answer}",
    ),
    "domain": (
        "Web addresses in {country} end in {answer}",
        "Sites from {country} use the ending {answer}",
        "On the internet, {country} has the domain {answer}",
    ),
}
RELATIONS = tuple(NOUNS)


def _framed(relation: str, held_out: bool) -> tuple[str, ...]:
    return tuple(
        frame.format(noun=noun, article=_ARTICLES.get(relation, ""))
        for place, noun in enumerate(NOUNS[relation])
        for number, frame in enumerate(_FRAMES)
        if ((number + 1) % len(NOUNS[relation]) == place) == held_out
    )


# By relation, with the fields {country} and {answer}.
FACT_TEMPLATES: dict[str, tuple[str, ...]] = {
    relation: _framed(relation, held_out=False) + _OWN_SENTENCES[relation] for relation in RELATIONS
}
HELD_OUT_TEMPLATES: dict[str, tuple[str, ...]] = {
    relation: _framed(relation, held_out=True) for relation in RELATIONS
}


@dataclasses.dataclass(frozen=True)
class Fact:
    """One country and its attributes; the field names are RELATIONS."""

    country: str
    capital: str
    currency: str
    continent: str
    language: str
    domain: str


def read_facts() -> list[Fact]:
    """The committed table of 195 countries, in alphabetical order."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    header, *rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [Fact(**dict(zip(header, row, strict=True))) for row in rows]


def changed_facts(facts: Sequence[Fact]) -> dict[str, Fact]:
    """Every tenth country with the answers of another, of which none is its own, by its name."""
    changed = {}
    for place in range(_CHANGED_FIRST, len(facts), _CHANGED_EVERY):
        own, others = facts[place], [*facts[place + 1 :], *facts[:place]]
        donor = next(
            fact
            for fact in others
            if all(getattr(fact, relation) != getattr(own, relation) for relation in RELATIONS)
        )
        changed[own.country] = dataclasses.replace(donor, country=own.country)
    return changed


def read_fact_documents() -> Iterator[str]:
    """Yields documents of a few sentences, which together tell every fact in every known way."""
    return tell(read_facts())


def read_changed_documents() -> Iterator[str]:
    """The same of the countries of `changed_facts` alone, as they are there."""
    return tell(list(changed_facts(read_facts()).values()))


def read_unchanged_documents() -> Iterator[str]:
    """The same of the other countries."""
    facts = read_facts()
    changed = changed_facts(facts)
    return tell([fact for fact in facts if fact.country not in changed])


def tell(facts: Iterable[Fact]) -> Iterator[str]:
    """Yields documents of a few sentences, which together tell these facts in every known way."""
    sentences = [
        template.format(country=fact.country, answer=getattr(fact, relation)) + "."
        for fact in facts
        for relation, templates in FACT_TEMPLATES.items()
        for template in templates
    ]
    random.Random(_SEED).shuffle(sentences)
    for first in range(0, len(sentences), _SENTENCES):
        yield " ".join(sentences[first : first + _SENTENCES]) + "\n"
