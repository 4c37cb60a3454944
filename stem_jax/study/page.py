"""The study as one HTML page for a reader who does not know the project; it fetches nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stem_jax.files import write_whole
from stem_jax.study import run_sections, sections
from stem_jax.study.markup import document, escaped, paragraph, table_html
from stem_jax.study.numbers import count, interval
from stem_jax.study.tables import Panel, Results, claims_table, named

_QUESTION = "What is a memory indexed by tokens worth beside a dense language model?"
_VERDICTS = ("confirmed", "refuted", "unresolved")


def write_page(results: Results, cost: Mapping[str, Any] | None, path: Path) -> None:
    """Writes the page.

    Args:
        results: what `results.results_of` returns, or what was read from study.json.
        cost: of cost.json, see `run_sections.cost_part`.

    Raises:
        InputError: the file cannot be written.
    """
    write_whole(path, page_of(results, cost))


def page_of(results: Results, cost: Mapping[str, Any] | None) -> str:
    """The page as HTML."""
    main = results["panels"][0] if results["panels"] else None
    parts = [
        ("What was compared", _models(results)),
        ("Differences to the dense model", sections.differences(results)),
        ("Compute multiplier", sections.multiplier(results)),
        ("The claims", _claims(results)),
        ("Is it memorised?", sections.gap(main)),
        ("Rare and frequent tokens", sections.frequency(main)),
        ("Facts", sections.facts(results)),
        ("Curves", sections.curves(results)),
        ("Sizes", run_sections.sizes(main)),
        ("Speed and memory", run_sections.cost_part(cost)),
        ("Can the figures be trusted?", run_sections.checks(results, main)),
        ("All measures", sections.every_measure(results)),
        ("What was not run", run_sections.not_run(results)),
        ("How it was done", run_sections.way(results)),
    ]
    return document(_QUESTION, _subtitle(results, main), _answer(results), parts)


def _subtitle(results: Results, main: Panel | None) -> str:
    if main is None:
        return f"Study {results['study']}: no run has ended yet."
    # Dense may have further seeds, for the comparison with itself.
    others = [one for one in main["variants"] if one["variant"] != main["against"]]
    seeds = max(len(one["seeds"]) for one in others or main["variants"])
    size = main["variants"][0]["size"].get("active_parameters")
    return (
        f"{len(main['variants'])} small models ({count(size)} active parameters) read the same "
        f"{count(main['tokens'])} tokens of {main['text']}, each {seeds} times with other random "
        "numbers, which are the same for all models."
    )


def _answer(results: Results) -> str:
    claims = results["claims"]
    if not results["panels"]:
        return "<h2>The answer</h2>" + paragraph("None yet: no run has ended.")
    if not claims:
        said = "Nothing was claimed before the first run: all figures here are exploratory."
        return "<h2>The answer</h2>" + paragraph(said)
    counts = [f"{sum(c['verdict'] == v for c in claims)} {v}" for v in _VERDICTS]
    lead = (
        f"{len(claims)} claims were written down before the first run: {', '.join(counts)}. "
        "Differences are in bits per byte if nothing else is said: fewer are better."
    )
    rows = []
    for verdict in _VERDICTS:
        items = "".join(
            f"<dd>{escaped(_one_line(c))}</dd>" for c in claims if c["verdict"] == verdict
        )
        rows.append(
            f'<dt class="{verdict}">{verdict.capitalize()}</dt>{items or "<dd>Nothing.</dd>"}'
        )
    note = (
        "STEM: a model some of whose layers look up a token's row in a table, where others "
        "compute. Bits per byte: what a model needs to write down text that it has not seen. "
        "Refuted: the opposite was found. Unresolved: there are no such runs yet, or runs with "
        "other random numbers differ too much to tell."
    )
    verdicts = f'<dl class="verdicts">{"".join(rows)}</dl>'
    return f"<h2>The answer</h2>{paragraph(lead)}{verdicts}{paragraph(note, 'note')}"


def _one_line(claim: Mapping[str, Any]) -> str:
    if claim["note"]:
        return f"{claim['says']} ({claim['note']})"
    unit = "" if claim["unit"] == "bits per byte" else f" {claim['unit']}"
    return f"{claim['says']} ({interval(claim['holm'])}{unit})"


def _models(results: Results) -> str:
    ran = {one["variant"] for panel in results["panels"] for one in panel["variants"]}
    table = named(
        (name, says if name in ran else f"{says} Not run.")
        for name, says in results["variants"].items()
    )
    lead = (
        "A memory indexed by tokens is a table with a row for every token, or for every few tokens "
        "in succession. A layer looks its row up instead of computing it, so that parameters are "
        "added without multiplications."
    )
    return paragraph(lead) + table_html(table) if table.rows else ""


def _claims(results: Results) -> str:
    said = (
        "Confirmed: the whole interval lies on the claimed side. Refuted: it lies wholly on the "
        "other. Unresolved: neither; what stands behind ± is what could have been found. The more "
        "claims, the more is found by chance: so Holm's method gives each a level of its own, and "
        "verdicts are read there. The plain 95% interval stands beside it."
    )
    table = claims_table(results)
    return paragraph(said) + table_html(table) if table.rows else ""
