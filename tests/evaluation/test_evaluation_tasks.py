"""Standard tasks: our adapter gives what the harness's own backend gives on the exported model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from stem_jax import cli, evaluate, export
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.corpora import read_corpus
from stem_jax.data.facts import FACT_TEMPLATES, read_facts
from stem_jax.errors import InputError
from stem_jax.evaluation import tasks
from stem_jax.evaluation.harness import HarnessModel
from stem_jax.evaluation.scoring import Scorer
from stem_jax.evaluation.tasks import run_tasks
from stem_jax.generation.generator import Generator
from tests import effort
from tests.facts_model import import_into

pytestmark = pytest.mark.little_effort

TASKS = Path(__file__).parents[1] / "data" / "lm_eval_tasks"
CONTEXT = 128
LIKELIHOOD = 1e-3
LONG = pytest.mark.long
FLAGS = {
    "data.sources": "facts",
    "model.vocab_size": 512,
    "model.embed_dim": 64,
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.ffn_dim": 128,
    "train.seq_len": CONTEXT,
    "train.global_batch_size": 8,
    # Until it knows some answers, and not all.
    "train.steps": 120,
    "train.sample_prompt": "",
    "eval.every": 0,
    "eval.baselines": False,
    "checkpoint.every": 0,
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A model that has read the facts, in a work folder."""
    folder = tmp_path_factory.mktemp("facts")
    command = [sys.executable, "-m", "stem_jax.train", "--config=configs/tiny.py"]
    command += [f"--workdir={folder}", *(f"--config.{key}={FLAGS[key]}" for key in FLAGS)]
    # One device: eight on two cores take several times as long.
    environment = {**os.environ, "XLA_FLAGS": effort.flags(), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """A committed model, whose context is too short for the longest questions."""
    folder = tmp_path_factory.mktemp("small") / "run"
    import_into(folder)
    return folder


@pytest.fixture(scope="module")
def ours(run_folder):
    return HarnessModel(load_run(run_folder), batch_size=8, progress=False)


@pytest.fixture(scope="module")
def theirs(run_folder, tmp_path_factory):
    """The harness's own backend, on the exported model."""
    folder = tmp_path_factory.mktemp("export") / "hf"
    export.main([f"--workdir={run_folder}", f"--out={folder}", "--format=hf"])
    return HFLM(
        pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=4, dtype="float32"
    )


def _answers(results, task):
    return [
        (response[0] if isinstance(response[0], list | tuple) else (response[0], True))
        for sample in results["samples"][task]
        for response in sample["resps"]
    ]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("num_fewshot", [0, 4])
def test_tasks_of_every_request_type_agree_with_the_hf_backend(ours, theirs, num_fewshot):
    options = {"num_fewshot": num_fewshot, "log_samples": True}
    before = ours.truncated
    expected = run_tasks(theirs, [str(TASKS)], **options)
    found = run_tasks(ours, [str(TASKS)], **options)
    assert sorted(found["results"]) == ["facts_choice", "facts_completion", "facts_rolling"]
    for task in ("facts_choice", "facts_rolling"):
        pairs = list(zip(_answers(found, task), _answers(expected, task), strict=True))
        for (likelihood, greedy), (other, other_greedy) in pairs:
            assert abs(likelihood - other) < LIKELIHOOD and greedy == other_greedy
        assert len({likelihood for (likelihood, _), _ in pairs}) > 5
    texts = [text for text, _ in _answers(found, "facts_completion")]
    assert texts == [text for text, _ in _answers(expected, "facts_completion")]
    assert len(set(texts)) > 1
    for task, scores in found["results"].items():
        for name, value in scores.items():
            assert expected["results"][task][name] == pytest.approx(value, abs=1e-4), (task, name)
    assert 0.3 < found["results"]["facts_choice"]["acc,none"] < 1
    assert found["results"]["facts_rolling"]["bits_per_byte,none"] < 2
    # Without examples all fits; four of them do not leave room for some answers.
    assert (ours.truncated > before) == (num_fewshot > 0)


def test_the_local_tasks_are_facts():
    facts = {fact.country: fact for fact in read_facts()}
    prompts = {
        templates[0].split(" {answer}")[0].format(country=fact.country): getattr(fact, relation)
        for relation, templates in FACT_TEMPLATES.items()
        for fact in facts.values()
    }
    corpus = "".join(read_corpus("facts"))
    choices, completions, texts = (
        [json.loads(line) for line in (TASKS / f"facts_{name}.jsonl").read_text().splitlines()]
        for name in ("choice", "completion", "text")
    )
    for doc in choices:
        assert doc["choices"][doc["answer"]] == prompts[doc["prompt"]]
    for doc in completions:
        assert doc["answer"] == prompts[doc["prompt"]]
    for doc in texts:
        assert doc["text"] in corpus


def _request(kind, *arguments):
    return Instance(kind, {}, arguments, 0, metadata=("made_up", 0, 1))


@pytest.mark.long
def test_texts_are_encoded_as_the_hf_backend_encodes_them(ours, theirs):
    assert (ours.prefix_token_id, ours.eot_token_id) == (1, 2)
    assert (theirs.prefix_token_id, theirs.eot_token_id) == (1, 2)
    assert (ours.max_length, ours.max_gen_toks) == (theirs.max_length, theirs.max_gen_toks)
    # Chat templates begin with bos, which does not come twice.
    special = ("<s>The capital", "one</s>", "a</s> of <s><s>b\n</s>", "</s>")
    for text in ("The capital", " of France \n", "", "ünï 12", *special):
        for added in (None, True, False):
            assert ours.tok_encode(text, added) == theirs.tok_encode(text, added)
    pair = ("The capital of France is ", "Paris")
    assert ours._encode_pair(*pair) == theirs._encode_pair(*pair)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_edges_agree_with_the_hf_backend(ours, theirs):
    long = "".join(read_corpus("facts"))[:4000]
    pairs = [("", "Paris is a city"), (long, " Paris"), ("a ", "b"), (long[:300], long[300:500])]
    requests = [_request("loglikelihood", *pair) for pair in pairs]
    for found, expected in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests)):
        assert abs(found[0] - expected[0]) < LIKELIHOOD and found[1] == expected[1]
    rolling = [_request("loglikelihood_rolling", text) for text in (long, "", "a")]
    for found, expected in zip(
        ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling)
    ):
        assert abs(found - expected) < LIKELIHOOD
    settings = [{"until": ["\n"], "max_gen_toks": 40}, {"until": [" the ", "\n\n"]}]
    settings[1] |= {"max_gen_toks": 20, "temperature": 0.0, "do_sample": False}
    requests = [
        _request("generate_until", text, kwargs)
        for text in ("The capital of", long, "In Spain, people")
        for kwargs in settings
    ]
    found, expected = ours.generate_until(requests), theirs.generate_until(requests)
    assert found == expected
    assert all("\n" not in text for text in found[::2])
    assert max(map(len, found)) > 20


