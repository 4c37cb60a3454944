"""Tables of a study's results, for the page and for Markdown."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stem_jax.study.measured import measure_of
from stem_jax.study.numbers import bounded, count, interval, percent, plain, signed, spoken

Results = Mapping[str, Any]
Panel = Mapping[str, Any]
_SIDES = {
    "below": "below 0",
    "above": "above 0",
    "equal": "within ±{margin:g} of 0",
    "no_worse": "below +{margin:g}",
}
_SIZES = (
    ("parameters", "parameters"),
    ("active_parameters", "active for a token"),
    ("table_parameters", "in tables"),
    ("flops_per_token", "FLOPs a token, formula"),
    ("compiled_flops_per_token", "FLOPs a token, compiled"),
)
COUNTS = {
    "compiled": "FLOPs of the compiled training step",
    "active": "two FLOPs for each active parameter",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first of a row names it. wrapped: columns of sentences."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    wrapped: Sequence[int] = ()


def claims_table(results: Results) -> Table:
    """Every claim with its verdict by Holm's level and by 95%."""
    rows = []
    for claim in results["claims"]:
        side = _SIDES[claim["side"]].format(margin=claim["margin"])
        measured = (
            f"{measure_of(claim['measure']).title}, {spoken(claim['variant'])} against "
            f"{spoken(claim['against'])} on {claim['text']}, {side}"
        )
        note = f"; {claim['note']}" if claim["note"] else ""
        rows.append(
            (
                claim["says"],
                claim["verdict"],
                f"{interval(claim['holm'])} ({percent(claim['level'], 1)})",
                f"{interval(claim['plain'])}, {claim['plain_verdict']}",
                measured + note,
            )
        )
    columns = ("claim", "verdict", "difference (Holm's level)", "at 95%", "measured as")
    return Table("All claims", columns, rows, (0, 4))


def headline_table(panel: Panel, measure: str) -> Table:
    """Held-out bits per byte of every variant and the difference to dense."""
    rows = [
        (
            spoken(one["variant"]),
            plain(one["measures"][measure]["mean"]) if measure in one["measures"] else plain(None),
            interval(one["measures"].get(measure, {}).get("difference")),
            len(one["seeds"]),
            len(one["diverged"]) or "none",
        )
        for one in panel["variants"]
    ]
    columns = ("variant", "bits per byte", "minus dense (95%)", "seeds", "diverged")
    return Table(f"Held-out bits per byte, {panel_name(panel)}", columns, rows)


def signs_table(results: Results) -> Table:
    """Differences on two texts."""
    rows = [
        (
            spoken(one["variant"]),
            *(interval(difference) for difference in one["differences"]),
            "yes" if one["agree"] else "no",
        )
        for one in results["signs"]
    ]
    texts = results["signs"][0]["texts"] if rows else ("", "")
    title = "Does another text say the same? Bits per byte minus dense, with 95% intervals"
    return Table(title, ("variant", *texts, "same sign"), rows)


def low_overlap_table(results: Results) -> Table:
    """The headline on the half of the test documents of which training holds least."""
    found = results["low_overlap"] or {"variants": [], "documents": 0, "of": 0}
    rows = [
        (spoken(one["variant"]), plain(one["mean"]), interval(one["difference"]))
        for one in found["variants"]
    ]
    title = (
        f"On the {found['documents']:,} of {found['of']:,} test documents of which training holds "
        f"least: {percent(found.get('overlap'), 1)} of their runs of 13 tokens, "
        f"{percent(found.get('overlap_of_all'), 1)} in all documents"
    )
    return Table(title, ("variant", "bits per byte", "minus dense (95%)"), rows)


def multiplier_table(results: Results) -> Table:
    """Compute multipliers in both counts."""
    rows = [
        (spoken(label), *(times(spent.get(name)) for name in COUNTS))
        for label, spent in results["multipliers"]["variants"].items()
    ]
    return Table("Compute multipliers, with 95% intervals", ("variant", *COUNTS.values()), rows)


def times(one: Mapping[str, Any] | None) -> str:
    """A multiplier with its interval: "1.25 (1.21 to at least 1.50)"."""
    if one is None:
        return plain(None)
    value = bounded(one["multiplier"], one["bound"])
    if one["low"] is None:
        return f"{value}, one seed"
    ends = (bounded(one[end], one[f"{end}_bound"]) for end in ("low", "high"))
    return f"{value} ({' to '.join(ends)})"


def lengths_table(results: Results) -> Table:
    """What dense reaches after how many tokens."""
    rows = [
        (count(point["tokens"]), plain(point["mean"]), len(point["seeds"]))
        for point in results["multipliers"]["lengths"]
    ]
    return Table("Ends of the dense model", ("tokens of a run", "bits per byte", "seeds"), rows)


