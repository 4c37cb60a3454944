import json

import pytest

from stem_jax.errors import InputError
from stem_jax.study import record as records_file
from stem_jax.study.record import (
    check_config,
    config_of_record,
    for_code_of,
    one_commit,
    read_record,
    read_records,
    write_record,
)
from stem_jax.study.runs import Run, chosen_rates, runs_of
from stem_jax.study.study import load_study
from tests.children import ROOT
from tests.study_records import record
from tests.toy_study import toy_study


def _written(folder, **changed):
    made = {**record("stem_half", 1), **changed}
    for field in ("format", "checksum"):
        made.pop(field, None)
    return write_record(folder, made)


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = _written(tmp_path)
    found = read_record(path)
    assert found["name"] == path.stem and found["measures"] == record("stem_half", 1)["measures"]
    assert read_records(tmp_path) == {path.stem: found}
    assert read_records(tmp_path / "none") == {}


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: text.replace('"seed": 1', '"seed": 2'), "was changed since it was written"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "is not of format 1"),
        (lambda text: text[:-9], "is not JSON"),
        (lambda text: json.dumps({"format": 1}), "lacks 'checksum'"),
    ],
)
def test_a_record_that_was_changed_is_refused(tmp_path, change, said):
    path = _written(tmp_path)
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with pytest.raises(InputError, match=said):
        read_records(tmp_path)


def test_a_record_by_another_name_is_refused(tmp_path):
    path = _written(tmp_path)
    path.rename(tmp_path / "prose.dense.n1.r1.s1.json")
    with pytest.raises(InputError, match="was changed"):
        read_records(tmp_path)


def test_a_record_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(records_file, "LARGEST", 100)
    with pytest.raises(InputError, match="of at most 100"):
        _written(tmp_path)
    assert not list(tmp_path.iterdir())


def test_records_of_one_commit():
    a, b = record("dense", 1), {**record("dense", 2), "commit": "f" * 40}
    assert one_commit([], mixed=False) is None
    assert one_commit([a], mixed=False) == a["commit"]
    with pytest.raises(InputError, match="--mixed-code"):
        one_commit([a, b], mixed=False)
    assert one_commit([a, b], mixed=True) is None


def test_a_record_of_another_configuration_is_refused(tmp_path):
    study = load_study(toy_study(tmp_path))
    config = study.config(Run("toy", "main", "dense", "prose", 1280, 1.0, 1))
    found = {"name": "x", "run": {"text": "prose"}, "config": config_of_record(config, "prose")}
    assert found["config"]["data"]["sources"] == "prose"
    check_config(found, config)
    found["config"]["optimizer"]["beta2"] = 0.5
    with pytest.raises(InputError, match=r"optimizer\.beta2=0\.5, the study asks for 0\.95"):
        check_config(found, config)


def test_what_was_recorded_is_of_the_study_as_it_is():
    """Keys come and go; what is in the repository stays of use."""
    study = load_study(ROOT / "configs" / "study" / "core.py")
    there = read_records(ROOT / "benchmarks" / "study" / "core")
    asked = [
        run
        for phase in study.phases
        for run in runs_of(study, phase, chosen_rates([*there.values()]))
    ]
    found = [run for run in asked if run.name in there]
    assert {run.variant for run in found} >= {"dense", "stem_half", "ngram"}
    for run in found:
        check_config(there[run.name], study.config(run))


def test_a_record_of_code_with_fewer_keys(tmp_path):
    study = load_study(toy_study(tmp_path))
    config = study.config(Run("toy", "main", "dense", "prose", 1280, 1.0, 1))
    earlier = config_of_record(config, "prose")
    del earlier["optimizer"]["train"], earlier["value"]
    found = {"name": "x", "run": {"text": "prose"}, "config": earlier, "commit": "a" * 40}
    check_config(found, config)
    asked = config_of_record(config, "prose")
    assert for_code_of(found, asked) == earlier
    # Where that code could not do what is asked, nothing is left out.
    asked["optimizer"]["train"] = "tables"
    with pytest.raises(InputError, match=r"optimizer\.train='tables' is unknown .*aaa\); leave"):
        for_code_of(found, asked)
