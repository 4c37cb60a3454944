"""A study: what is asked is compared with what there is; killed and not, it says the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from stem_jax.errors import InputError
from stem_jax.study import code_state
from stem_jax.study.campaign import Campaign, Places, locked
from stem_jax.study.code_state import ROOT, commit, worktree
from stem_jax.study.forecast import forecast
from stem_jax.study.record import FORMAT, config_of_record, write_record
from stem_jax.study.study import load_study, phases_named
from stem_jax.study.texts import load_recipes, prepare_text
from tests import effort
from tests.study.archives import archive, prose, recipe
from tests.study_records import record
from tests.toy_study import toy_study


def _campaign(folder: Path, phases=(), mixed=False) -> Campaign:
    study = load_study(toy_study(folder))
    places = Places(folder / "work", folder / "records", folder / "texts")
    return Campaign(study, phases_named(study, phases), places, mixed, lambda line: None)


def _put(campaign: Campaign, name: str, **changed) -> None:
    """A record of one of the runs that are asked for."""
    run = next(run for run in campaign.asked() if run.name == name)
    config = config_of_record(campaign.study.config(run), run.text)
    made = record(run.variant, run.seed) | {"name": name, "run": run.record(), "config": config}
    made = {key: value for key, value in (made | changed).items() if key != "checksum"}
    write_record(campaign.places.records, {**made, "format": FORMAT})


def test_runs_are_asked_for_once_each(tmp_path):
    campaign = _campaign(tmp_path)
    names = [run.name for run in campaign.asked()]
    assert len(names) == len(set(names)) == 2 + 4 + 2
    assert campaign.missing() == campaign.asked()


def test_what_has_a_record_is_not_missing(tmp_path):
    campaign = _campaign(tmp_path)
    first = campaign.asked()[0].name
    _put(campaign, first)
    campaign.read()
    assert len(campaign.missing()) == 7 and first not in [run.name for run in campaign.missing()]
    table = forecast(campaign, 2)
    assert (
        "rate            2     1        1" in table and "all             8     1        7" in table
    )


def test_a_record_of_another_study_is_refused(tmp_path):
    campaign = _campaign(tmp_path)
    run = campaign.asked()[0]
    config = config_of_record(campaign.study.config(run), run.text)
    config["model"]["ffn_dim"] = 99
    _put(campaign, run.name, config=config)
    with pytest.raises(InputError, match=r"model\.ffn_dim=99, the study asks for 24"):
        campaign.read()


def test_records_of_two_commits_are_refused(tmp_path):
    campaign = _campaign(tmp_path)
    first, second, *_ = (run.name for run in campaign.asked())
    _put(campaign, first)
    _put(campaign, second, commit="e" * 40)
    with pytest.raises(InputError, match="--mixed-code"):
        campaign.read()
    mixed = _campaign(tmp_path, mixed=True)
    mixed.read()
    assert len(mixed.records) == 2


def test_a_folder_that_was_changed_by_hand_is_refused(tmp_path):
    campaign = _campaign(tmp_path)
    run = campaign.asked()[1]
    folder = campaign.places.workdir / "runs" / run.name
    folder.mkdir(parents=True)
    text = campaign.study.config(run).to_json()
    (folder / "config.json").write_text(text)
    campaign.read()
    (folder / "config.json").write_text(text.replace('"beta2": 0.95', '"beta2": 0.9'))
    with pytest.raises(InputError, match=r"optimizer\.beta2=0\.9, the study asks for 0\.95"):
        campaign.read()


def test_a_phase_waits_for_its_rates(tmp_path):
    campaign = _campaign(tmp_path, ["main"])
    with pytest.raises(InputError, match="ask for --phases=rate,main"):
        campaign.train(None, None)


class _Workers:
    """Notes what it is to do."""

    def run(self, jobs, code, done, deadline=None):
        self.commits, self.code = {job["commit"] for job in jobs}, code


def test_whose_code_trains_what_is_missing(tmp_path, monkeypatch):
    campaign, workers, theirs = _campaign(tmp_path, ["rate"]), _Workers(), "b" * 40
    config = config_of_record(campaign.study.config(campaign.asked()[0]), "prose")
    campaign.records = {"x": record(commit=theirs) | {"config": config}}
    text = types.SimpleNamespace(store=tmp_path / "store")
    monkeypatch.setattr(Campaign, "_text", lambda self, name: text)
    monkeypatch.setattr(code_state, "commit", lambda: "a" * 40)
    monkeypatch.setattr(code_state, "worktree", lambda wanted, folder: folder / wanted)
    campaign.train(workers, None)
    assert workers.code == tmp_path / "work" / "code" / theirs and workers.commits == {theirs}
    # Such as where the other cannot be brought back.
    campaign.mixed_code = True
    campaign.train(workers, None)
    assert workers.code == ROOT and workers.commits == {"a" * 40}


def test_one_study_in_a_folder(tmp_path):
    with (
        locked(tmp_path / "work", "--workdir"),
        pytest.raises(InputError, match="is in use by process"),
    ):
        locked(tmp_path / "work", "--workdir")


def test_another_commits_code(tmp_path):
    if len(commit()) < 40:
        pytest.skip("no git checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    folder = tmp_path / "code"
    try:
        assert worktree(head.stdout.strip(), folder) == folder
        assert (folder / "stem_jax" / "study").is_dir()
        with pytest.raises(InputError, match="holds commit"):
            worktree("0" * 40, folder)
    finally:
        remove = ["git", "worktree", "remove", "--force", str(folder)]
        subprocess.run(remove, cwd=ROOT, capture_output=True)
    with pytest.raises(InputError, match="cannot bring back"):
        worktree("0" * 40, tmp_path / "other")


def test_wide_intervals_are_told_of_after_three_pairs(tmp_path):
    said = []
    campaign = _campaign(tmp_path)
    campaign.say = said.append
    for seed in (1, 2, 3):
        for variant, bits in (("dense", 2.0), ("stem_half", 1.9 + 0.1 * seed)):
            made = record(variant, seed, purpose="main", bits=bits)
            campaign.records[made["name"]] = made
            campaign._warn_of_width(made["run"])
    assert len(said) == 1 and "after 3 pairs the interval of stem_half will be" in said[0]


def _text(folder: Path) -> None:
    """A small text in the place of the shipped one."""
    cache = folder / "cache"
    packages = [
        archive(cache, "train", "alpha", {f"docs/{n}.rst": prose(n, 900) for n in range(20)}),
        archive(cache, "dev", "delta", {f"docs/{n}.rst": prose(n) for n in (40, 41)}),
        archive(cache, "test", "beta", {f"docs/{n}.rst": prose(n) for n in (50, 51)}),
    ]
    prepare_text("prose", folder / "prose", 300, recipe=recipe(*packages), cache=cache)
    path = folder / "prose" / "text.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"recipe": load_recipes()["prose"].digest}))


def _start(folder: Path, workdir: str, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "stem_jax.study", f"--config={folder / 'toy.py'}"]
    command += [f"--workdir={folder / workdir}", f"--records={folder / workdir / 'records'}"]
    command += [f"--texts={folder / 'texts'}", f"--workers={workers}", "--no-cost"]
    command += ["--phases=rate,main"]
    environment = {**os.environ, "XLA_FLAGS": effort.flags(1)}
    with _said(folder, workdir).open("wb") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT, env=environment)


def _said(folder: Path, workdir: str) -> Path:
    return folder / f"{workdir}.txt"


@pytest.mark.long
@pytest.mark.little_effort
def test_a_study_that_was_killed_says_the_same(tmp_path):
    toy_study(tmp_path)
    _text(tmp_path / "texts")
    whole = _start(tmp_path, "whole", 1)
    assert whole.wait(900) == 0, _said(tmp_path, "whole").read_text()
    cores = len(os.sched_getaffinity(0))
    for turn, number in enumerate((signal.SIGTERM, signal.SIGKILL, signal.SIGKILL)):
        study = _start(tmp_path, "killed", min(2, cores))
        runs, had = tmp_path / "killed" / "runs", turn + 1
        deadline = time.monotonic() + 300
        # In the middle of a training, or of what comes after.
        while len(list(runs.glob("*/metrics.jsonl"))) < had and study.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        study.send_signal(number)
        assert study.wait(300) == (0 if number == signal.SIGTERM else -number)
    again = _start(tmp_path, "killed", min(2, cores))
    assert again.wait(900) == 0, _said(tmp_path, "killed").read_text()
    one, other = ((tmp_path / name / "study.json").read_text() for name in ("whole", "killed"))
    assert one == other
    assert json.loads(one)["missing"] == []
    for name in ("whole", "killed"):
        assert (tmp_path / name / "study.html").stat().st_size > 10_000
    # From records alone, with another number of workers.
    shutil.rmtree(tmp_path / "killed" / "runs")
    last = _start(tmp_path, "killed", 1)
    assert last.wait(300) == 0
    assert (tmp_path / "killed" / "study.json").read_text() == one
    assert not list((tmp_path / "killed" / "runs").glob("*"))