def sizes_table(panel: Panel, against: str) -> Table:
    """Parameters and FLOPs of all variants, also where they differ.

    Args:
        against: of whose sizes shares are said.
    """
    own = [one["size"] for one in panel["variants"] if one["variant"] == against]
    base = own[0] if own else {}
    rows = []
    for one in panel["variants"]:
        size, flops = one["size"], one["size"].get("flops_per_token")
        run = count(None if flops is None else flops * panel["tokens"])
        cells = (_beside(size.get(key), base.get(key)) for key, _ in _SIZES)
        rows.append((spoken(one["variant"]), *cells, run))
    columns = ("variant", *(title for _, title in _SIZES), "FLOPs of a run, formula")
    return Table(f"Sizes and computation; in brackets, of {spoken(against)}'s", columns, rows)


def sized_against(panel: Panel) -> list[str]:
    """Variants whose sizes others are matched with, of those that are there."""
    labels = [one["variant"] for one in panel["variants"]]
    return [label for label in ("dense", "stem_half") if label in labels]


def same_rate_table(results: Results) -> Table:
    """Differences to dense with one learning rate for both."""
    rows = [
        (spoken(one["variant"]), f"x{one['rate']:.3g}", interval(one["difference"]))
        for one in results["same_rate"]
    ]
    title = "With one learning rate for both, not each its best: bits per byte minus dense"
    return Table(title, ("variant", "rate", "minus dense (95%)"), rows)


def measures_table(panel: Panel, begin: str = "", digits: int = 4) -> Table:
    """Means and differences to dense of all measures whose names begin so."""
    names = {name for one in panel["variants"] for name in one["measures"]}
    rows = [
        (
            measure_of(name).title,
            *(_mean_and_difference(one["measures"].get(name), digits) for one in panel["variants"]),
        )
        for name in sorted(name for name in names if name.startswith(begin))
    ]
    labels = (spoken(one["variant"]) for one in panel["variants"])
    title = f"Means, {panel_name(panel)}; in brackets, minus dense with 95% intervals"
    return Table(title, ("measure", *labels), rows)


def resampling_table(results: Results) -> Table:
    """Shares of dense against itself in which an interval leaves out zero."""
    shares = results["resampling"]["shares"].items()
    rows = [(measure_of(name).title, percent(share, 1)) for name, share in shares]
    return Table("Dense against itself: resolved, of all splits", ("measure", "share"), rows)


def correlation_table(panel: Panel) -> Table:
    """Of each variant's pairs with dense."""
    rows = [
        (spoken(one["variant"]), signed(one["correlation"], 2))
        for one in panel["variants"]
        if one["correlation"] is not None
    ]
    title = "Correlation with dense of the same seed: near 1, pairs help much; near 0, nothing"
    return Table(title, ("variant", "correlation"), rows)


def rates_table(results: Results) -> Table:
    """Bits per byte of dev by rate, and what was chosen."""
    rates = sorted({trial["rate"] for one in results["rates"] for trial in one["trials"]})
    rows = []
    for one in results["rates"]:
        trials = {trial["rate"]: trial for trial in one["trials"]}
        cells = [_trial(trials.get(rate)) for rate in rates]
        best = plain(None) if one["best"] is None else f"x{one['best']:.3g}"
        rows.append((spoken(one["variant"]), *cells, best, "yes" if one["edge"] else "no"))
    columns = ("variant", *(f"x{rate:.3g}" for rate in rates), "best", "at the edge")
    title = "Learning rates tried: bits per byte of dev, on a seed used for nothing else"
    return Table(title, columns, rows)


def missing_table(results: Results) -> Table:
    """Runs that were asked for and are not there, without their seeds."""
    groups: dict[str, int] = {}
    for name in results["missing"]:
        begin = name.rpartition(".s")[0]
        groups[begin] = groups.get(begin, 0) + 1
    columns = ("text, variant, tokens and rate", "seeds")
    return Table("Missing runs", columns, list(groups.items()))


def machines_table(results: Results) -> Table:
    """What the runs were trained on."""
    rows = [
        (
            one["cpu"],
            one["threads"],
            ", ".join(f"{name} {version}" for name, version in sorted(one["versions"].items())),
            one["records"],
        )
        for one in results["machines"]
    ]
    return Table("Machines", ("CPU", "threads", "versions", "runs"), rows, (2,))


def panel_name(panel: Panel) -> str:
    """ "prose, 4.00 M tokens"."""
    return f"{panel['text']}, {count(panel['tokens'])} tokens"


def named(variants: Iterable[tuple[str, str]]) -> Table:
    """What the variants are."""
    rows = [(spoken(name), says) for name, says in variants]
    return Table("Models", ("model", "what it is"), rows, (1,))


def _trial(trial: Mapping[str, Any] | None) -> str:
    if trial is None:
        return plain(None)
    return plain(trial["dev_bits_per_byte"]) if trial["diverged"] is None else "diverged"


def _beside(value: float | None, dense: float | None) -> str:
    if value is None or not dense:
        return count(value)
    return f"{count(value)} ({percent(value / dense, 1)})"


def _mean_and_difference(found: Mapping[str, Any] | None, digits: int) -> str:
    if found is None:
        return plain(None)
    if found["difference"] is None:
        return plain(found["mean"], digits)
    return f"{plain(found['mean'], digits)} ({interval(found['difference'], digits)})"
