"""Which runs are compared: labels, order and refusals."""

import math

import pytest

from stem_jax.errors import InputError
from stem_jax.study.panels import panels_of, same_rates
from tests.study_records import record, runs, study_records


def test_runs_of_one_text_and_length_are_a_panel():
    panels = panels_of(reversed(study_records()))
    assert [(p.text, p.tokens, p.main) for p in panels] == [
        ("prose", 4000, True),
        ("code", 4000, False),
        ("facts", 4000, False),
    ]
    # Rates, lengths and planted runs stand apart; further dense seeds do not.
    assert list(panels[0].cells) == ["dense", "gate", "stem_half", "value"]
    assert list(panels[0].cells["dense"]) == list(range(1, 11))
    assert list(panels[0].cells["value"]) == [1, 2, 3, 4, 5]


def test_another_rate_has_a_label_of_its_own():
    chosen = runs("dense", 0, 2, rate=3.0)
    common = runs("dense", 0.1, 2, rate=1.0, purpose="common")
    (panel,) = panels_of([*common, *chosen])
    assert list(panel.cells) == ["dense", "dense x1"]
    assert panel.cells["dense"][1]["run"]["rate"] == 3.0


def test_values_that_are_none():
    one, two, three = runs("dense", 0, 3)
    one["diverged"] = 7
    two["measures"] = {"test_bits_per_byte": math.nan}
    (panel,) = panels_of([one, two, three])
    values = panel.values("dense", "test_bits_per_byte")
    assert (values[1], values[2]) == (None, None) and values[3] is not None
    assert panel.values("dense", "spikes") == {1: None, 2: None, 3: None}
    assert panel.diverged("dense") == [1]
    assert panel.means("test_bits_per_byte") == [values[3]]


@pytest.mark.parametrize("key", ["text", "tokenizer", "test"])
def test_what_runs_must_share_is_asked(key):
    dense, stem = record("dense"), record("stem_half")
    stem["checksums"][key] = "other"
    said = f"prose.dense.n4000.r1.s1 and prose.stem_half.n4000.r1.s1 differ in checksums.{key}"
    with pytest.raises(InputError, match=rf"{said} \(.*{key}.* and other\)"):
        panels_of([dense, stem])


@pytest.mark.parametrize("key", ["seq_len", "global_batch_size"])
def test_batches_are_asked(key):
    dense, stem = record("dense"), record("stem_half")
    stem["config"] = {"train": {**dense["config"]["train"], key: 3}}
    with pytest.raises(InputError, match=f"differ in config.train.{key} "):
        panels_of([dense, stem])


def test_the_same_run_twice_is_refused():
    with pytest.raises(InputError, match="are the same variant, text, tokens, rate and seed"):
        panels_of([record(), record(purpose="aa")])


def test_variants_at_one_rate_are_found_again():
    chosen = [*runs("dense", 0, 2, rate=3.0), *runs("value", 0, 2, rate=1.0)]
    assert same_rates(panels_of(runs("dense", 0, 2) + runs("value", 0, 2))[0]) == []
    assert same_rates(panels_of(chosen)[0]) == []
    (panel,) = panels_of([*chosen, *runs("dense", 0.1, 2, rate=1.0, purpose="common")])
    ((rate, same),) = same_rates(panel)
    assert rate == 1.0 and sorted(same.cells) == ["dense", "value"]
    assert {r["run"]["rate"] for cell in same.cells.values() for r in cell.values()} == {1.0}