@pytest.mark.long
def test_sampling_settings_are_kept_or_refused(ours):
    def texts(count=1, **kwargs):
        request = _request("generate_until", "The", {"until": ["\n"], "max_gen_toks": 12, **kwargs})
        return ours.generate_until([request] * count)

    greedy = texts()
    hot = texts(3, do_sample=True, temperature=5.0)
    assert len({*greedy, *hot}) == 4
    assert texts(3, do_sample=True, temperature=5.0) == hot
    assert texts(do_sample=True, temperature=5.0, top_k=1) == greedy
    with pytest.raises(InputError, match=r"'made_up' sets generation_kwargs.num_beams=4.*use do_s"):
        texts(num_beams=4)
    with pytest.raises(InputError, match=r"max_gen_toks=128 .*seq_len=128 takes 1 to 127"):
        texts(max_gen_toks=128)
    with pytest.raises(InputError, match=r"'made_up'.*temperature=-1.0 must be 0.*change the task"):
        texts(do_sample=True, temperature=-1)
    with pytest.raises(InputError, match=r"'made_up' sets generation_kwargs={.*'many'.*no setting"):
        texts(max_gen_toks="many")
    with pytest.raises(InputError, match=r"continuation 'Paris.*' has .* tokens, the context"):
        ours.loglikelihood([_request("loglikelihood", "a", "Paris" * 200)])


LATE = {
    "num_beams": (
        {"do_sample: false": "num_beams: 4"},
        r"task 'late' sets generation_kwargs.num_beams=4, which is not supported; use do_sample",
    ),
    "length": (
        {"max_gen_toks: 24": "max_gen_toks: 128"},
        r"task 'late' asks for max_gen_toks=128 new tokens, the context of train.seq_len=128 takes",
    ),
    "continuation": (
        {'"{{choices}}"': "\"{{choices | map('replace', ' ', '  ' * 99) | list}}\""},
        r"the continuation .* of task 'late' has \d+ tokens, the context of train.seq_len=128",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LATE)
def test_all_requests_are_checked_before_the_first(ours, tmp_path, monkeypatch, name):
    """However late a task comes, and whatever kind of requests the harness makes first."""
    changes, message = LATE[name]
    kinds = ["facts_choice", "facts_completion"]
    first, late = reversed(kinds) if name == "continuation" else kinds
    for kind, folder in ((first, tmp_path / "first"), (late, tmp_path / "late")):
        folder.mkdir()
        shutil.copy(TASKS / f"{kind}.jsonl", folder)
        shutil.copy(TASKS / f"{kind}.yaml", folder)
    path = tmp_path / "late" / f"{late}.yaml"
    text = path.read_text().replace(f"task: {late}", "task: late")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)

    def at_work(*_, **__):
        raise AssertionError("the device was asked")

    monkeypatch.setattr(Scorer, "score", at_work)
    monkeypatch.setattr(Generator, "steps", at_work)
    folders = [str(tmp_path / "first"), str(tmp_path / "late")]
    with pytest.raises(InputError, match=message):
        run_tasks(ours, folders, on_loaded=ours.expect)


