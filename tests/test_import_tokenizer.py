"""The tokenizer of an import: that of the model's folder, as it is now, with all of its stops."""

import json
import shutil

import pytest
from tokenizer_kinds import load_kind, write_kind

from stem_jax.data.special_tokens import SpecialFlags
from stem_jax.data.tokenizer import load_tokenizer, load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.interop.import_tokenizer import TokenizerChoice, find_tokenizer
from stem_jax.interop.tokenizer_export import NATIVE_FOLDER, write_tokenizer

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


def _saved(tokenizer, folder):
    tokenizer.save(folder)
    return folder
