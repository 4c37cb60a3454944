"""All that a study says: the content of study.json, from records alone and without times."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stem_jax.study.claims import Claim
from stem_jax.study.intervals import correlation, paired
from stem_jax.study.measured import HEADLINE, limit_reached
from stem_jax.study.multiplier import multipliers
from stem_jax.study.overlap import low_overlap
from stem_jax.study.panels import (
    BASELINE,
    Panel,
    Record,
    of_purpose,
    panels_of,
    same_rates,
    value_of,
)
from stem_jax.study.resampling import planted, resample
from stem_jax.study.verdicts import answer

FORMAT = 1


def results_of(
    records: Sequence[Record],
    claims: Sequence[Claim],
    study_name: str,
    *,
    overlaps: Sequence[float] | None = None,
    asked: Sequence[str] = (),
    variants: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of study.json; the same records give the same bits, in whatever order they come.

    Args:
        overlaps: share of the 13-grams of each test document that training holds, in store order,
            of the text that the main runs were trained on.
        asked: names of the runs that the study asked for.
        variants: what each is, for the page.

    Returns:
        "claims" (see `verdicts.answer`), "panels" (a text and a number of tokens: measures of each
        variant, and differences to dense at 95%, which are exploratory), "multipliers",
        "low_overlap", "signs", "rates", "same_rate", "resampling", "planted", "not_measurable",
        "curves", "variants", and of what was run "runs", "missing", "diverged", "commits",
        "machines".

    Raises:
        InputError: runs that are compared differ in what they must share, or in their documents.
    """
    records = sorted(records, key=lambda record: record["name"])
    panels = panels_of(records)
    main = panels[0] if panels else Panel("", 0, False, {})
    return {
        "format": FORMAT,
        "study": study_name,
        "headline": HEADLINE,
        "variants": dict(variants or {}),
        "claims": answer(claims, panels),
        "panels": [_panel(panel) for panel in panels],
        "multipliers": multipliers(records, main),
        "low_overlap": None if overlaps is None else low_overlap(main, overlaps),
        "signs": _signs(panels),
        "rates": _rates(records),
        "same_rate": _same_rate(main),
        "resampling": resample(main),
        "planted": planted(records, main),
        "not_measurable": _not_measurable(panels),
        "curves": _curves(main),
        "runs": [{"name": r["name"], **r["run"], "diverged": r["diverged"]} for r in records],
        "missing": sorted(set(asked) - {r["name"] for r in records}),
        "diverged": [
            {"name": r["name"], "step": r["diverged"]} for r in records if r["diverged"] is not None
        ],
        "commits": _commits(records),
        "machines": _machines(records),
    }


def results_text(results: Mapping[str, Any]) -> str:
    """study.json: sorted keys, no number that JSON has not."""
    return json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _panel(panel: Panel) -> dict[str, Any]:
    measures = panel.measures()
    variants = []
    for label, cell in panel.cells.items():
        first = next(iter(cell.values()))
        variants.append(
            {
                "variant": label,
                "rate": first["run"]["rate"],
                "seeds": list(cell),
                "diverged": panel.diverged(label),
                "size": dict(first["size"]),
                "correlation": _correlation(panel, label),
                "measures": {
                    name: found for name in measures if (found := _measure(panel, label, name))
                },
            }
        )
    return {
        "text": panel.text,
        "tokens": panel.tokens,
        "main": panel.main,
        "against": BASELINE if BASELINE in panel.cells else None,
        "variants": variants,
    }


def _measure(panel: Panel, label: str, name: str) -> dict[str, Any] | None:
    by_seed = panel.values(label, name)
    known = [value for value in by_seed.values() if value is not None]
    if not known:
        return None
    differences, interval = panel.difference(label, BASELINE, name)
    compared = label != BASELINE and interval is not None
    return {
        "mean": _mean(known),
        "values": {str(seed): value for seed, value in by_seed.items()},
        "difference": _interval(interval) if compared else None,
        "differences": {str(seed): x for seed, x in differences.items()} if compared else {},
    }