def _run(monkeypatch, capsys, *flags):
    """Exit status, stdout and stderr of the entry point, in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, flags)])
    try:
        cli.run(evaluate.main)
        status = 0
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


@pytest.mark.long
def test_the_entry_point_writes_a_table_and_json(small_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "tasks.json"
    flags = [f"--workdir={small_folder}", f"--tasks={TASKS}", "--limit=2", "--batch-size=4"]
    status, output, _ = _run(monkeypatch, capsys, *flags, f"--out={out}", "--no-progress")
    assert status == 0
    assert "|facts_choice" in output and "bits_per_byte" in output and str(out) in output
    record = json.loads(out.read_text())
    assert (record["step"], record["truncated"]) == (0, 0)
    assert record["n-samples"]["facts_choice"] == {"original": 24, "effective": 2}
    assert [path.name for path in out.parent.iterdir()] == ["tasks.json"]
    status, output, errors = _run(
        monkeypatch, capsys, *flags, "--num-fewshot=4", "--limit=24", "--json"
    )
    record = json.loads(output)
    assert record == json.loads((small_folder / "evaluation" / "tasks.json").read_text())
    assert record["truncated"] > 0
    notes = [line for line in errors.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and f"{record['truncated']} requests were longer" in notes[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks={tmp}"], "has no task YAML"),
        # The harness reads all of its thousands of tasks.
        pytest.param(["--tasks={tmp}/none"], "none is neither a folder nor a task of", marks=LONG),
        (["--tasks={broken}"], "broken.yaml is not YAML"),
        (["--tasks={no_data}"], "--tasks=no_data: its data cannot be had"),
        (["--tasks={tasks}", "--limit=0"], "--limit=0 must be at least 1"),
        (["--tasks={tasks}", "--num-fewshot=-1"], "--num-fewshot=-1 must be at least 0"),
        (["--tasks={tasks}", "--num-fewshot=7"], "too many for task 'facts_rolling', which has 6"),
        (["--tasks={tasks}", "--max-gen-toks=0"], "--max-gen-toks=0 must be at least 1"),
        (["--tasks={tasks}", "--batch-size=0"], "--batch-size=0 must be at least 1"),
        (["--tasks={tasks}", "--out={tmp}"], "is a folder; give the name of a file"),
        (["--tasks={tasks}", "--step=3"], "no checkpoint of step 3"),
    ],
)
def test_refused_input_is_one_line(small_folder, tmp_path, monkeypatch, capsys, flags, message):
    places = {"tmp": tmp_path / "empty", "tasks": TASKS}
    places |= {name: tmp_path / name for name in ("broken", "no_data")}
    for name in places.keys() - {"tasks"}:
        places[name].mkdir()
    (places["broken"] / "broken.yaml").write_text("task: [1, 2\n")
    task = (TASKS / "facts_choice.yaml").read_text().replace("facts_choice", "no_data")
    (places["no_data"] / "no_data.yaml").write_text(task)
    flags = [flag.format(**places) for flag in flags]
    status, output, errors = _run(monkeypatch, capsys, f"--workdir={small_folder}", *flags)
    assert (status, output) == (1, "")
    errors = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_wrong_usage(monkeypatch, capsys):
    assert _run(monkeypatch, capsys, "--workdir=x")[0] == 2
    assert _run(monkeypatch, capsys, "--workdir=x", "--niah", "--tasks=a")[0] == 2
    assert _run(monkeypatch, capsys, "--workdir=x", "--tasks=")[0] == 2


def test_a_missing_harness_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install lm-eval==0\.4\.13"):
        tasks.evaluate_tasks(None, ["arc_easy"])


def test_a_data_set_that_cannot_be_downloaded(monkeypatch):
    class Unreachable:
        def load(self, specs):
            raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    with pytest.raises(InputError, match=r"arc_easy.*allenai/ai2_arc.*HF_HOME.*HF_ENDPOINT"):
        tasks._load(Unreachable(), [tasks._Wanted("arc_easy", "arc_easy", "arc_easy")])
