"""Needles in a haystack: prompts as asked for, honest counting, a picture that opens."""

import json
import random
import sys

import matplotlib.image
import pytest
from saved_models import CONTEXT, SIZES, save_run, trained_state

from stem_jax import cli, evaluate
from stem_jax.completion import Completion
from stem_jax.data.corpora import read_corpus
from stem_jax.data.needles import FILLER, KEYS, VALUES, haystack, needle, question
from stem_jax.errors import InputError
from stem_jax.evaluation.niah import draw_sample, format_retrieval, retrieval
from stem_jax.generation import Generator
from stem_jax.loading import load_run


@pytest.fixture(scope="module")
def run_folder(train_step, make_batch, tmp_path_factory):
    """A model of bytes that knows nothing of needles; its context is 128 of them."""
    folder = tmp_path_factory.mktemp("run")
    step = train_step(**{**SIZES, "model.stem_layers": (1,), "model.num_layers": 2})
    save_run(folder, step, trained_state(step, make_batch))
    return folder


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder)


@pytest.fixture(scope="module")
def generator(run):
    return Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)


def _reading(prompt):
    """What someone answers who reads the prompt."""
    key = prompt.rsplit(" ", 1)[1]
    return next(v for v in VALUES if needle(key, v) in prompt)


@pytest.fixture
def answers(monkeypatch):
    """answers(function of the prompt): replaces the model."""

    def replace(answer):
        def complete(self, prompts, max_new_tokens, *_, **__):
            return [Completion(p, answer(p)[:max_new_tokens], [], "length", None) for p in prompts]

        monkeypatch.setattr(Generator, "complete", complete)

    return replace


def test_a_haystack_holds_its_needles_where_they_belong():
    sentences = ["a.", "b.", "c.", "d."]
    assert haystack(sentences, [(0.0, "N.")]) == "N. a. b. c. d."
    assert haystack(sentences, [(1.0, "N."), (0.5, "M.")]) == "a. b. M. c. d. N."
    assert haystack([], [(0.3, "N."), (0.9, "M.")]) == "N. M."


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_samples_fill_their_length(generator, keys, depth):
    for length in (110, CONTEXT):
        for seed in range(5):
            sample = draw_sample(generator, random.Random(seed), length, depth, keys)
            text, asked = sample.prompt.split("\n")
            key = asked.split()[-1]
            assert asked == question(key) and needle(key, sample.value) in text
            assert sum(text.count(f"agent {name} ") for name in KEYS) == keys
            tokens = len(generator.encode(sample.prompt)) + len(f" {sample.value}.")
            # One more sentence would not fit.
            assert length - max(map(len, FILLER)) - 1 <= tokens <= length
            before, after = text.split(needle(key, sample.value))
            assert before == "" or depth > 0 or keys > 1
            assert after == "" or depth < 1 or keys > 1


def test_prompts_are_a_function_of_the_seed(generator):
    def prompts(seed):
        return [draw_sample(generator, random.Random(f"{seed} {n}"), 128, 0.5, 1) for n in range(8)]

    assert prompts(0) == prompts(0)
    assert len({sample.prompt for sample in prompts(0) + prompts(1)}) == 16


def test_who_reads_finds_all_and_who_guesses_finds_few(run, answers):
    options = {"lengths": [128, 112], "depths": [0, 1], "samples": 8, "progress": False}
    answers(lambda prompt: f" {_reading(prompt)}. And more")
    result = retrieval(run, keys=[1, 2], **options)
    assert [table["keys"] for table in result["tables"]] == [1, 2]
    for table in result["tables"]:
        assert table["lengths"] == [112, 128] and table["mean"] == 1
        assert table["accuracy"] == [[1, 1], [1, 1]]
    answers(lambda prompt: " Heron.")
    assert retrieval(run, **options)["tables"][0]["mean"] < 0.2
    # Neither a value without its end nor one among other words is exact.
    for wrong in (" {}", " {} {}.", " the {}."):
        answers(lambda prompt, wrong=wrong: wrong.format(*[_reading(prompt)] * 2))
        assert retrieval(run, **options)["tables"][0]["mean"] == 0
    deep = {"lengths": [128], "depths": [0, 1], "samples": 4, "progress": False}
    answers(lambda prompt: f" {_reading(prompt)}." if prompt.startswith("The agent") else " No.")
    result = retrieval(run, **deep)
    assert result["tables"][0]["accuracy"] == [[1, 0]]
    assert format_retrieval(result).splitlines()[1:] == [
        "depth        128",
        "0.00        100%",
        "1.00          0%",
    ]


