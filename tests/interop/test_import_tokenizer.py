"""The tokenizer of an import: that of the model's folder, as it is now, with all of its stops."""

import json
import shutil

import pytest
import tokenizers

from stem_jax.data.special_tokens import SpecialFlags
from stem_jax.data.tokenizer import load_tokenizer, load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.interop.import_tokenizer import TokenizerChoice, find_tokenizer
from stem_jax.interop.tokenizer_export import NATIVE_FOLDER, write_tokenizer
from tests.tokenizer_kinds import load_kind, write_kind

LOOK = TokenizerChoice()


def test_a_chat_model_keeps_its_stops_template_and_settings(tmp_path):
    folder = write_kind("llama3_instruct", tmp_path)
    found = find_tokenizer("llama", folder, LOOK)
    ids = json.loads((folder / "generation_config.json").read_text())
    assert set(found.special.stop_ids) == set(ids["eos_token_id"])
    assert found.generation_config == ids
    assert "<|start_header_id|>" in found.chat_template
    # A tokenizer without bos gains none.
    plain = find_tokenizer("llama", write_kind("chatml", tmp_path / "chatml"), LOOK)
    assert (plain.special.bos_id, plain.special.prompt_ids) == (None, ())


def test_flags_come_before_the_files(tmp_path):
    folder = write_kind("llama3_instruct", tmp_path)
    flags = SpecialFlags("none", "<|end_of_text|>", ("<|python_tag|>",))
    special = find_tokenizer("llama", folder, TokenizerChoice(special=flags)).special
    assert (special.bos_id, special.eos_id, special.stop_ids) == (None, 701, (701, 708))


def test_a_tokenizer_from_elsewhere_gets_the_stops_of_the_model(tmp_path):
    model = write_kind("llama3_instruct", tmp_path / "model")
    bare = shutil.copyfile(model / "tokenizer.json", tmp_path / "t.json")
    (model / "tokenizer.json").unlink()
    found = find_tokenizer("llama", model, TokenizerChoice("hf", str(bare)))
    assert (found.eos_id, found.special.stop_ids) == (701, (701, 706, 707))
    assert found.generation_config["temperature"] == 0.6
    named = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**named, "eos_token_id": [5, 6]}))
    with pytest.raises(InputError, match=r"eos is token 701, .* eos_token_id=5 or 6"):
        find_tokenizer("llama", model, TokenizerChoice("hf", str(bare)))
    choice = TokenizerChoice("hf", str(bare), SpecialFlags(eos="<|eot_id|>"))
    assert find_tokenizer("llama", model, choice).eos_id == 707


def test_an_export_that_was_tuned_further_is_told_from_a_stale_tokenizer(tmp_path):
    ours = load_kind("smollm2", tmp_path / "kind")
    export = tmp_path / "export"
    export.mkdir()
    write_tokenizer(ours, export, 64)
    assert find_tokenizer("hf", export, LOOK).fingerprint == ours.fingerprint
    # What the files name now counts: another token ends texts since.
    settings = json.loads((export / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|endoftext|>"
    (export / "tokenizer_config.json").write_text(json.dumps(settings))
    again = find_tokenizer("hf", export, LOOK)
    assert again.fingerprint == ours.fingerprint and again.eos_id != ours.eos_id
    # Another vocabulary in tokenizer.json: ours was left behind.
    write_kind("chatml", export)
    with pytest.raises(InputError, match=r"gives other ids than .* of an earlier export; remove"):
        find_tokenizer("hf", export, LOOK)
    shutil.rmtree(export / NATIVE_FOLDER)
    newer = load_tokenizer("hf", export / "tokenizer.json", as_shipped=True)
    assert find_tokenizer("hf", export, LOOK) == newer
    assert load_tokenizer_folder(_saved(newer, tmp_path / "saved")) == newer


def test_a_tokenizer_from_elsewhere_must_be_the_one_of_the_folder(tmp_path):
    """Also where bos and eos happen to have the same ids."""
    model = write_kind("llama3_instruct", tmp_path / "model")
    own = model / "tokenizer.json"
    other = write_kind("gpt2", tmp_path / "other") / "tokenizer.json"
    foreign = TokenizerChoice("hf", str(other), SpecialFlags("0", "1"))
    for bos, choice in ((256, TokenizerChoice("bytes", None)), (0, foreign)):
        ids = {"bos_token_id": bos, "eos_token_id": bos + 1}
        (model / "config.json").write_text(json.dumps(ids))
        with pytest.raises(InputError, match=rf"gives other ids than {own}, which is with the mod"):
            find_tokenizer("llama", model, choice)
    for same in (own, shutil.copyfile(own, tmp_path / "same.json")):
        choice = TokenizerChoice("hf", str(same), SpecialFlags("0", "1"))
        assert find_tokenizer("llama", model, choice).notes == ()
    # One that cannot be read may be why another is given.
    own.write_text("{}")
    found = find_tokenizer("llama", model, choice)
    assert [note for note in found.notes if f"{own} could not be read" in note] == [*found.notes]


def test_tokens_that_were_added_are_told(tmp_path):
    model = write_kind("llama3_instruct", tmp_path / "model")
    more = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    size = more.get_vocab_size()
    more.add_special_tokens(["<|more|>"])
    more.save(str(tmp_path / "more.json"))
    choice = TokenizerChoice("hf", str(tmp_path / "more.json"))
    note = find_tokenizer("llama", model, choice).notes[-1]
    assert f"has {size + 1} ids, {model / 'tokenizer.json'} {size}; texts have the same" in note
    # The same text, but the tokens that were added in another order.
    marked = json.loads((model / "tokenizer.json").read_text())
    one, other = marked["added_tokens"][-2:]
    one["content"], other["content"] = other["content"], one["content"]
    (tmp_path / "more.json").write_text(json.dumps(marked))
    with pytest.raises(InputError, match="gives other ids"):
        find_tokenizer("llama", model, choice)


def test_another_eos_in_config_json_is_told(tmp_path):
    model = write_kind("smollm2", tmp_path)
    assert find_tokenizer("llama", model, LOOK).notes == ()
    named = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**named, "eos_token_id": 5}))
    found = find_tokenizer("llama", model, LOOK)
    (note,) = found.notes
    eos = found.eos_id
    assert f"eos is token {eos}, config.json of the model has eos_token_id=5: " in note
    assert {5, eos} <= set(found.special.stop_ids)
    chosen = TokenizerChoice(special=SpecialFlags(eos=str(eos)))
    assert find_tokenizer("llama", model, chosen).notes == ()


def _saved(tokenizer, folder):
    tokenizer.save(folder)
    return folder
