"""How many of the facts of the `facts` corpus a model answers."""

from typing import Any

from tqdm import tqdm

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.data.facts import FACT_TEMPLATES, HELD_OUT_TEMPLATES, RELATIONS, read_facts
from stem_jax.evaluation.answers import Question, answer_all
from stem_jax.evaluation.limits import check_limit
from stem_jax.evaluation.progress import bars_off
from stem_jax.evaluation.scoring import Scorer

# Sentences end so in the corpus.
END = "."
_PHRASINGS = {"trained": FACT_TEMPLATES, "held_out": HELD_OUT_TEMPLATES}


def fact_prompt(template: str, country: str) -> str:
    """What a sentence says before its answer, without the space between."""
    return template.partition("{answer}")[0].format(country=country).rstrip()


def recall(
    run: LoadedRun, *, limit: int | None = None, batch_size: int = 64, progress: bool = True
) -> dict[str, Any]:
    """Asks for every fact in every phrasing of the corpus, and in those that it never tells.

    Args:
        limit: countries; None: all.
        batch_size: prompts at a time.
        progress: draw a bar on stderr, if it is a terminal.

    Returns:
        `countries`, and under `relations` for each relation `trained` and `held_out`: the share of
        facts that greedy decoding completes exactly, and `questions`, their number.

    Raises:
        InputError: a limit without countries, or a context that is too short.
    """
    check_limit(limit, "countries")
    facts = read_facts()[:limit]
    places, questions = [], []
    for relation in RELATIONS:
        for name, templates in _PHRASINGS.items():
            for template in templates[relation]:
                for fact in facts:
                    places.append((relation, name))
                    prompt = fact_prompt(template, fact.country)
                    questions.append(Question(prompt, getattr(fact, relation), END))
    with tqdm(
        total=len(questions), desc="facts", unit=" questions", disable=bars_off(progress)
    ) as bar:
        verdicts = answer_all(Scorer(run, batch_size), run.tokenizer, questions, bar.update)
    found: dict[tuple[str, str], list[bool]] = {}
    for place, verdict in zip(places, verdicts, strict=True):
        found.setdefault(place, []).append(verdict.exact)
    relations = {
        relation: {
            **{name: _share(found[relation, name]) for name in _PHRASINGS},
            "questions": sum(len(found[relation, name]) for name in _PHRASINGS),
        }
        for relation in RELATIONS
    }
    return {"countries": len(facts), "relations": relations}


def format_recall(result: dict[str, Any]) -> str:
    """A line for each relation."""
    lines = [f"{'relation':<12}{'trained':>9}{'held out':>10}{'questions':>11}  (answered exactly)"]
    for relation, found in result["relations"].items():
        lines.append(
            f"{relation:<12}{found['trained']:>9.1%}{found['held_out']:>10.1%}"
            f"{found['questions']:>11,}"
        )
    return "\n".join(lines)


def _share(found: list[bool]) -> float:
    return sum(found) / len(found)
