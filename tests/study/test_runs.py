import dataclasses

import pytest

from stem_jax.errors import InputError
from stem_jax.study.runs import Phase, Run, chosen_rates, runs_of
from stem_jax.study.study import load_study, phases_named
from tests.toy_study import toy_study


def _record(variant, rate, bits, purpose="rate", tokens=100):
    run = Run("s", purpose, variant, "prose", tokens, rate, 1)
    return {"run": run.record(), "measures": {"dev_bits_per_byte": bits}}


def test_runs_come_seed_by_seed(tmp_path):
    study = load_study(toy_study(tmp_path))
    phase = Phase("main", "", ("dense", "stem_half"), (1, 2), shares=(0.5, 1.0))
    runs = runs_of(study, phase, {"stem_half": 3.0})
    full = study.tokens_of(1.0, "prose")
    assert full == 4 * 32 * round(study.tokens / 128) and full % 128 == 0
    assert [(r.seed, r.tokens * 2 // full, r.variant, r.rate) for r in runs] == [
        (seed, share, variant, rate)
        for seed in (1, 2)
        for share in (1, 2)
        for variant, rate in (("dense", 1.0), ("stem_half", 3.0))
    ]
    assert len({run.name for run in runs}) == len(runs)


def test_a_variant_without_trials_takes_the_baselines_rate(tmp_path):
    study = load_study(toy_study(tmp_path))
    phase = Phase("others", "", ("stem_half",), (1,))
    assert [r.rate for r in runs_of(study, phase, {"dense": 3.0})] == [3.0]
    assert [r.rate for r in runs_of(study, phase, {})] == [1.0]


def test_the_rate_with_fewest_dev_bits_is_chosen():
    records = [
        _record("dense", 1 / 3, 2.5),
        _record("dense", 1.0, 2.4),
        _record("dense", 3.0, 2.4),
        _record("stem_half", 3.0, 2.2),
        _record("stem_half", 1.0, 2.3),
        _record("stem_half", 1 / 3, 1.0, purpose="main"),
    ]
    assert chosen_rates(records) == {"dense": 1.0, "stem_half": 3.0}


def test_a_diverged_trial_is_not_chosen():
    broken = _record("dense", 3.0, None)
    broken["measures"] = {}
    assert chosen_rates([broken, _record("dense", 1.0, 9.0)]) == {"dense": 1.0}


def test_configurations_of_runs(tmp_path):
    study = load_study(toy_study(tmp_path))
    run = Run("toy", "main", "dense", "prose", 128 * 20, 3.0, 7)
    config = study.config(run)
    assert (config.train.steps, config.train.seed) == (20, 7)
    assert config.optimizer.learning_rate == pytest.approx(3 * 9e-3)
    assert (config.optimizer.warmup_steps, config.eval.every, config.checkpoint.every) == (2, 5, 5)
    stem = study.config(dataclasses.replace(run, variant="stem_half"))
    assert len(stem.model.stem_layers) == 1


@pytest.mark.parametrize(
    "line, said",
    [
        ("config.train.seq_len = 16", "train.seq_len=16"),
        ("config.data.sources = 'stdlib'", "data.sources='stdlib'"),
        ("config.train.seed = 3", "train.seed=3"),
        ("config.eval.max_batches = 1", "eval.max_batches=1"),
        ("config.model.vocab_size = 512", "model.vocab_size=512"),
        ("config.optimizer.learning_rate = 1.0", "optimizer.learning_rate=1.0"),
    ],
)
def test_variants_share_text_order_and_evaluation(tmp_path, line, said):
    mine = tmp_path / "mine.py"
    mine.write_text(f"def vary(config):\n    {line}\n")
    study = load_study(toy_study(tmp_path), [str(mine)])
    with pytest.raises(InputError, match="which all variants of a study share") as error:
        study.config(Run("toy", "main", "mine", "prose", 1280, 1.0, 1))
    assert said in str(error.value) and "'mine'" in str(error.value)


def test_a_users_variant_is_compared(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def vary(config):\n    config.model.ffn_dim = 40\n")
    study = load_study(toy_study(tmp_path), [str(mine)])
    assert [p.variants[-1] for p in study.phases] == ["mine", "mine", "dense"]


def test_phases_by_purpose(tmp_path):
    study = load_study(toy_study(tmp_path))
    assert [p.purpose for p in phases_named(study, ["main"])] == ["main"]
    assert phases_named(study, []) == study.phases
    with pytest.raises(InputError, match="--phases=nights is none of rate, main, length"):
        phases_named(study, ["nights"])


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('"tokens": 2560', '"token": 2560', "unknown key 'token'"),
        ('"baseline": "dense",', "", "key 'baseline' is missing"),
        ('"texts": {"prose"', '"texts": {"verse"', "reads text 'prose'"),
        ('"says": "rates"', '"sais": "rates"', "unknown key 'sais'; known: purpose, says"),
        ('"vocab_size": 300', '"vocab": 300', "text 'prose': unknown key 'vocab'"),
        ('("dense", "stem_half")', '"dense"', "phase 'main': variants is 'dense'; give a tuple"),
        ('"seeds": (1000,)', '"seeds": ()', r"phase 'rate': seeds is \(\); give a tuple"),
        ('"tokens": 2560', '"tokens": "many"', "tokens is 'many'; give a number over 0"),
        ('"minutes": None', '"minutes": -1', "minutes is -1; give a number over 0"),
        ('"base": base', '"base": {}', r"base is \{\}; give what a config's get_config"),
        ('"baseline": "dense"', '"baseline": "stem_half"', "results compare with 'dense'"),
        ("def get_study", "def study", r"has no function get_study\(\); add one"),
        ("    return {", "    return 3\n    _ = {", r"get_study\(\) is 3; give a dict"),
    ],
)
def test_study_files_are_refused(tmp_path, old, new, said):
    path = toy_study(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=said):
        load_study(path)
