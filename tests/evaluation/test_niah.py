"""Needles in a haystack: prompts as asked for, honest counting, a picture that opens."""

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest

from stem_jax import cli, evaluate
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.corpora import read_corpus
from stem_jax.data.needles import (
    FILLER,
    KEYS,
    VALUES,
    draw_needles,
    haystack,
    needle,
    question,
)
from stem_jax.errors import InputError
from stem_jax.evaluation.haystacks import draw_sample
from stem_jax.evaluation.niah import format_retrieval, retrieval
from stem_jax.evaluation.results import check_out
from stem_jax.generation.completion import Completion
from stem_jax.generation.generator import Generator
from tests.pictures import assert_is_heatmap
from tests.saved_models import SIZES, save_run, trained_state

CONTEXT = 256


@pytest.fixture(scope="module")
def run_folder(train_step, make_batch, tmp_path_factory):
    """A model of bytes that knows nothing of needles; its context is 256 of them."""
    folder = tmp_path_factory.mktemp("run")
    step = train_step(**{**SIZES, "model.stem_layers": (1,), "model.num_layers": 2})
    save_run(folder, step, trained_state(step, make_batch), context=CONTEXT)
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
    """answers(function of the prompt): replaces the model; returns the prompts that it was given.

    It ends with eos only where a whole answer ends with "</s>".
    """

    def replace(answer):
        asked = []

        def complete(self, prompts, max_new_tokens, *_, **__):
            asked.extend(prompts)
            texts = [answer(prompt)[: max_new_tokens + len("</s>")] for prompt in prompts]
            return [
                Completion(prompt, text.removesuffix("</s>")[:max_new_tokens], [], stop, None)
                for prompt, text in zip(prompts, texts)
                for stop in ["eos" if text.endswith("</s>") else "length"]
            ]

        monkeypatch.setattr(Generator, "complete", complete)
        return asked

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
    options = {"lengths": [256, 180], "depths": [1, 0], "samples": 8, "progress": False}
    answers(lambda prompt: f" {_reading(prompt)}. And more")
    result = retrieval(run, keys=[1, 2], **options)
    assert [table["keys"] for table in result["tables"]] == [1, 2]
    for table in result["tables"]:
        assert table["lengths"] == [180, 256] and table["depths"] == [0, 1]
        assert table["mean"] == table["strict_mean"] == 1
        assert table["accuracy"] == table["strict"] == [[1, 1], [1, 1]]
    answers(lambda prompt: " Heron.")
    assert retrieval(run, **options)["tables"][0]["mean"] < 0.2
    deep = {"lengths": [128], "depths": [0, 1], "samples": 4, "progress": False}
    answers(lambda prompt: f" {_reading(prompt)}. " if prompt.startswith("The agent") else " No.")
    result = retrieval(run, **deep)
    assert result["tables"][0]["accuracy"] == [[1, 0]]
    assert format_retrieval(result).splitlines() == [
        "1 key: 50.0% found (50.0% strictly), 4 samples a cell",
        "depth        128",
        "0.00        100%",
        "1.00          0%",
    ]


@pytest.mark.parametrize(
    ("answer", "found", "strict"),
    [
        (" {}.", 1, 1),
        ("{}. The", 1, 1),
        # Whoever was not trained on these sentences goes on, or has said all.
        (" {} is here.", 1, 0),
        ("\n{}, who", 1, 0),
        (" {} {}.", 1, 0),
        (" {} Nobody.", 1, 0),
        (" {}</s>", 1, 0),
        # Cut off: what would have followed nobody knows.
        (" {}", 0, 0),
        (" {}ry.", 0, 0),
        (" {}-like.", 0, 0),
        (" {}'s.", 0, 0),
        (" the {}.", 0, 0),
        (" Nobody {}.", 0, 0),
        (". {}.", 0, 0),
        ("", 0, 0),
    ],
)
def test_what_counts_as_found(run, answers, answer, found, strict):
    answers(lambda prompt: answer.replace("{}", _reading(prompt)))
    [table] = retrieval(run, lengths=[128], depths=[0], samples=4, progress=False)["tables"]
    assert (table["accuracy"], table["mean"]) == ([[found]], found)
    assert (table["strict"], table["strict_mean"]) == ([[strict]], strict)


def _with_context(run, length):
    train = dataclasses.replace(run.config.train, seq_len=length)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))


