"""What a study claims before its first run, and which claims can be made."""

import dataclasses
from collections.abc import Collection, Sequence

from stem_jax.errors import InputError
from stem_jax.study.intervals import SIDES
from stem_jax.study.measured import check_known

# Each further one widens the intervals of all.
MOST = 8
# Bits per byte: differences inside it are called none.
MARGIN = 0.005
_WITH_MARGIN = ("equal", "no_worse")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement about a difference: `variant` less `against`, mean over seeds.

    name: short, unique. says: one sentence for a reader.
    measure: of the runs, see `measured`. unit: the measure's.
    variant, against: names of variants. text: on which both were trained.
    side: below or above zero, equal (inside the margin around zero), no_worse (below the margin).
    margin: in the unit; 0 for below and above.
    """

    name: str
    says: str
    measure: str
    unit: str
    variant: str
    against: str
    text: str
    side: str
    margin: float = 0.0


def check_claims(
    claims: Sequence[Claim],
    variants: Collection[str],
    texts: Collection[str],
    where: str = "claims",
) -> None:
    """Refuses claims that a study could not answer, before anything is trained.

    Args:
        variants, texts: that the study has.
        where: the claims stand, for messages.

    Raises:
        InputError: more than `MOST`; a name twice; an unknown measure, variant, text or side; a
            unit that is not the measure's; a margin that does not fit the side.
    """
    if len(claims) > MOST:
        raise InputError(
            f"{where}: {len(claims)} claims; make at most {MOST}, and call all else exploratory"
        )
    for number, claim in enumerate(claims):
        at = f"{where}: {claim.name}"
        if claim.name in [other.name for other in claims[:number]]:
            raise InputError(f"{at} stands twice; give each claim a name of its own")
        for key, value, known in (
            ("variant", claim.variant, variants),
            ("against", claim.against, variants),
            ("text", claim.text, texts),
            ("side", claim.side, SIDES),
        ):
            if value not in known:
                raise InputError(f"{at}: {key} is {value}; take one of {', '.join(known)}")
        if claim.variant == claim.against:
            raise InputError(f"{at}: variant and against are both {claim.variant}; name two")
        measure = check_known(claim.measure, at)
        if claim.unit != measure.unit:
            raise InputError(f"{at}: unit is {claim.unit}; {claim.measure} is in {measure.unit}")
        if claim.side == "no_worse" and measure.better != "less":
            raise InputError(
                f"{at}: side no_worse is for measures where less is better, and {claim.measure} "
                "is none; claim above, below or equal"
            )
        if (claim.margin > 0) != (claim.side in _WITH_MARGIN):
            needed = "over 0" if claim.side in _WITH_MARGIN else "0"
            raise InputError(
                f"{at}: margin is {claim.margin}; of a claim that is {claim.side} it is {needed}"
            )
