"""Which claims can be made, and what records answer."""

import dataclasses
from pathlib import Path

import pytest

from configs.study.claims import CLAIMS
from stem_jax.errors import InputError
from stem_jax.study.claims import MOST, Claim, check_claims
from stem_jax.study.intervals import interval_of
from stem_jax.study.measured import BITS, SHARE
from stem_jax.study.panels import panels_of
from stem_jax.study.verdicts import answer
from tests.study_records import record, runs, study_records

GOOD = Claim("a", "A.", "test_bits_per_byte", BITS, "stem_half", "dense", "prose", "below")
VARIANTS = ("dense", "dense_minus", "stem_half", "gate", "hash_moe", "value", "ngram")


def test_the_shipped_claims_can_be_made():
    folder = Path(__file__).parents[2] / "configs" / "study" / "variants"
    variants = {path.stem for path in folder.glob("*.py")}
    check_claims(CLAIMS, variants, ("prose", "code", "facts"), "configs/study/claims.py")
    assert len(CLAIMS) == 8 and all(claim.says.endswith(".") for claim in CLAIMS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"measure": "bits"}, "here: a: bits is no measure; take one of test_bits_per_byte, dev_b"),
        (
            {"variant": "stem"},
            "here: a: variant is stem; take one of dense, dense_minus, stem_half",
        ),
        ({"against": "stem"}, "here: a: against is stem; take one of dense, "),
        ({"against": "stem_half"}, "here: a: variant and against are both stem_half; name two"),
        ({"text": "poems"}, "here: a: text is poems; take one of prose"),
        ({"side": "under"}, "here: a: side is under; take one of below, above, equal, no_worse"),
        ({"unit": "nats"}, "here: a: unit is nats; test_bits_per_byte is in bits per byte"),
        ({"margin": 0.1}, r"here: a: margin is 0\.1; of a claim that is below it is 0"),
        ({"side": "equal"}, r"here: a: margin is 0\.0; of a claim that is equal it is over 0"),
        (
            {"side": "no_worse", "margin": 0.1, "measure": "facts_told", "unit": SHARE},
            "here: a: side no_worse is for measures where less is better, and facts_told is none",
        ),
    ],
)
def test_claims_that_cannot_be_answered_are_refused(change, said):
    check_claims([GOOD], VARIANTS, ["prose"], "here")
    with pytest.raises(InputError, match=said):
        check_claims([dataclasses.replace(GOOD, **change)], VARIANTS, ["prose"], "here")


def test_claims_are_few_and_have_names():
    many = [dataclasses.replace(GOOD, name=str(number)) for number in range(MOST + 1)]
    check_claims(many[:MOST], VARIANTS, ["prose"])
    with pytest.raises(InputError, match="claims: 9 claims; make at most 8"):
        check_claims(many, VARIANTS, ["prose"])
    with pytest.raises(InputError, match="claims: a stands twice"):
        check_claims([GOOD, GOOD], VARIANTS, ["prose"])


def test_answers_by_holm_beside_plain_ones():
    weak = dataclasses.replace(GOOD, name="weak", variant="value")
    absent = dataclasses.replace(GOOD, name="absent", variant="ngram")
    records = [*runs("dense", 0), *runs("stem_half", -0.02)]
    # One sure claim, one that only the plain interval resolves: p is .046, against .05 / 2.
    for seed, extra in enumerate((-0.0104, -0.001, -0.007, -0.001, -0.0075), 1):
        dense = next(r for r in records if r["run"]["seed"] == seed)
        records.append(record("value", seed, dense["measures"]["test_bits_per_byte"] + extra))
    sure, doubtful, without = answer([GOOD, weak, absent], panels_of(records))
    assert (sure["verdict"], sure["plain_verdict"]) == ("confirmed", "confirmed")
    assert sure["level"] == pytest.approx(1 - 0.05 / 3)
    assert sure["holm"]["mean"] == pytest.approx(-0.02, abs=0.002)
    assert sure["holm"]["half_width"] > sure["plain"]["half_width"]
    assert (doubtful["verdict"], doubtful["plain_verdict"]) == ("unresolved", "confirmed")
    values = list(doubtful["values"].values())
    assert doubtful["plain"] == interval_of(values).to_dict()
    assert doubtful["holm"] == interval_of(values, doubtful["level"]).to_dict()
    assert (without["verdict"], without["note"]) == ("unresolved", "no runs of both on prose")
    assert without["plain"] is None and without["says"] == "A."


def test_a_claim_over_a_run_that_diverged_is_unresolved():
    records = [*runs("dense", 0), *runs("stem_half", -0.02)]
    (found,) = answer([GOOD], panels_of(records))
    assert found["verdict"] == "confirmed"
    records[-1]["diverged"] = 300
    (found,) = answer([GOOD], panels_of(records))
    assert (found["verdict"], found["note"]) == ("unresolved", "stem_half diverged with seed 5")
    # What did end is shown.
    assert found["plain"]["seeds"] == 4 and list(found["values"]) == ["1", "2", "3", "4"]


def test_one_seed_has_no_interval_and_says_so():
    records = [*runs("dense", 0, 1), *runs("stem_half", -0.02, 1)]
    (found,) = answer([GOOD], panels_of(records))
    assert (found["verdict"], found["note"]) == ("unresolved", "one seed: no interval")
    assert found["plain"]["half_width"] is None


def test_a_measure_at_its_limit_answers_nothing():
    records = study_records()
    claim = dataclasses.replace(
        GOOD, text="facts", measure="facts_untold_one_token", unit=SHARE, side="above"
    )
    (found,) = answer([claim], panels_of(records))
    assert found["note"] == "not measurable at this size: all variants at the floor"
    told = dataclasses.replace(claim, measure="facts_told_several_tokens")
    assert answer([told], panels_of(records))[0]["verdict"] == "confirmed"
