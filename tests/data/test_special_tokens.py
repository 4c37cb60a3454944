"""Special tokens: what names them, in which order, and what is refused."""

import base64
import functools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jinja2
import pytest
import tokenizers

from stem_jax import prepare
from stem_jax.data.special_tokens import SpecialFlags, SpecialTokens
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer, load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.generation.completion import special_notes
from stem_jax.generation.generator import Generator
from tests.tokenizer_kinds import KINDS, load_kind, write_dummy_prefix_model, write_kind

# Texts of bos and eos of documents, of all stops, and what prompts of an import begin with.
NAMED = {
    "llama2": ("<s>", "</s>", {"</s>"}, ["<s>"]),
    "llama3_instruct": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"},
        ["<|begin_of_text|>"],
    ),
    "gpt2": ("<|endoftext|>", "<|endoftext|>", {"<|endoftext|>"}, []),
    "gemma": ("<bos>", "<eos>", {"<eos>", "<end_of_turn>"}, ["<bos>"]),
    "chatml": (None, "<|im_end|>", {"<|im_end|>", "<|endoftext|>"}, []),
    "smollm2": ("<|im_start|>", "<|im_end|>", {"<|im_end|>"}, []),
    "deepseek": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        {"<｜end▁of▁sentence｜>"},
        ["<｜begin▁of▁sentence｜>"],
    ),
    "unigram": ("<s>", "</s>", {"</s>"}, ["<s>"]),
}


def _texts(tokenizer, ids):
    return [None if number is None else tokenizer.processor.id_to_token(number) for number in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_beside_a_tokenizer_name_them(kind, tmp_path):
    bos, eos, stops, prompt = NAMED[kind]
    tokenizer = load_kind(kind, tmp_path, as_shipped=True)
    special = tokenizer.special
    assert _texts(tokenizer, [special.bos_id, special.eos_id]) == [bos, eos]
    assert set(_texts(tokenizer, special.stop_ids)) == stops
    assert _texts(tokenizer, special.prompt_ids) == prompt
    assert special.pad_id is None or special.pad_id != special.eos_id
    for_documents = load_kind(kind, tmp_path)
    assert _texts(tokenizer, for_documents.special.prompt_ids) == [bos or eos]
    assert (for_documents.bos_id, for_documents.eos_id) == (
        special.eos_id if bos is None else special.bos_id,
        special.eos_id,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_keeps_all_of_it(kind, tmp_path):
    tokenizer = load_kind(kind, tmp_path / "shipped", as_shipped=True)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer_folder(tmp_path / "saved")
    assert loaded == tokenizer
    assert (loaded.chat_template is None) == (kind not in ("llama3_instruct", "chatml", "smollm2"))
    assert loaded.generation_config["eos_token_id"] is not None
    # The model file alone is found with what was recorded beside it.
    path = tmp_path / "saved" / "tokenizer.json"
    assert load_tokenizer("hf", path, as_shipped=True) == tokenizer


def _bare(kind, folder):
    """A tokenizer.json without the files beside it."""
    path = write_kind(kind, folder / kind) / "tokenizer.json"
    return shutil.copyfile(path, folder / f"{kind}.json")


def test_the_only_candidate_of_a_bare_file_is_taken_and_said(tmp_path):
    tokenizer = load_tokenizer("hf", _bare("deepseek", tmp_path))
    assert _texts(tokenizer, tokenizer.special.stop_ids) == ["<｜end▁of▁sentence｜>"]
    assert _texts(tokenizer, [tokenizer.bos_id]) == ["<｜begin▁of▁sentence｜>"]
    assert [note.split("'")[1] for note in tokenizer.notes] == [
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
    ]


@pytest.mark.parametrize(
    ("kind", "eos"),
    [("llama3_instruct", "<|end_of_text|>"), ("chatml", "<|endoftext|>"), ("gemma", "<eos>")],
)
def test_the_end_of_a_turn_is_no_candidate_for_the_end_of_a_document(kind, eos, tmp_path):
    tokenizer = load_tokenizer("hf", _bare(kind, tmp_path))
    assert _texts(tokenizer, [tokenizer.eos_id]) == [eos]
    assert eos in tokenizer.notes[0]


@pytest.mark.parametrize(
    "names", [("</s>", "<|endoftext|>"), ("<|im_end|>", "<|eot_id|>"), ("<|doc|>", "<|other|>")]
)
def test_several_candidates_of_a_bare_file_are_refused_with_the_flags(names, tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    model.add_special_tokens([*names, "<unk>", "<pad>"])
    model.save(str(tmp_path / "t.json"))
    with pytest.raises(InputError, match=r"several tokens that may end .* --eos=TOKEN \(and --bos"):
        load_tokenizer("hf", tmp_path / "t.json")
    flags = SpecialFlags(eos=names[1], bos="none", stop=("1",))
    tokenizer = load_tokenizer("hf", tmp_path / "t.json", flags)
    assert _texts(tokenizer, [tokenizer.eos_id]) == [names[1]] and tokenizer.special.bos_id is None
    assert tokenizer.special.stop_ids == (1, tokenizer.eos_id)
    # One of them alone needs no flag.
    other = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    other.add_special_tokens([names[0], "<unk>", "<pad>"])
    other.save(str(tmp_path / "one.json"))
    alone = load_tokenizer("hf", tmp_path / "one.json")
    assert _texts(alone, [alone.eos_id]) == [names[0]]


def test_ids_beside_a_bare_file_name_eos(tmp_path):
    folder = write_kind("llama3_instruct", tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    tokenizer = load_tokenizer("hf", folder / "tokenizer.json")
    ids = json.loads((folder / "config.json").read_text())
    assert tokenizer.eos_id == ids["eos_token_id"]
    assert tokenizer.bos_id == ids["bos_token_id"]
    assert len(tokenizer.special.stop_ids) == 3
    assert "the first of eos_token_id" in tokenizer.notes[0]


def test_an_html_tag_and_unused_names_end_nothing(tmp_path):
    """`</s>` of Gemma's vocabulary is an ordinary token, and texts may hold it."""
    gemma = load_kind("gemma", tmp_path / "gemma")
    ids = gemma.encode("<h1>a</h1> </s>")
    assert gemma.processor.token_to_id("</s>") in ids
    assert gemma.eos_id not in ids and gemma.hidden_id(ids) is None
    assert gemma.decode(ids) == "<h1>a</h1> </s>"
    # Unused <s> and </s> beside the real end of text, which tokenizer_config.json names.
    folder = write_kind("gpt2", tmp_path / "gpt2")
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(folder / "tokenizer.json"))
    gpt2 = load_tokenizer("hf", folder / "tokenizer.json")
    assert _texts(gpt2, [gpt2.bos_id, gpt2.eos_id]) == ["<|endoftext|>"] * 2


def test_a_special_token_that_is_marked_ordinary_stays_out_of_texts(tmp_path):
    """Its text was this token, so that documents seemed to end inside."""
    folder = write_kind("deepseek", tmp_path)
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**named, "eos_token": "<｜User｜>"}), "utf-8")
    tokenizer = load_tokenizer("hf", folder / "tokenizer.json")
    text = "a <｜User｜> b"
    assert tokenizer.hidden_id(tokenizer.encode(text)) is None
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_what_unigram_cannot_spell_is_found(tmp_path):
    tokenizer = load_kind("unigram", tmp_path)
    ids = tokenizer.encode("a text with </s> in it")
    assert tokenizer.hidden_id(ids) == tokenizer.eos_id
    # A character that it does not know is not a special token.
    assert tokenizer.hidden_id(tokenizer.encode("\U0001f600")) is None


