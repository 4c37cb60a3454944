"""What was made with an earlier version goes on: runs, stores, exports and patches are read."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from stem_jax import edit, export, generate, import_torch, prepare
from stem_jax.checkpoints.files import LIST
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer_folder
from stem_jax.editing.patch_file import read_patch
from tests import earlier, effort
from tests.children import child
from tests.earlier import COMMIT, END, FOLDER, ROOT, STEP, STEP_BEFORE, TWENTY_BEFORE

# Trains one run after the other; prints for each how it failed, or null.
TRAIN = """
import json, sys, traceback
from stem_jax.train import main
found = {}
for name, flags in json.loads(sys.argv[1]).items():
    try:
        main(flags)
        found[name] = None
    except BaseException:
        found[name] = traceback.format_exc()
print(json.dumps(found))
"""
EXPECTED = earlier.expected()
LATER = [str(step) for step in range(STEP + 1, END + 1)]
# Losses of float32 runs on another CPU. Parameters and moments of the run in bfloat16 were rounded
# to it at each update then, and are float32 since: 0.03 of a validation loss of 6.35 was seen.
TOLERANCE = dict.fromkeys(earlier.RUNS, 1e-5) | {"bfloat16": 0.05}
STORE = FOLDER / "store"
# What is printed at the end would compile the decoding of each, and measure baselines.
SILENT = {"train__sample_prompt": "", "eval__baselines": False}
pytestmark = pytest.mark.little_effort
# These and their programs are another kind each; of two tokenizer.json, one is read here.
LONG = ("offloaded", "dense", "bfloat16", "hf_words")


NAMES = [
    pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in earlier.RUNS
]


def _losses(workdir: Path, key: str) -> dict[str, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {str(record["step"]): record[key] for record in records if key in record}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of the kept runs, as they were."""
    folder = tmp_path_factory.mktemp("stopped")
    for name in (*earlier.RUNS, TWENTY_BEFORE):
        earlier.unpack(name, folder)
    return folder


