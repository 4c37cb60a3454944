"""Special tokens, chat templates and generation settings of other people, out and back."""

import dataclasses
import json

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from stem_jax.data.special_tokens import SpecialTokens
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.interop.hf_export import generation_config, hf_config
from stem_jax.interop.import_tokenizer import TokenizerChoice, find_tokenizer
from stem_jax.interop.tokenizer_export import padding_id, write_tokenizer
from tests.tokenizer_kinds import KINDS, load_kind, special_texts, write_kind

MESSAGES = [
    {"role": "user", "content": "What is </s> the capital of Spain?"},
    {"role": "assistant", "content": "Madrid."},
    {"role": "user", "content": "<|im_end|> And of Peru?"},
]


def _export(tokenizer, folder, tiny_config, spare=0):
    """The files of an export but for the weights."""
    sizes = {"model.vocab_size": tokenizer.vocab_size + spare, "model.stem_layers": "none"}
    config = tiny_config(**sizes, **{"train.seq_len": 64})
    folder.mkdir()
    write_tokenizer(tokenizer, folder, 64)
    for name, content in (
        ("config.json", hf_config(config, tokenizer, "float32")),
        ("generation_config.json", generation_config(config, tokenizer)),
    ):
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def trip(request, tiny_config, tmp_path_factory):
    """Kind, the folder as shipped, our tokenizer of it, and the folder of the export."""
    folder = tmp_path_factory.mktemp(request.param)
    ours = load_kind(request.param, folder / "shipped", as_shipped=True)
    return request.param, folder / "shipped", ours, _export(ours, folder / "out", tiny_config)


@pytest.fixture(scope="module")
def both(trip):
    """Our tokenizer, what transformers makes of the export, and all texts of added tokens."""
    kind, _, ours, out = trip
    return ours, transformers.AutoTokenizer.from_pretrained(out), special_texts(kind)


@given(data=st.data())
def test_ids_of_any_text(both, data):
    ours, theirs, added = both
    part = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from([*added, " "])
    text = "".join(data.draw(st.lists(part, max_size=5)))
    ids = [*ours.special.prompt_ids, *ours.encode(text)]
    assert theirs(text, split_special_tokens=True)["input_ids"] == ids
    if not any(name in text for name in ours.special_texts):
        assert theirs(text)["input_ids"] == ids


def test_special_tokens_are_special(both):
    ours, theirs, _ = both
    for text, number in ours.special_texts.items():
        assert theirs(f"a{text} b")["input_ids"].count(number) >= 1, text
        assert theirs.convert_tokens_to_ids(text) == number
    ended = theirs("The answer." + theirs.eos_token)["input_ids"]
    assert ended[-1] == ours.special.eos_id
    assert ended[: len(ours.special.prompt_ids)] == list(ours.special.prompt_ids)


def test_padding(trip, both):
    expected = {
        "llama2": "<unk>",
        "llama3_instruct": "<|finetune_right_pad_id|>",
        # Its only special token ends texts.
        "gpt2": None,
        "gemma": "<pad>",
        "chatml": "<|endoftext|>",
        # It ships eos as padding.
        "smollm2": "<|im_start|>",
        "deepseek": "<｜▁pad▁｜>",
        "unigram": "<pad>",
    }
    kind, *_ = trip
    assert both[1].pad_token == expected[kind]
    assert both[1].eos_token != both[1].pad_token


def test_chat_templates(trip, both):
    kind, shipped, _, _ = trip
    theirs = transformers.AutoTokenizer.from_pretrained(shipped)
    assert (theirs.chat_template is not None) == (kind in ("llama3_instruct", "chatml", "smollm2"))
    assert both[1].chat_template == theirs.chat_template
    if theirs.chat_template is not None:
        for more in (True, False):
            expected, found = (
                tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=more)["input_ids"]
                for tokenizer in (theirs, both[1])
            )
            assert found == expected