def test_files_beside_a_sentencepiece_model(tmp_path):
    path = write_dummy_prefix_model(tmp_path / "tokenizer.model")
    assert load_tokenizer("sentencepiece", path, as_shipped=True).special == SpecialTokens(1, 2)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "<s>"}, "add_bos_token": false}'
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    tokenizer = load_tokenizer("sentencepiece", path, as_shipped=True)
    assert tokenizer.special == SpecialTokens(None, 1, None, (1, 2), ())
    assert load_tokenizer("sentencepiece", path, SpecialFlags("1", "</s>")).special == (
        SpecialTokens(1, 2, None, (1, 2))
    )


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({}, SpecialFlags(eos="<nope>"), "--eos=<nope> is no token of tokenizer file"),
        ({}, SpecialFlags(eos="90000"), "--eos=90000 is not below the 701 ids"),
        ({}, SpecialFlags(bos="<nope>"), "--bos=<nope> is no token"),
        ({}, SpecialFlags(stop=("<nope>",)), "--stop=<nope> is no token"),
        ({"tokenizer_config.json": {"eos_token": "<nope>"}}, None, "eos_token='<nope>', which is"),
        ({"tokenizer_config.json": {"eos_token": 5}}, None, "eos_token=5, expected the text of a"),
        ({"tokenizer_config.json": []}, None, "holds no JSON object"),
        ({"generation_config.json": {"eos_token_id": [True]}}, None, "expected token ids"),
        ({"config.json": {"eos_token_id": "</s>"}}, None, "eos_token_id='</s>', expected token id"),
        ({"tokenizer_config.json": {"chat_template": 3}}, None, "a chat_template that is no text"),
    ],
)
def test_refusals(files, flags, message, tmp_path):
    folder = write_kind("gpt2", tmp_path)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        load_tokenizer("hf", folder / "tokenizer.json", flags or SpecialFlags())
    assert message in str(caught.value)


def test_chat_templates_in_all_their_places(tmp_path):
    folder = write_kind("gpt2", tmp_path)

    def found():
        return load_tokenizer("hf", folder / "tokenizer.json").chat_template

    assert found() is None
    (folder / "chat_template.json").write_text('{"chat_template": "old"}')
    assert found() == "old"
    (folder / "chat_template.jinja").write_text("new é", "utf-8")
    assert found() == "new é"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("with tools")
    assert found() == {"default": "new é", "tools": "with tools"}


