"""Parts of the page about the runs: each is HTML, "" where there is nothing to say of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from stem_jax.study.markup import paragraph, table_html
from stem_jax.study.numbers import count, interval, percent, plain, spoken
from stem_jax.study.tables import (
    Panel,
    Results,
    Table,
    correlation_table,
    machines_table,
    missing_table,
    rates_table,
    resampling_table,
    same_rate_table,
    sized_against,
    sizes_table,
)


def sizes(main: Panel | None) -> str:
    """All totals, also where they differ."""
    if main is None:
        return ""
    lead = (
        "All models read the same tokens; they are not equally large, and not equally dear. FLOPs "
        "are those of training, forward and backward."
    )
    tables = (sizes_table(main, label) for label in sized_against(main))
    return paragraph(lead) + "".join(map(table_html, tables))


def cost_part(cost: Mapping[str, Any] | None) -> str:
    """Times and memory.

    Args:
        cost: {"machine": {what: text}, "variants": {name: {what: a number, or a median with
            the two between which most rounds lie, or None where it was not measured}}}; None: not
            measured.
    """
    if not cost or not cost.get("variants"):
        return ""
    names = list(dict.fromkeys(name for one in cost["variants"].values() for name in one))
    rows = [
        (spoken(variant), *(_measured(one.get(name)) for name in names))
        for variant, one in cost["variants"].items()
    ]
    machine = ", ".join(f"{spoken(name)} {x}" for name, x in cost.get("machine", {}).items())
    lead = (
        "Of short runs apart from the training, alone on the machine and in turns"
        f"{f' ({machine})' if machine else ''}."
    )
    table = Table("Cost of training", ("variant", *map(spoken, names)), rows)
    return paragraph(lead) + table_html(table)


def _measured(value: Any) -> str:
    if not isinstance(value, Sequence):
        return count(value)
    return f"{plain(value[0], 2)} ({' to '.join(plain(x, 2) for x in value[1:])})"


def checks(results: Results, main: Panel | None) -> str:
    """Dense against itself, a difference that is there, pairs, and choices of rates."""
    if main is None:
        return ""
    resampling, planted = results["resampling"], results["planted"]
    if resampling["shares"]:
        said = (
            f"Is nothing found where nothing is? {resampling['runs']} dense runs, in two halves in "
            f"all {resampling['splits']} ways and with {resampling['pairings']} pairings each: a "
            "95% interval should leave out zero in 5% of them, and no measure may be over "
            f"{percent(resampling['most'])}. This study "
            f"{'passes' if resampling['passes'] else 'FAILS'}."
        )
    else:
        said = (
            "Is nothing found where nothing is? Not tried: it takes 10 dense runs that ended, here "
            f"are {resampling['runs']}."
        )
    parts = [paragraph(said)]
    if planted and planted["difference"]:
        parts.append(
            paragraph(
                f"Is something found where something is? Dense with {count(planted['tokens'])} "
                f"instead of {count(planted['dense_tokens'])} tokens: "
                f"{interval(planted['difference'])} bits per byte, "
                f"{'found' if planted['found'] else 'NOT found'}."
            )
        )
    tables = (
        resampling_table(results),
        correlation_table(main),
        rates_table(results),
        same_rate_table(results),
    )
    return "".join([*parts, *map(table_html, tables)])


def not_run(results: Results) -> str:
    """Runs that were asked for and are not there, and those that did not reach their end."""
    parts = []
    if results["diverged"]:
        names = "; ".join(f"{one['name']} (step {one['step']:,})" for one in results["diverged"])
        said = "They have no end to measure, and claims over them stay unresolved."
        parts.append(paragraph(f"Diverged: {names}. {said}"))
    if results["missing"]:
        parts.append(
            paragraph(f"{len(results['missing']):,} runs were asked for and are not there.")
        )
        parts.append(table_html(missing_table(results)))
    done = "All runs that were asked for are there, and none diverged."
    return "".join(parts) or paragraph(done)


def way(results: Results) -> str:
    """How the figures came about, for whoever wants to doubt or repeat them."""
    said = (
        f"{len(results['runs']):,} runs. All of one text read one store with one tokenizer; its "
        "split into train, dev and test is by package. A seed changes the first parameters and the "
        "order of the text, for all variants alike: parameters of equal name and shape begin "
        "equal. So variants are compared seed by seed. Rates were chosen on dev, figures are of "
        "test. Intervals are Student's, over the differences of pairs."
    )
    rows = [(commit, len(names)) for commit, names in results["commits"].items()]
    mixed = "Mixed code: the runs come from several commits; differences may be those of the code."
    return "".join(
        [
            paragraph(said),
            paragraph(mixed) if len(rows) > 1 else "",
            table_html(Table("Code", ("commit", "runs"), rows)),
            table_html(machines_table(results)),
        ]
    )