def test_lengths_that_fit_are_found(run, answers):
    """Of 64, 128, 256 and 512 bytes. A needle takes about 31, the question with its answer 35."""
    asked = answers(lambda prompt: " No.")

    def lengths(keys, depths):
        options = {"keys": keys, "depths": depths, "samples": 3, "progress": False}
        return [
            table["lengths"] for table in retrieval(_with_context(run, 512), **options)["tables"]
        ]

    assert lengths([1, 2, 4, 8], [0]) == [[128, 256, 512], [128, 256, 512], [256, 512], [512]]
    # Five depths are five places only among four sentences, of about 20 bytes, or more.
    asked.clear()
    depths = [0, 0.25, 0.5, 0.75, 1]
    assert lengths([1, 6], depths) == [[256, 512], [512]]
    for number, prompt in enumerate(asked):
        key = prompt.rsplit(" ", 1)[1]
        before, _, after = prompt.partition(f"The agent {key} ")
        above, below = (sum(map(text.count, FILLER)) for text in (before, after))
        places = [round(depth * (above + below)) for depth in depths]
        assert above == places[number // 3 % 5] and places == sorted(set(places))
    assert len(asked) == len(set(asked)) == 3 * 5 * 3
    # Names are drawn anew for every cell.
    assert len({prompt.rsplit(" ", 1)[1] for prompt in asked[:30]}) > 15


def test_needles_at_one_place_stand_in_the_order_of_their_depths(generator):
    for seed in range(20):
        # So many fill the length that all stand around one sentence or none.
        sample = draw_sample(generator, random.Random(seed), 128, 0.5, 2)
        rng = random.Random(seed)
        (key, _), (other, _) = draw_needles(rng, 2)
        in_order = sample.prompt.index(f"agent {key} ") < sample.prompt.index(f"agent {other} ")
        assert in_order == (rng.random() > 0.5)


def test_nothing_is_asked_before_all_is_checked(run, answers):
    asked = answers(lambda prompt: " No.")
    for options in ({"lengths": [128], "keys": [1, 8]}, {"lengths": [128, 40]}):
        with pytest.raises(InputError, match="too short"):
            retrieval(run, depths=[0], samples=1, progress=False, **options)
    assert asked == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [64, 257]}, r"--lengths=257 is over the context of train.seq_len=256.*longer"),
        ({"lengths": [40]}, r"--lengths=40 is too short for --keys=1, which takes \d+ tokens"),
        (
            {"lengths": [128], "depths": [0, 0.1, 1]},
            r"--lengths=128 with --keys=1 leaves room for \d other sentences, too few for "
            r"--depths=0,0.1,1 to be different places; give longer ones, or give fewer keys or few",
        ),
        (
            {"keys": [8]},
            r"the context of train.seq_len=256 is too short for --keys=8, which takes \d+ tokens; "
            "train with a longer one, or give fewer keys",
        ),
        (
            {"depths": [0, 0.01, 1]},
            "the context of train.seq_len=256 with --keys=1 leaves room for .* train with a longer",
        ),
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


def test_the_entry_point_writes_table_json_and_picture(
    run_folder, answers, tmp_path, monkeypatch, capsys
):
    """Red cells where nothing is found, green ones where all is, in the places of the axes."""
    flags = [f"--workdir={run_folder}", "--niah", "--keys=1,2", "--lengths=180,256"]
    flags += ["--depths=0,1", "--samples=2", "--batch-size=4", f"--out={tmp_path / 'needles.json'}"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    begins = "The agent"
    answers(lambda prompt: f" {_reading(prompt)}. " if prompt.startswith(begins) else " No. ")
    cli.run(evaluate.main)
    output = capsys.readouterr().out
    assert "1 key: 50.0% found (50.0% strictly), 2 samples a cell" in output
    assert "2 keys: " in output
    record = json.loads((tmp_path / "needles.json").read_text())
    assert record["tables"][0]["accuracy"] == [[1, 0], [1, 0]]
    assert record["tables"][0]["strict"] == [[1, 0], [1, 0]]
    assert_is_heatmap(tmp_path / "needles.png", [t["accuracy"] for t in record["tables"]])


def test_a_picture_that_cannot_be_written_is_refused_before(
    run_folder, answers, tmp_path, monkeypatch
):
    asked = answers(lambda prompt: " No.")
    (tmp_path / "needles.png").mkdir()
    flags = [f"--workdir={run_folder}", "--niah", f"--out={tmp_path / 'needles.json'}"]
    with pytest.raises(InputError, match=r"needles.json puts needles.png beside it, where a fold"):
        evaluate.main(flags)
    assert asked == []


def test_results_that_cannot_be_written_are_refused_before(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    check_out(tmp_path / "new" / "a.json")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(InputError, match=r"--out=.*a.json cannot be written \(no space left\); "):
        check_out(tmp_path / "new" / "a.json")


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