def test_an_old_record_is_read_and_kept(tmp_path):
    """Folders of before name bos and eos alone."""
    tokenizer = load_kind("chatml", tmp_path / "shipped")
    tokenizer.save(tmp_path / "old")
    path = tmp_path / "old" / "tokenizer_meta.json"
    meta = json.loads(path.read_text())
    kept = {name: meta[name] for name in ("kind", "file", "fingerprint", "vocab_size")}
    path.write_text(json.dumps({**kept, "bos_id": 700, "eos_id": 700}))
    loaded = load_tokenizer_folder(tmp_path / "old")
    assert loaded.special == SpecialTokens(700, 700)
    assert (loaded.chat_template, dict(loaded.generation_config)) == (None, {})
    path.write_text(json.dumps({**kept, "bos_id": 700, "eos_id": "x"}))
    with pytest.raises(InputError, match="eos_id='x', expected token ids"):
        load_tokenizer_folder(tmp_path / "old")


def test_a_store_records_them_and_compares(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "store"
    text.write_text("One document.\n\nAnother one.\n\nA third.")
    path = _bare("chatml", tmp_path)
    flags = ["--tokenizer=hf", f"--tokenizer-path={path}", f"--input={text}", f"--out={out}"]
    flags += ["--validation-fraction=0"]
    prepare.main([*flags, "--eos=<|endoftext|>", "--stop=<|im_end|>"])
    own = load_tokenizer_folder(out / "tokenizer")
    assert _texts(own, own.special.stop_ids) == ["<|endoftext|>", "<|im_end|>"]
    store = TokenStore.open(out / "train", ends=(own.bos_id, own.eos_id))
    assert store.ends == (own.eos_id, own.eos_id)
    with pytest.raises(InputError, match=r"from token 700 to 700 .* given tokenizer 702 and 702"):
        TokenStore.open(out / "train", ends=(702, 702))
    # A store of before does not say: its tokens do.
    meta = json.loads((out / "train" / "meta.json").read_text())
    assert (meta.pop("bos_id"), meta.pop("eos_id")) == store.ends
    (out / "train" / "meta.json").write_text(json.dumps(meta))
    assert TokenStore.open(out / "train").ends == store.ends


def test_a_file_of_tiktoken_is_refused_with_the_command_that_converts_it(tmp_path):
    """That command gives the ids of tiktoken itself."""
    load = pytest.importorskip("tiktoken.load", reason="for the files of Llama 3")
    import tiktoken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = {bytes([value]): value for value in range(256)}
    for pair in (b"th", b"the", b" t", b" the", b"in", b"ing", b"\xc3\xa9"):
        ranks[pair] = len(ranks)
    path = tmp_path / "tokenizer.model"
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match="is of tiktoken, as that of Llama 3") as caught:
        load_tokenizer("sentencepiece", path)
    [command] = re.findall(r'python -c "(.*?)" with', str(caught.value))
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True, capture_output=True)
    flags = SpecialFlags(bos="<|begin_of_text|>", eos="<|end_of_text|>")
    ours = load_tokenizer("hf", tmp_path / "tokenizer.json", flags)
    special = {"<|begin_of_text|>": 263, "<|end_of_text|>": 264}
    assert (ours.bos_id, ours.eos_id) == tuple(special.values())
    pattern = TikTokenConverter().pattern
    theirs = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    assert load.load_tiktoken_bpe(str(path)) == ranks
    for text in ["the thing in there", "é日本 😀\n\n  x 12345", "<|end_of_text|> the", ""]:
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())


@pytest.mark.parametrize("kind", ["llama3_instruct", "chatml", "dummy_prefix"])
def test_a_prompt_is_read_as_text_or_with_its_special_tokens(kind, tmp_path):
    if kind == "dummy_prefix":
        path = write_dummy_prefix_model(tmp_path / "tokenizer.model")
        tokenizer = load_tokenizer("sentencepiece", path, as_shipped=True)
        prompt, first = "<s>a word</s> and", tokenizer.encode("a word")
        expected = [1, *tokenizer.encode_behind("a word"), 2, *tokenizer.encode_behind(" and")]
        assert first != expected[1:-2]
    else:
        tokenizer = load_kind(kind, tmp_path, as_shipped=True)
        template = jinja2.Template(tokenizer.chat_template)
        values = {"messages": [{"role": "user", "content": "Hi"}], "bos_token": "<|begin_of_text|>"}
        prompt = template.render(values, add_generation_prompt=True)
        shipped = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        expected = shipped.encode(prompt, add_special_tokens=False).ids
    encode = functools.partial(Generator.encode, SimpleNamespace(tokenizer=tokenizer))
    # A template that writes bos gets no second one.
    assert encode(prompt, special=True) == expected
    as_text = encode(prompt)
    prefix = len(tokenizer.special.prompt_ids)
    assert tokenizer.hidden_id(as_text[prefix:]) is None
    assert tokenizer.decode(as_text) == prompt
    [note] = special_notes(tokenizer, [prompt, "no such text"])
    assert note.startswith("prompt 1 holds '<") and "--special-tokens=special" in note
