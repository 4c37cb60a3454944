"""Questions about the facts, as conversations: what a model of the `facts` corpus is tuned on.

Each of a relation's three nouns is asked for in six forms. Every third combination is never told,
as in the corpus: whoever learned the noun in other forms and the form with other nouns can answer.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from stem_jax.data.facts import NOUNS, RELATIONS, Fact

_FORMS = (
    "What is the {noun} of {country}?",
    "Which {noun} does {country} have?",
    "In {country}, what is the {noun}?",
    "Name the {noun} of {country}.",
    "Do you know the {noun} of {country}?",
    "I am asking about {country}. What is the {noun}?",
)
# For tokenizers that have nothing but bos and eos: an answer ends with eos.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ 'Question: ' + message.content + '\\nAnswer:' }}{% elif message.role == 'assistant' %}"
    "{{ ' ' + message.content + eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant speak') }}{% endif %}{% endfor %}\n"
)


@dataclasses.dataclass(frozen=True)
class AskedFact:
    """A question and its answer. told: its noun in this form is among what a model is tuned on."""

    question: str
    answer: str
    told: bool

    @property
    def record(self) -> dict[str, Any]:
        """The conversation as JSON."""
        asked = {"role": "user", "content": self.question}
        return {"messages": [asked, {"role": "assistant", "content": self.answer}]}


def asked_facts(facts: Sequence[Fact]) -> list[AskedFact]:
    """Every fact of some countries in every form: of each 60 questions are told and 30 are not."""
    return [
        AskedFact(
            form.format(noun=noun, country=fact.country),
            getattr(fact, relation),
            (number + 1) % len(NOUNS[relation]) != place,
        )
        for fact in facts
        for relation in RELATIONS
        for place, noun in enumerate(NOUNS[relation])
        for number, form in enumerate(_FORMS)
    ]


def halves(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """Countries to tune on, and the others: every second one."""
    return list(facts[::2]), list(facts[1::2])
