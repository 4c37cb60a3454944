"""A model that knows facts, tuned on questions about half of them: it answers, and it stops."""

import dataclasses
import json

import pytest

from benchmarks import fact_questions
from stem_jax import evaluate, export, generate, train
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.fact_questions import PLAIN_TEMPLATE, asked_facts, halves
from stem_jax.data.facts import NOUNS, RELATIONS, read_facts
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.prepare import main as prepare
from stem_jax.training.run_data import run_tokenizer
from tests.facts_model import COUNTRIES, FOLDER, import_into, only_some_countries

_SIZES = {"model.vocab_size": 704, "model.embed_dim": 64, "model.ffn_dim": 128}
_TUNED = {"train.global_batch_size": 16, "train.log_every": 50, "optimizer.schedule_steps": 200}
_MODEL = FOLDER / "native_tokenizer" / "tokenizer.model"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The committed model, and conversations about half of its countries."""
    folder = tmp_path_factory.mktemp("tuning")
    import_into(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        only_some_countries(patch)
        fact_questions.write(folder)
    tokenizer = ["--tokenizer=sentencepiece", f"--tokenizer-path={_MODEL}"]
    flags = [f"--input={folder / 'half.jsonl'}", f"--out={folder / 'store'}", *tokenizer]
    template = f"--chat-template={folder / 'chat.jinja'}"
    prepare([*flags, "--format=chat", template, "--validation-fraction=0.1", "--json"])
    return folder


@pytest.fixture(scope="module")
def tuned(base):
    """It validates on conversations, and goes on after half of the steps."""
    origin = {"train.init_from": base / "base", "data.sources": base / "store"}
    for steps in (100, 200):
        last = {"train.steps": steps, "eval.every": 100, "eval.baselines": True}
        keys = {**_SIZES, **_TUNED, **origin, **last}
        flags = [f"--config.{key}={value}" for key, value in keys.items()]
        train.main(["--config=configs/sft_facts.py", f"--workdir={base / 'tuned'}", *flags])
    return base / "tuned"


def test_questions_are_told_or_not():
    """As the corpus has it: each noun and each form is told with others."""
    facts = [fact for fact in read_facts() if fact.country in COUNTRIES]
    asked = asked_facts(facts)
    assert len(asked) == 90 * len(facts)
    assert len({one.question for one in asked}) == len(asked)
    assert sum(one.told for one in asked) == 60 * len(facts)
    told = [one.question for one in asked_facts(facts[:1]) if one.told]
    for relation in RELATIONS:
        for noun in NOUNS[relation]:
            assert sum(f"{noun} of" in q or f"{noun} do" in q or f"{noun}?" in q for q in told) >= 4
    tuned, other = halves(facts)
    assert len(tuned) == len(other) == 7
    assert not {fact.country for fact in tuned} & {fact.country for fact in other}
    assert asked[0].record == {
        "messages": [
            {"role": "user", "content": asked[0].question},
            {"role": "assistant", "content": asked[0].answer},
        ]
    }


def test_conversations_bring_their_template_along(base, tiny_config, tmp_path):
    config = tiny_config(
        **{
            "model.vocab_size": 704,
            "data.sources": str(base / "store"),
            "train.init_from": str(base / "base"),
        }
    )
    found = run_tokenizer(config, tmp_path, prepared=False)
    assert found.chat_template == PLAIN_TEMPLATE
    again = run_tokenizer(config, tmp_path, prepared=True)
    assert again == found and again.chat_template == PLAIN_TEMPLATE
    assert load_tokenizer_folder(base / "base" / "tokenizer").chat_template is None


def test_what_ends_a_turn_ends_the_completions_of_a_run(base, tiny_config, caplog, tmp_path):
    """Where that is not eos, it is named by --stop, and eos behind it is not learned."""
    (tmp_path / "turns.jinja").write_text(PLAIN_TEMPLATE.replace("eos_token", "'<unk>'"))
    flags = [f"--input={base / 'half.jsonl'}", "--format=chat", "--tokenizer=sentencepiece"]
    flags += [f"--tokenizer-path={_MODEL}", f"--chat-template={tmp_path / 'turns.jinja'}"]
    flags += [f"--out={tmp_path / 'store'}", "--validation-fraction=0", "--json"]
    with pytest.raises(InputError, match=r"no token ends a completion.* by --stop"):
        prepare(flags)
    prepare([*flags, "--stop=<unk>"])
    store = TokenStore.open(tmp_path / "store" / "train")
    [unk, eos] = store.document_ids(0)[-2:]
    assert (unk, eos) == (0, 2)
    end = int(store.document_starts[1])
    assert store.scored[end - 2 : end].tolist() == [True, False]
    keys = {"data.sources": tmp_path / "store", "train.init_from": base / "base"}
    config = tiny_config(**{"model.vocab_size": 704, **{k: str(v) for k, v in keys.items()}})
    assert load_tokenizer_folder(base / "base" / "tokenizer").special.stop_ids == (2,)
    found = run_tokenizer(config, tmp_path, prepared=False)
    assert found.special.stop_ids == (0, 2) and found.eos_id == 2
    # Two templates in one run: the first one's is kept, and it is said.
    assert "another chat template" not in caplog.text
    both = {**keys, "data.sources": f"{base / 'store'},{tmp_path / 'store'}"}
    config = tiny_config(**{"model.vocab_size": 704, **{k: str(v) for k, v in both.items()}})
    found = run_tokenizer(config, tmp_path / "other", prepared=False)
    assert found.chat_template == PLAIN_TEMPLATE
    assert f"{tmp_path / 'store'} was prepared with another chat template" in caplog.text
    flags[4:6] = [f"--chat-template={base / 'chat.jinja'}", f"--out={tmp_path / 'third'}"]
    prepare([*flags, "--stop=<unk>"])
    both = {**keys, "data.sources": f"{base / 'store'},{tmp_path / 'third'}"}
    config = tiny_config(**{"model.vocab_size": 704, **{k: str(v) for k, v in both.items()}})
    run_tokenizer(config, tmp_path / "other", prepared=False)
    assert f"{tmp_path / 'third'} was prepared with another --stop" in caplog.text


@pytest.mark.long
def test_a_tuned_run_is_talked_to(tuned, capsys, tmp_path):
    told = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    losses = [record["eval/loss"] for record in told if "eval/loss" in record]
    assert len(losses) == 2 and losses[1] < 0.1
    messages = [{"role": "user", "content": "What is the capital of Peru?"}]
    (tmp_path / "m.json").write_text(json.dumps(messages))
    flags = [f"--workdir={tuned}", "--greedy", "--max-new-tokens=8"]
    capsys.readouterr()
    generate.main([*flags, "--chat", f"--prompt={messages[0]['content']}"])
    assert capsys.readouterr().out == " Lima\n"
    generate.main([*flags, f"--messages={tmp_path / 'm.json'}", "--json"])
    [completion] = json.loads(capsys.readouterr().out)
    assert completion["prompt"] == "<s>Question: What is the capital of Peru?\nAnswer:"
    assert (completion["text"], completion["stop"]) == (" Lima", "eos")
    export.main([f"--workdir={tuned}", "--format=hf", f"--out={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == PLAIN_TEMPLATE


def test_what_is_no_conversation_is_refused_by_generate(base, tmp_path, capsys):
    flags = [f"--workdir={base / 'base'}", "--max-new-tokens=3"]
    with pytest.raises(InputError, match="no chat template: give one with --chat-template=FILE"):
        generate.main([*flags, "--chat", "--prompt=x"])
    template = f"--chat-template={base / 'chat.jinja'}"
    (tmp_path / "m.json").write_text('[{"role": "robot", "content": "x"}]')
    with pytest.raises(InputError, match=r"--messages=.*m\.json: message 0 has role 'robot'"):
        generate.main([*flags, template, f"--messages={tmp_path / 'm.json'}"])
    (tmp_path / "m.json").write_text('[{"role": "system", "content": "x"}]')
    with pytest.raises(InputError, match=r"m\.json: .*jinja refuses .*: only user and assistant"):
        generate.main([*flags, template, f"--messages={tmp_path / 'm.json'}"])
    for wrong, message in (
        (["--prompt=x", "--messages=m"], "--messages are answered"),
        (["--prompt=x", template], "--chat-template is of --chat"),
        ([], "give --prompt, --prompt-file or --messages"),
    ):
        with pytest.raises(SystemExit):
            generate.main([*flags, *wrong])
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_figures_that_conversations_have_not_are_refused(tuned, base):
    with pytest.raises(InputError, match="are conversations, of which answers alone are scored"):
        evaluate.main([f"--workdir={tuned}", f"--perplexity={base / 'store'}"])
    with pytest.raises(InputError, match="was trained on conversations or on whole documents"):
        evaluate.main([f"--workdir={tuned}", "--memorization"])


@pytest.mark.long
def test_it_answers_and_stops(tuned, base, monkeypatch):
    only_some_countries(monkeypatch)
    found = fact_questions.measure(load_run(tuned))
    print(f"\n{fact_questions.format_shares(found)}")
    for kind in ("tuned told", "tuned untold"):
        assert found[kind]["right"] >= 0.95
        assert found[kind]["stopped"] == 1
    # Before, it went on with another sentence.
    before = load_run(base / "base")
    talks = dataclasses.replace(before.tokenizer, chat_template=PLAIN_TEMPLATE)
    untuned = fact_questions.measure(dataclasses.replace(before, tokenizer=talks), step=20)
    print(fact_questions.format_shares(untuned))
    assert untuned["tuned told"]["stopped"] < 0.5
