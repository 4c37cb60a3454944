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
# By the tokens that a country's name has in a sentence.
NAMES = ("one_token", "several_tokens")


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
        facts that greedy decoding completes exactly, and `questions`, their number. Under `names`
        likewise, over all relations, of countries whose names are `one_token` or `several_tokens`
        in a sentence, and their number, `countries`; a share of no questions is None.

    Raises:
        InputError: a limit without countries, or a context that is too short.
    """
    check_limit(limit, "countries")
    facts = read_facts()[:limit]
    tokens = {f.country: len(run.tokenizer.encode_behind(f" {f.country}")) for f in facts}
    names_of = {country: NAMES[count > 1] for country, count in tokens.items()}
    places, questions = [], []
    for relation in RELATIONS:
        for name, templates in _PHRASINGS.items():
            for template in templates[relation]:
                for fact in facts:
                    places.append((relation, name, names_of[fact.country]))
                    prompt = fact_prompt(template, fact.country)
                    questions.append(Question(prompt, getattr(fact, relation), END))
    with tqdm(
        total=len(questions), desc="facts", unit=" questions", disable=bars_off(progress)
    ) as bar:
        verdicts = answer_all(Scorer(run, batch_size), run.tokenizer, questions, bar.update)
    by_relation: dict[tuple[str, str], list[bool]] = {}
    by_names: dict[tuple[str, str], list[bool]] = {}
    for (relation, name, names), verdict in zip(places, verdicts, strict=True):
        by_relation.setdefault((relation, name), []).append(verdict.exact)
        by_names.setdefault((names, name), []).append(verdict.exact)
    relations = {relation: _shares(relation, by_relation) for relation in RELATIONS}
    split = {
        names: {
            **_shares(names, by_names),
            "countries": sum(found == names for found in names_of.values()),
        }
        for names in NAMES
    }
    return {"countries": len(facts), "relations": relations, "names": split}


def format_recall(result: dict[str, Any]) -> str:
    """A line for each relation, and for countries by the tokens of their names."""
    head = f"{'trained':>9}{'held out':>10}{'questions':>11}"
    lines = [f"{'relation':<16}{head}  (answered exactly)"]
    for relation, found in result["relations"].items():
        lines.append(f"{relation:<16}{_cells(found)}")
    lines += ["", f"{'name of':<16}{head}{'countries':>11}"]
    for names, found in result["names"].items():
        lines.append(f"{names.replace('_', ' '):<16}{_cells(found)}{found['countries']:>11,}")
    return "\n".join(lines)


def _cells(found: dict[str, Any]) -> str:
    trained, held_out = (
        "-" if found[name] is None else f"{found[name]:.1%}" for name in _PHRASINGS
    )
    return f"{trained:>9}{held_out:>10}{found['questions']:>11,}"


def _shares(of: str, found: dict[tuple[str, str], list[bool]]) -> dict[str, Any]:
    answered = {name: found.get((of, name), []) for name in _PHRASINGS}
    shares = {name: sum(right) / len(right) if right else None for name, right in answered.items()}
    return {**shares, "questions": sum(map(len, answered.values()))}