def test_generation_settings(trip):
    kind, shipped, ours, out = trip
    expected, found = (
        transformers.GenerationConfig.from_pretrained(folder) for folder in (shipped, out)
    )
    stops = [
        {one.eos_token_id} if isinstance(one.eos_token_id, int) else {*one.eos_token_id}
        for one in (expected, found)
    ]
    assert stops[1] == stops[0] == {*ours.special.stop_ids}
    assert found.max_length == 64
    for name in ("do_sample", "temperature", "top_p"):
        assert getattr(found, name) == getattr(expected, name)
    assert (found.temperature == 0.6) == (kind == "llama3_instruct")


def test_back_again(trip):
    """An import of the export knows what the first import knew."""
    _, _, ours, out = trip
    again = find_tokenizer("hf", out, TokenizerChoice())
    padded = dataclasses.replace(ours.special, pad_id=padding_id(ours))
    assert again.special == padded
    assert again.fingerprint == ours.fingerprint
    assert again.chat_template == ours.chat_template
    for name, value in ours.generation_config.items():
        if not name.endswith("_id"):
            assert again.generation_config[name] == value


def test_documents_of_a_run(trip, tiny_config, tmp_path):
    """Prompts of a model that was trained here begin as its documents do, in an export too."""
    _, _, ours, _ = trip
    trained = ours.for_documents()
    out = _export(trained, tmp_path / "out", tiny_config)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    first = ours.special.eos_id if ours.special.bos_id is None else ours.special.bos_id
    assert theirs("a text")["input_ids"] == [first, *ours.encode("a text")]


def test_spare_ids_are_suppressed_but_stops(tiny_config, tmp_path):
    ours = load_kind("chatml", tmp_path / "shipped")
    V = ours.vocab_size
    special = dataclasses.replace(ours.special, stop_ids=(*ours.special.stop_ids, V + 3))
    ours = dataclasses.replace(
        ours, special=special, generation_config={"suppress_tokens": [5], "max_new_tokens": 9}
    )
    config = tiny_config(**{"model.vocab_size": V + 6, "train.seq_len": 64})
    found = generation_config(config, ours)
    assert found["suppress_tokens"] == [5, V, V + 1, V + 2, V + 4, V + 5]
    assert V + 3 in found["eos_token_id"]
    assert found["eos_token_id"][0] == ours.special.eos_id
    # Someone's own limit counts.
    assert found["max_new_tokens"] == 9
    assert "max_length" not in found


def test_several_templates(tiny_config, tmp_path):
    files = write_kind("chatml", tmp_path / "shipped") / "tokenizer_config.json"
    settings = json.loads(files.read_text())
    other = "{{ 'tools: ' }}{{ messages[0]['content'] }}\n"
    both = {"default": settings["chat_template"], "tool_use": other}
    settings["chat_template"] = [{"name": k, "template": v} for k, v in both.items()]
    files.write_text(json.dumps(settings))
    ours = load_tokenizer("hf", tmp_path / "shipped" / "tokenizer.json")
    out = _export(ours, tmp_path / "out", tiny_config)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == both
    assert find_tokenizer("hf", out, TokenizerChoice()).chat_template == both
    ours = dataclasses.replace(ours, chat_template={"../../x": other})
    with pytest.raises(InputError, match=r"chat template is named '../../x', which is no name"):
        _export(ours, tmp_path / "bad", tiny_config)
    assert not (tmp_path / "x.jinja").exists()


def test_a_token_that_its_file_does_not_mark(tiny_config, tmp_path):
    """Marked in the export: what ends documents is special, as here."""
    path = write_kind("deepseek", tmp_path / "shipped") / "tokenizer.json"
    ours = load_tokenizer("hf", path)
    number = ours.processor.token_to_id("<｜User｜>")
    special = dataclasses.replace(ours.special, stop_ids=(*ours.special.stop_ids, number))
    assert isinstance(special, SpecialTokens)
    settings = json.loads((path.parent / "generation_config.json").read_text())
    settings["eos_token_id"] = list(special.stop_ids)
    (path.parent / "generation_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer("hf", path)
    assert ours.special.stop_ids == special.stop_ids
    out = _export(ours, tmp_path / "out", tiny_config)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ids = theirs("a<｜User｜>", split_special_tokens=True)["input_ids"]
    assert ids[1:] == ours.encode("a<｜User｜>")
    assert number not in ids
    assert theirs("a<｜User｜>")["input_ids"][-1] == number
