"""Parts of the page about measures: each is HTML, "" where there is nothing to say of it."""

import statistics

from stem_jax.study.claims import MARGIN
from stem_jax.study.markup import paragraph, table_html
from stem_jax.study.measured import GROUPS, measure_of
from stem_jax.study.numbers import interval, plain, spoken
from stem_jax.study.pictures import Bar, Line, bars, lines
from stem_jax.study.tables import (
    COUNTS,
    Panel,
    Results,
    lengths_table,
    low_overlap_table,
    measures_table,
    panel_name,
    signs_table,
    times,
)

GAP, FACTS = "memorization_gap", "facts_"


def differences(results: Results) -> str:
    """Held-out bits per byte less dense's, a picture for each panel."""
    drawn = [difference_picture(panel, results["headline"]) for panel in results["panels"]]
    if not any(drawn):
        return ""
    lead = (
        "Bits per byte of unseen text, minus those of the dense model with the same random "
        "numbers. Left of the line is better. A bar is the 95% interval of the mean, small dots "
        "are single runs; inside the grey band a difference is called none. These intervals are "
        "exploratory: those of the claims are wider."
    )
    tables = table_html(signs_table(results)) + table_html(low_overlap_table(results))
    return paragraph(lead) + "".join(drawn) + tables


def difference_picture(panel: Panel, measure: str) -> str:
    """The headline's differences on one panel."""
    return bars(
        f"Differences to dense on {panel_name(panel)}",
        sorted(_rows(panel, measure), key=lambda row: row.value),
        0.0,
        ("better than dense", "worse than dense"),
        "bits per byte, dense = 0",
        f"Dense itself needs {plain(_dense_mean(panel, measure))} bits per byte.",
        less_is_better=True,
        margin=MARGIN,
    )


def multiplier(results: Results) -> str:
    """Pictures in both counts, and dense's ends."""
    found = results["multipliers"]
    if not found["variants"]:
        return ""
    lead = (
        "How many times a variant's computation a dense model needs to end with the same bits per "
        f"byte. Over 1, the variant is cheaper. Dense was trained at {len(found['lengths'])} "
        "lengths, each with its whole schedule; beyond the longest nothing is known, and a figure "
        "is only a bound, drawn as an arrow. What the compiler counts is what a machine does; two "
        "for each active parameter, the papers' count, leaves out attention and counts embeddings."
    )
    drawn = [multiplier_picture(results, name) for name in COUNTS]
    note = (
        f"Intervals (95%) by drawing seeds {found['resamples']:,} times. With five seeds such "
        "intervals are too narrow: they hold the truth in some 85 of 100 cases."
    )
    ends = table_html(lengths_table(results))
    return paragraph(lead) + "".join(drawn) + paragraph(note, "note") + ends


def multiplier_picture(results: Results, name: str) -> str:
    """Multipliers in one count of FLOPs."""
    rows, left_out = [], []
    for label, spent in results["multipliers"]["variants"].items():
        if (one := spent.get(name)) is not None:
            beyond = [end for end in ("low", "high") if one[f"{end}_bound"]]
            rows.append(
                Bar(label, one["multiplier"], one["low"], one["high"], times(one), (), beyond)
            )
        else:
            left_out.append(label)
    return bars(
        f"Compute multiplier, counted as {COUNTS[name]}",
        sorted(rows, key=lambda row: -row.value),
        1.0,
        ("dense is cheaper", "dense is dearer"),
        "dense's FLOPs to the same end / the variant's",
        f"Not counted: {', '.join(map(spoken, left_out))}." if left_out else "",
        less_is_better=False,
    )


def gap(main: Panel | None) -> str:
    """How much easier trained text is than unseen text like it, less dense's."""
    drawn = "" if main is None else gap_picture(main)
    lead = (
        "The memorisation gap: bits per byte of unseen text, minus those of text like it that the "
        "model was trained on, at the end of the run. Unseen text is of other packages, which is "
        "most of dense's own gap; what a variant has more than dense is memorised."
    )
    return paragraph(lead) + drawn if drawn else ""


def gap_picture(panel: Panel) -> str:
    """Gaps less dense's."""
    return bars(
        "Memorisation gap, minus dense's",
        sorted(_rows(panel, GAP), key=lambda row: -row.value),
        0.0,
        ("memorises less", "memorises more"),
        "bits per byte, dense = 0",
        "Right of the line, a part of what is gained on the text of training does not come over to "
        f"unseen text. Dense's own gap is {plain(_dense_mean(panel, GAP))} bits per byte.",
        less_is_better=None,
    )