def test_lengths_that_fit_are_found(run, answers):
    answers(lambda prompt: " No.")
    small = {"depths": [0], "samples": 1, "progress": False}
    assert [t["lengths"] for t in retrieval(run, keys=[1, 2], **small)["tables"]] == [[128], [128]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [64, 129]}, r"--lengths=129 is over the context of train.seq_len=128.*longer"),
        ({"lengths": [40]}, r"--lengths=40 is too short for --keys=1, which takes \d+ tokens"),
        ({"keys": [8]}, r"--lengths=128 is too short for --keys=8, which takes \d+ tokens"),
        ({"keys": [0]}, "--keys=0 must lie in 1 to 48"),
        ({"keys": [49]}, "--keys=49 must lie in 1 to 48"),
        ({"depths": [0, 1.5]}, r"--depths=1.5 must lie in 0 \(first\) to 1"),
        ({"samples": 0}, "--samples=0 must be at least 1"),
        ({"batch_size": 0}, "--batch-size=0 must be at least 1"),
    ],
)
def test_refused_values(run, options, message):
    with pytest.raises(InputError, match=message):
        retrieval(run, progress=False, **options)


def test_the_entry_point_writes_table_json_and_picture(run_folder, tmp_path, monkeypatch, capsys):
    flags = [f"--workdir={run_folder}", "--niah", "--keys=1,2", "--lengths=110,128"]
    flags += ["--depths=0,1", "--samples=2", "--batch-size=4", f"--out={tmp_path / 'needles.json'}"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    cli.run(evaluate.main)
    output = capsys.readouterr().out
    assert "1 key: 0.0% of 2 samples a cell" in output and "2 keys: 0.0%" in output
    record = json.loads((tmp_path / "needles.json").read_text())
    assert record["tables"][1]["accuracy"] == [[0, 0], [0, 0]]
    picture = matplotlib.image.imread(tmp_path / "needles.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    # Axes and text on white, cells in colour.
    assert picture.std() > 0.05


def test_the_corpus_asks_for_what_it_told():
    documents = list(read_corpus("needles"))
    assert documents == list(read_corpus("needles"))
    counts = set()
    for document in documents[:500]:
        text, answers = document.rstrip("\n").split("\n")
        asked = answers.removeprefix("Who is ").split(" Who is ")
        counts.add(len(asked))
        for answer in asked:
            key, full = answer.split("? ")
            value = full.removeprefix(f"The agent {key} ").removesuffix(".")
            assert value in VALUES and text.count(needle(key, value)) == 1
            assert text.count(f"agent {key} ") == 1
    assert counts == set(range(1, 9))


@pytest.mark.parametrize(
    ("corpus", "counts"), [("name_pairs", {2}), ("roll_calls", {*range(2, 9)})]
)
def test_names_are_told_twice(corpus, counts):
    documents = list(read_corpus(corpus))
    assert len(set(documents)) > 0.9 * len(documents)
    seen = set()
    for document in documents[:500]:
        told = document.removesuffix(".").split(". ")
        count = len(set(told))
        seen.add(count)
        assert len(told) == 2 * count == 2 * len(set(told[:count]))
        assert {name.split()[0] for name in told} < set(KEYS)
    assert seen == counts
