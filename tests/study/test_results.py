"""What study.json says of made-up runs, and that it says the same again."""

import csv
import json
import math
import random

import pytest

from configs.study.claims import CLAIMS
from stem_jax.errors import InputError
from stem_jax.study.csv_file import COLUMNS, write_csv
from stem_jax.study.overlap import low_overlap
from stem_jax.study.panels import panels_of
from stem_jax.study.results import results_of, results_text
from tests.study_records import record, runs, study_records


def _by(name, rows, value):
    (found,) = [row for row in rows if row[name] == value]
    return found


def test_the_same_records_give_the_same_bits():
    records = study_records()
    text = results_text(results_of(records, CLAIMS, "core", overlaps=[0.5, 0.1]))
    random.Random(0).shuffle(records)
    assert results_text(results_of(records, CLAIMS, "core", overlaps=[0.5, 0.1])) == text
    assert json.loads(text)["study"] == "core" and text.endswith("}\n")


def test_each_variant_has_means_values_and_a_difference():
    found = results_of(study_records(), CLAIMS, "core")
    main, code, facts = found["panels"]
    assert (main["text"], main["tokens"], main["against"]) == ("prose", 4000, "dense")
    stem = _by("variant", main["variants"], "stem_half")
    bits = stem["measures"]["test_bits_per_byte"]
    values = list(bits["values"].values())
    assert bits["mean"] == pytest.approx(sum(values) / 5) and len(values) == 5
    assert bits["difference"]["mean"] == pytest.approx(-0.02, abs=0.002)
    assert bits["difference"]["level"] == 0.95
    assert bits["differences"]["1"] == pytest.approx(
        bits["values"]["1"] - main["variants"][0]["measures"]["test_bits_per_byte"]["values"]["1"]
    )
    assert stem["correlation"] > 0.9
    assert stem["size"]["active_parameters"] == 800
    assert main["variants"][0]["measures"]["test_bits_per_byte"]["difference"] is None
    assert {v["variant"] for v in facts["variants"]} == {"dense", "stem_half", "ngram"}
    # Stem half is ahead on both texts, value on one.
    assert [(s["variant"], s["agree"]) for s in found["signs"]] == [
        ("stem_half", True),
        ("value", False),
    ]
    assert code["variants"][0]["seeds"] == [1, 2, 3, 4, 5]
    assert found["planted"]["found"] and found["resampling"]["runs"] == 10
    assert set(found["multipliers"]["variants"]) == {"stem_half", "value", "gate"}


def test_rates_and_their_edge():
    records = study_records()
    found = results_of(records, (), "core")["rates"]
    assert [(c["variant"], c["best"], c["edge"]) for c in found][:2] == [
        ("dense", 1.0, False),
        ("gate", 1.0, False),
    ]
    # The best of those that ended.
    for one in records:
        if one["name"] == "prose.dense.n2000.r1.s99":
            one["diverged"] = 100
    dense = _by("variant", results_of(records, (), "core")["rates"], "dense")
    assert (dense["best"], dense["edge"]) == (3.0, True)
    assert [t["diverged"] for t in dense["trials"]] == [None, 100, None]


def test_differences_at_one_rate_stand_beside_those_of_the_best():
    chosen = [*runs("dense", 0, rate=3.0), *runs("value", -0.02)]
    common = runs("dense", 0.05, purpose="common")
    found = results_of([*chosen, *common], (), "core")
    (same,) = found["same_rate"]
    assert (same["rate"], same["variant"]) == (1.0, "value")
    assert same["difference"]["mean"] == pytest.approx(-0.07, abs=0.002)
    value = _by("variant", found["panels"][0]["variants"], "value")
    difference = value["measures"]["test_bits_per_byte"]["difference"]
    assert difference["mean"] == pytest.approx(-0.02, abs=0.002)