def frequency(main: Panel | None) -> str:
    """Differences to dense in ten groups of test tokens, for the token read and the foretold."""
    drawn = [] if main is None else [frequency_picture(main, kind) for kind in ("input", "target")]
    lead = "Where do memories help: at tokens that were seldom seen, or at common ones?"
    return paragraph(lead) + "".join(drawn) if any(drawn) else ""


def frequency_picture(panel: Panel, kind: str) -> str:
    """kind: input, the token that is read, or target, the one that is foretold."""
    token = {"input": "the token read", "target": "the token to be foretold"}[kind]
    series = []
    for place, one in enumerate(panel["variants"]):
        found = [
            one["measures"].get(f"{kind}_frequency_{group}", {}).get("difference")
            for group in range(GROUPS)
        ]
        points = [(float(group), x["mean"]) for group, x in enumerate(found) if x is not None]
        if points:
            series.append(Line(one["variant"], points, place))
    return lines(
        f"Differences to dense by how often {token} was trained on",
        series,
        "tenths of the test tokens, rarest to most frequent",
        "bits per byte, minus dense (below 0: better)",
        "Means over seeds; their intervals stand in the table of all measures.",
        x_names=[str(group + 1) for group in range(GROUPS)],
        origin=True,
    )


def facts(results: Results) -> str:
    """Shares of questions about countries that are answered."""
    tables = [table_html(measures_table(panel, FACTS, 3)) for panel in results["panels"]]
    lead = (
        "Models that read sentences about countries are asked for capitals, currencies and so on: "
        "the share answered. A row of one token can hold what belongs to a country whose name is "
        "one token; of a name of several tokens, only n-gram memories have rows."
    )
    return paragraph(lead) + "".join(tables) if any(tables) else ""


def curves(results: Results) -> str:
    """Dev bits per byte within runs: pictures, no results."""
    series = [
        Line(one["variant"], list(zip(one["tokens"], one["bits_per_byte"])), place)
        for place, one in enumerate(results["curves"])
    ]
    return lines(
        "Bits per byte of dev text during training",
        series,
        "tokens read",
        "bits per byte of dev text",
        "Pictures only: the learning rate falls until the end of each run, so that a point in the "
        "middle of a long run is not the end of a shorter one. No figure on this page is read from "
        "them.",
    )


def every_measure(results: Results) -> str:
    """Means and exploratory differences of all measures of all panels, folded away."""
    lead = (
        "All that was measured. Nothing here is corrected for how many figures there are: it is "
        "exploratory, and one interval in twenty leaves out the truth by chance."
    )
    tables = "".join(table_html(measures_table(panel)) for panel in results["panels"])
    limits = [
        f"{measure_of(one['measure']).title} on {one['text']} (all at the {one['at']})"
        for one in results["not_measurable"]
    ]
    note = f"Not measurable at this size: {'; '.join(limits)}." if limits else ""
    folded = f"<details><summary>Show the tables</summary>{tables}</details>" if tables else ""
    return paragraph(lead) + (paragraph(note) if note else "") + folded if folded else ""


def _rows(panel: Panel, measure: str) -> list[Bar]:
    """A row for each variant that is compared; diverged runs are named beside it."""
    rows = []
    for one in panel["variants"]:
        found = one["measures"].get(measure, {}).get("difference")
        if found is not None:
            lost = f", {len(one['diverged'])} diverged" if one["diverged"] else ""
            points = list(one["measures"][measure]["differences"].values())
            said = interval(found) + lost
            rows.append(
                Bar(one["variant"], found["mean"], found["low"], found["high"], said, points)
            )
    return rows


def _dense_mean(panel: Panel, name: str) -> float | None:
    """Of the seeds that others are compared on; more of dense are in no difference."""
    own = [one["measures"].get(name) for one in panel["variants"] if _is_dense(panel, one)]
    if not own or own[0] is None:
        return None
    others = [one["measures"].get(name) or {} for one in panel["variants"]]
    paired = {seed for found in others for seed in found.get("differences", {})}
    values = [value for seed, value in own[0]["values"].items() if seed in paired]
    return statistics.fmean(values) if values else own[0]["mean"]


def _is_dense(panel: Panel, one: Panel) -> bool:
    return one["variant"] == panel["against"]