def _correlation(panel: Panel, label: str) -> float | None:
    """Of the headline's pairs with dense: how much pairing by seed is worth."""
    own, dense = panel.values(label, HEADLINE), panel.values(BASELINE, HEADLINE)
    # Paired seeds have both values.
    pairs = [(own[seed] or 0.0, dense[seed] or 0.0) for seed in paired(own, dense)]
    return correlation(pairs) if label != BASELINE else None


def _signs(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Differences to dense on further texts beside those of the main runs."""
    found = []
    for other in panels[1:]:
        if other.text == panels[0].text:
            continue
        for label in other.cells:
            _, first = panels[0].difference(label, BASELINE, HEADLINE)
            _, second = other.difference(label, BASELINE, HEADLINE)
            if label != BASELINE and first is not None and second is not None:
                found.append(
                    {
                        "variant": label,
                        "texts": [panels[0].text, other.text],
                        "differences": [first.to_dict(), second.to_dict()],
                        "agree": first.mean * second.mean > 0,
                    }
                )
    return found


def _rates(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What each variant's rate was chosen from, on dev. edge: the best is the end of the grid."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in of_purpose(records, "rate"):
        found.setdefault((record["run"]["text"], record["run"]["variant"]), []).append(record)
    choices = []
    for (text, variant), group in sorted(found.items()):
        trials = [
            {
                "rate": record["run"]["rate"],
                "seed": record["run"]["seed"],
                "dev_bits_per_byte": value_of(record, "dev_bits_per_byte"),
                "diverged": record["diverged"],
            }
            for record in group
        ]
        scored = [(t["dev_bits_per_byte"], t["rate"]) for t in trials]
        known = [pair for pair in scored if pair[0] is not None]
        best = min(known)[1] if known else None
        rates = sorted(trial["rate"] for trial in trials)
        choices.append(
            {
                "text": text,
                "variant": variant,
                "tokens": group[0]["run"]["tokens"],
                "trials": trials,
                "best": best,
                "edge": best in (rates[0], rates[-1]) if len(rates) > 1 else False,
            }
        )
    return choices


def _same_rate(main: Panel) -> list[dict[str, Any]]:
    """The headline's differences to dense where both have the same rate, not each its best."""
    found = []
    for rate, panel in same_rates(main):
        for label in panel.cells:
            _, interval = panel.difference(label, BASELINE, HEADLINE)
            if label != BASELINE and interval is not None:
                difference = interval.to_dict()
                found.append({"rate": rate, "variant": label, "difference": difference})
    return found


def _not_measurable(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    return [
        {"text": panel.text, "tokens": panel.tokens, "measure": name, "at": limit}
        for panel in panels
        for name in panel.measures()
        if (limit := limit_reached(name, panel.means(name)))
    ]


def _curves(panel: Panel) -> list[dict[str, Any]]:
    """Dev bits per byte within runs, means over the seeds that have the same points."""
    curves = []
    for label, cell in panel.cells.items():
        kept = [record["curve"] for record in cell.values() if record["diverged"] is None]
        if not kept or not kept[0].get("dev_tokens"):
            continue
        points = kept[0]["dev_tokens"]
        alike = [c["dev_bits_per_byte"] for c in kept if c.get("dev_tokens") == points]
        curves.append(
            {
                "variant": label,
                "tokens": points,
                "bits_per_byte": [_mean(column) for column in zip(*alike)],
                "seeds": len(alike),
            }
        )
    return curves


def _commits(records: Sequence[Record]) -> dict[str, list[str]]:
    """Names of runs by commit: more than one commit is mixed code."""
    found: dict[str, list[str]] = {}
    for record in records:
        found.setdefault(record["commit"], []).append(record["name"])
    return dict(sorted(found.items()))


def _machines(records: Sequence[Record]) -> list[dict[str, Any]]:
    texts = [json.dumps(record["machine"], sort_keys=True) for record in records]
    return [{**json.loads(text), "records": texts.count(text)} for text in sorted(set(texts))]


def _interval(interval: Any) -> dict[str, Any] | None:
    return interval.to_dict() if interval is not None else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