def test_a_run_that_diverged_is_shown():
    records = [*runs("dense", 0), *runs("stem_half", -0.02)]
    records[7]["diverged"] = 50
    records[7]["measures"] = {"test_bits_per_byte": math.nan}
    found = results_of(records, CLAIMS[:1], "core")
    json.loads(results_text(found))
    stem = _by("variant", found["panels"][0]["variants"], "stem_half")
    assert stem["diverged"] == [3] and stem["seeds"] == [1, 2, 3, 4, 5]
    assert stem["measures"]["test_bits_per_byte"]["values"]["3"] is None
    assert found["diverged"] == [{"name": "prose.stem_half.n4000.r1.s3", "step": 50}]
    assert found["claims"][0]["note"] == "stem_half diverged with seed 3"


def test_what_was_not_run_or_cannot_be_measured():
    records = study_records()
    asked = [*(r["name"] for r in records), "prose.ngram.n4000.r1.s1"]
    found = results_of(records, CLAIMS, "core", asked=asked)
    assert found["missing"] == ["prose.ngram.n4000.r1.s1"]
    assert [(m["measure"], m["at"]) for m in found["not_measurable"]] == [
        ("spikes", "floor"),
        ("facts_untold_one_token", "floor"),
    ]
    records[0]["commit"] = "other"
    commits = results_of(records, CLAIMS, "core")["commits"]
    assert commits["other"] == [records[0]["name"]] and len(commits) == 2


def test_nothing_run_is_a_result_too():
    found = results_of([], CLAIMS, "core", asked=["a"])
    assert found["missing"] == ["a"] and found["panels"] == []
    assert {claim["verdict"] for claim in found["claims"]} == {"unresolved"}
    json.loads(results_text(found))


def test_documents_that_training_knows_least():
    def one(variant, seed, nats):
        return record(variant, seed, documents={"nats": nats, "bytes": [10, 20, 30, 40]})

    records = [one("dense", 1, [70.0, 20.0, 1.0, 40.0]), one("dense", 2, [70.0, 22.0, 1.0, 42.0])]
    records += [one("value", 1, [0.0, 19.0, 9.0, 38.0]), one("value", 2, [0.0, 20.5, 9.0, 41.0])]
    (panel,) = panels_of(records)
    # The second and the fourth, of 20 and 40 bytes.
    found = low_overlap(panel, [0.9, 0.1, 0.8, 0.0])
    assert (found["documents"], found["of"]) == (2, 4)
    assert (found["overlap"], found["overlap_of_all"]) == (0.05, pytest.approx(0.45))
    dense, value = found["variants"]
    assert dense["mean"] == pytest.approx((60 + 64) / 2 / math.log(2) / 60)
    assert dense["difference"] is None
    assert value["difference"]["mean"] == pytest.approx(-(3 + 2.5) / 2 / math.log(2) / 60)
    with pytest.raises(InputError, match="has 4 test documents and the text 3; take the text"):
        low_overlap(panel, [0.1, 0.2, 0.3])


def test_curves_are_means_of_the_seeds_that_ended():
    records = runs("dense", 0, 3)
    records[0]["diverged"] = 4
    (curve,) = results_of(records, (), "core")["curves"]
    assert curve["tokens"] == [2000, 4000] and curve["seeds"] == 2
    ends = [r["measures"]["test_bits_per_byte"] for r in records[1:]]
    assert curve["bits_per_byte"][1] == pytest.approx(sum(ends) / 2)


def test_csv_has_a_line_for_each_run_and_measure(tmp_path):
    records = study_records()
    records[0]["diverged"], records[0]["measures"] = 12, {}
    write_csv(records, tmp_path / "study.csv")
    with (tmp_path / "study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 1 + sum(len(r["measures"]) for r in records)
    first = _by("name", rows, records[0]["name"])
    assert (first["diverged"], first["measure"], first["value"]) == ("12", "", "")
    last = records[1]
    (bits,) = [
        r for r in rows if r["name"] == last["name"] and r["measure"] == "test_bits_per_byte"
    ]
    assert float(bits["value"]) == last["measures"]["test_bits_per_byte"]
    assert (bits["unit"], bits["variant"], bits["seed"]) == ("bits per byte", "dense", "2")