def _train(commands: dict[str, list[str]]) -> dict[str, str | None]:
    """How each of these commands failed, or None. On one device, as the kept runs were made.

    In one process: importing takes longer than training.
    """
    with child("-c", TRAIN, json.dumps(commands), stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err[-5000:]
    failures = json.loads(out.splitlines()[-1])
    assert failures.keys() == commands.keys()
    return failures


@pytest.fixture(scope="module")
def trained(stopped, tmp_path_factory):
    """Kept runs continued, and two that begin with what was kept: folder, failures by name."""
    folder = tmp_path_factory.mktemp("trained") / "runs"
    shutil.copytree(stopped, folder)
    commands = {name: earlier.train_flags(name, folder / name, **SILENT) for name in earlier.RUNS}
    before = folder / TWENTY_BEFORE
    commands[TWENTY_BEFORE] = earlier.train_flags("sentencepiece", before, **SILENT)
    # A list of files is not in checkpoints of still earlier versions.
    (folder / "sentencepiece" / "checkpoints" / str(STEP) / LIST).unlink()
    tokenizer = STORE / "tokenizer" / "tokenizer.model"
    fresh = SILENT | {"train__steps": 2, "eval__every": 0, "checkpoint__every": 0}
    store = {"data__sources": STORE, "data__tokenizer_path": tokenizer}
    commands["store"] = earlier.train_flags("sentencepiece", folder / "store", **fresh, **store)
    origin = {"train__init_from": stopped / "sentencepiece"}
    commands["origin"] = earlier.train_flags("sentencepiece", folder / "origin", **fresh, **origin)
    return folder, _train(commands)


def _completion(capsys, workdir: Path, prompts: list[str], *flags: str) -> list[dict]:
    capsys.readouterr()
    asked = [f"--prompt={prompt}" for prompt in prompts]
    generate.main(
        [f"--workdir={workdir}", *asked, "--greedy", "--max-new-tokens=12", "--json", *flags]
    )
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def _same_completions(found: list[dict], then: list[dict]) -> None:
    # What is known of a completion may grow.
    assert [{key: f[key] for key in t} for f, t in zip(found, then, strict=True)] == then


@pytest.mark.long
@pytest.mark.parametrize("name", earlier.RUNS)
def test_the_same_command_continues(name, trained, stopped):
    folder, failures = trained
    assert failures[name] is None, failures[name]
    before, after = (_losses(place / name, "train/loss") for place in (stopped, folder))
    assert list(after) == [str(step) for step in range(1, END + 1)]
    assert {step: after[step] for step in before} == before
    then = EXPECTED[name]
    for key, losses in (("losses", after), ("validation", _losses(folder / name, "eval/loss"))):
        found = [losses[step] for step in then[key]]
        np.testing.assert_allclose(found, list(then[key].values()), atol=TOLERANCE[name], rtol=0)
    assert list(then["losses"]) == LATER and then["validation"]
    # Made from what the checkpoint holds, before any update.
    assert after[LATER[0]] == pytest.approx(then["losses"][LATER[0]], rel=0, abs=1e-5)


@pytest.mark.long
def test_goes_on_for_twenty_steps_as_then(trained, stopped):
    """From format 2: a moment in the order of then would be off by some 1e-3 from step 228 on."""
    folder, failures = trained
    assert failures[TWENTY_BEFORE] is None, failures[TWENTY_BEFORE]
    layout = stopped / TWENTY_BEFORE / "checkpoints" / str(STEP_BEFORE) / "layout" / "metadata"
    assert json.loads(layout.read_text())["format"] == 2
    then = EXPECTED[TWENTY_BEFORE]["losses"]
    assert list(then) == [str(step) for step in range(STEP_BEFORE + 1, END + 1)] and len(then) == 20
    # The same numbers as were kept of the run that was not continued from here.
    assert then == then | EXPECTED["sentencepiece"]["losses"]
    after = _losses(folder / TWENTY_BEFORE, "train/loss")
    assert list(after) == [str(step) for step in range(1, END + 1)]
    found = [after[step] for step in then]
    np.testing.assert_allclose(found, list(then.values()), atol=1e-5, rtol=0)


@pytest.mark.long
def test_a_new_run_reads_an_earlier_store(trained):
    folder, failures = trained
    assert failures["store"] is None, failures["store"]
    assert len(_losses(folder / "store", "train/loss")) == 2
    assert len(_losses(folder / "store", "eval/loss")) == 1


@pytest.mark.long
def test_a_new_run_begins_with_an_earlier_one(trained):
    folder, failures = trained
    assert failures["origin"] is None, failures["origin"]
    # That run knew its text by heart.
    assert _losses(folder / "origin", "train/loss")["1"] < 2


@pytest.mark.parametrize("name", NAMES)
def test_a_run_completes_as_then(name, stopped, capsys):
    then = EXPECTED[name]["completions"]
    prompts = [completion["prompt"] for completion in then]
    _same_completions(_completion(capsys, stopped / name, prompts), then)


@pytest.mark.long
@pytest.mark.parametrize("name", ("sentencepiece", "hf", "hf_words", "bytes"))
def test_a_continued_run_has_the_tokenizer_of_then(name, trained):
    folder, _ = trained
    tokenizer = load_tokenizer_folder(folder / name / "tokenizer")
    kept = EXPECTED[name]["tokenizer"]
    assert {key: getattr(tokenizer, key) for key in kept} == kept
    [data] = (folder / name / "data").glob("*/source.json")
    store = TokenStore.open(data.parent / "train", fingerprint=tokenizer.fingerprint, verify=True)
    ids = store.document_ids(0)
    assert (ids[0], ids[-1]) == (kept["bos_id"], kept["eos_id"])
    assert store.meta.checksum == EXPECTED[name]["checksums"]["train"]


@pytest.mark.parametrize("kind", earlier.STORES)
def test_the_same_text_has_the_checksum_of_then(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = f"--input={earlier.SHOWN}/text.jsonl"
    prepare.main([text, *earlier.STORES[kind], *earlier.SPLIT, f"--out={tmp_path / 'store'}"])
    for split, checksum in EXPECTED["stores"][kind].items():
        store = TokenStore.open(tmp_path / "store" / split, verify=True)
        assert store.meta.checksum == checksum


def test_an_earlier_store_is_whole():
    tokenizer = load_tokenizer_folder(STORE / "tokenizer")
    lines = (FOLDER / "text.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {json.loads(line)["text"] for line in lines}
    found = set()
    for split, checksum in EXPECTED["stores"]["sentencepiece"].items():
        store = TokenStore.open(STORE / split, fingerprint=tokenizer.fingerprint, verify=True)
        assert store.meta.checksum == checksum
        ids = [store.document_ids(index) for index in range(store.num_documents)]
        found |= {tokenizer.decode(document) for document in ids}
    assert found == texts


@pytest.mark.long
def test_an_earlier_patch_applies(stopped, capsys):
    then, workdir = EXPECTED["patch"], stopped / "sentencepiece"
    assert then["before"]["text"] != then["after"]["text"]
    for key, flags in (
        ("before", []),
        ("after", [f"--edits={FOLDER / 'patch.safetensors'}"]),
    ):
        found = _completion(capsys, workdir, [then["prompt"]], *flags)
        _same_completions(found, [then[key]])


def test_the_same_edit_gives_the_patch_of_then(stopped, tmp_path):
    path = tmp_path / "patch.safetensors"
    edit.main(
        [f"--workdir={stopped / 'sentencepiece'}", "--swap=harbour=>village", f"--save={path}"]
    )
    then, now = read_patch(FOLDER / "patch.safetensors"), read_patch(path)
    assert (now.run, now.tokenizer) == (then.run, then.tokenizer)
    for name in ("ids", "layers"):
        np.testing.assert_array_equal(getattr(now, name), getattr(then, name))
    for name in ("before", "after"):
        np.testing.assert_allclose(getattr(now, name), getattr(then, name), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["export", "export_dense"])
def test_an_earlier_export_is_read(name, stopped, tmp_path, capsys):
    run = {"export": "sentencepiece", "export_dense": "dense"}[name]
    workdir = tmp_path / "imported"
    import_torch.main(["--from=hf", f"--path={FOLDER / name}", f"--workdir={workdir}"])
    then = EXPECTED[run]["completions"]
    found = _completion(capsys, workdir, [completion["prompt"] for completion in then])
    _same_completions(found, then)
    ours, theirs = load_run(stopped / run), load_run(workdir)
    for key, value in ours.params.items():
        np.testing.assert_array_equal(np.asarray(theirs.params[key]), np.asarray(value), key)


@pytest.mark.parametrize("name", ["export", "export_dense"])
def test_an_earlier_export_opens_in_transformers(name):
    run = {"export": "sentencepiece", "export_dense": "dense"}[name]
    folder = FOLDER / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for then in EXPECTED[run]["completions"]:
        ids = tokenizer(then["prompt"], return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        stop = [] if then["stop"] != "eos" else [tokenizer.eos_token_id]
        assert out == then["tokens"] + stop


@pytest.mark.parametrize("name", ["sentencepiece", "dense"])
def test_an_export_has_the_values_of_then(name, stopped, tmp_path):
    then = {"sentencepiece": "export", "dense": "export_dense"}[name]
    export.main([f"--workdir={stopped / name}", "--format=hf", f"--out={tmp_path / 'out'}"])
    old, new = (
        load_file(place / "model.safetensors") for place in (FOLDER / then, tmp_path / "out")
    )
    assert old.keys() == new.keys()
    for key in old:
        np.testing.assert_allclose(new[key], old[key], atol=1e-6, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", [*NAMES[1:5], NAMES[6]])
def test_an_earlier_run_is_exported_and_read_again(name, stopped, tmp_path, capsys):
    out, workdir = tmp_path / "out", tmp_path / "imported"
    export.main([f"--workdir={stopped / name}", "--format=hf", f"--out={out}"])
    import_torch.main(["--from=hf", f"--path={out}", f"--workdir={workdir}"])
    then = EXPECTED[name]["completions"]
    found = _completion(capsys, workdir, [completion["prompt"] for completion in then])
    _same_completions(found, then)


@pytest.mark.long
def test_continues_as_the_version_that_made_it(trained, tmp_path):
    """Both versions continue the kept runs on this machine.

    Dimensions of a head have another order since: sums over them round otherwise.
    """
    archive = subprocess.run(["git", "archive", COMMIT], cwd=ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"this copy has no history back to {COMMIT}: git fetch --unshallow")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (tmp_path / "archive.tar").write_bytes(archive.stdout)
    with tarfile.open(tmp_path / "archive.tar") as files:
        files.extractall(checkout, filter="data")
    shutil.copytree(FOLDER, checkout / earlier.SHOWN)
    names = [name for name in earlier.RUNS if name != "bfloat16"]
    commands = {
        name: earlier.train_flags(name, earlier.unpack(name, tmp_path / "then"), **SILENT)
        for name in names
    }
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "XLA_FLAGS": effort.flags(),
        "JAX_PLATFORMS": "cpu",
    }
    out = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(commands)],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    ).stdout
    assert set(json.loads(out.splitlines()[-1]).values()) == {None}, out
    folder, failures = trained
    for name in names:
        assert failures[name] is None, failures[name]
        for key in ("train/loss", "eval/loss"):
            now, then = (_losses(place / name, key) for place in (folder, tmp_path / "then"))
            assert now.keys() == then.keys()
            np.testing.assert_allclose(
                list(now.values()), list(then.values()), rtol=0, atol=1e-5, err_msg=f"{name} {key}"
            )
