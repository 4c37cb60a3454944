"""Claims answered by records: each with Holm's interval beside the plain one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from stem_jax.study.claims import Claim
from stem_jax.study.intervals import (
    LEVEL,
    Interval,
    holm_levels,
    interval_of,
    resolving_p,
    verdict_of,
)
from stem_jax.study.measured import limit_reached
from stem_jax.study.panels import Panel

_NO_RUNS = "no runs of both"


def answer(claims: Sequence[Claim], panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """One answer for each claim, in order.

    All claims count in Holm's steps, also those without an interval. A claim of which a run
    diverged, or whose measure is at its floor or ceiling for all variants, is unresolved, and
    `note` says why; its interval is that of the seeds that did end.

    Returns:
        fields of the claim; "verdict" by Holm's level, "plain_verdict" by 95%; "holm" and "plain",
        intervals; "level"; "values" by seed; "note", "" where there is nothing to say.
    """
    found = [_differences(claim, panels) for claim in claims]
    p_values = [
        1.0 if note else resolving_p(list(values.values()), claim.side, claim.margin)
        for claim, (values, note) in zip(claims, found)
    ]
    answers = []
    for claim, (values, note), level in zip(claims, found, holm_levels(p_values)):
        holm, plain = (interval_of(list(values.values()), one) for one in (level, LEVEL))
        answers.append(
            {
                **dataclasses.asdict(claim),
                "verdict": _verdict(claim, holm, note),
                "plain_verdict": _verdict(claim, plain, note),
                "level": level,
                "holm": holm.to_dict() if holm else None,
                "plain": plain.to_dict() if plain else None,
                "values": {str(seed): value for seed, value in values.items()},
                "note": note,
            }
        )
    return answers


def _verdict(claim: Claim, interval: Interval | None, note: str) -> str:
    return "unresolved" if note else verdict_of(interval, claim.side, claim.margin)


def _differences(claim: Claim, panels: Sequence[Panel]) -> tuple[dict[int, float], str]:
    """By seed, and why there can be no verdict, or ""."""
    both = {claim.variant, claim.against}
    fitting = [p for p in panels if p.text == claim.text and both <= set(p.cells)]
    if not fitting:
        return {}, f"{_NO_RUNS} on {claim.text}"
    panel = fitting[0]
    values, _ = panel.difference(claim.variant, claim.against, claim.measure)
    for label in (claim.variant, claim.against):
        if seeds := panel.diverged(label):
            of = ", ".join(map(str, seeds))
            return values, f"{label} diverged with {'seed' if len(seeds) == 1 else 'seeds'} {of}"
    if not values:
        return {}, f"{_NO_RUNS} with {claim.measure} and a seed in common"
    if len(values) < 2:
        return values, "one seed: no interval"
    if limit := limit_reached(claim.measure, panel.means(claim.measure)):
        return values, f"not measurable at this size: all variants at the {limit}"
    return values, ""
