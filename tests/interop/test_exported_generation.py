"""What an export generates by default: it ends at the context, with ids that stand for text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from stem_jax import export
from stem_jax.training.state import init_state
from tests.saved_models import BYTES, CONTEXT, SIZES, save_run

MODELS = {
    "stem": {},
    "dense": {"model.stem_layers": "none"},
    # Beyond the 258 ids of the tokenizer.
    "stem_padded": {"model.vocab_size": 288},
    "dense_padded": {"model.stem_layers": "none", "model.vocab_size": 288},
}
FACTS = Path(__file__).parents[1] / "data" / "facts_model"


@pytest.fixture(scope="module")
def exported(train_step, tmp_path_factory):
    """exported(name): the folder of an export of an untrained model."""
    made = {}

    def make(name):
        if name not in made:
            step, folder = train_step(**{**SIZES, **MODELS[name]}), tmp_path_factory.mktemp(name)
            save_run(folder / "run", step, init_state(step.blueprint))
            made[name] = folder / "out"
            export.main([f"--workdir={folder / 'run'}", f"--out={made[name]}", "--format=hf"])
        return made[name]

    return make


def _pipeline(folder):
    return transformers.pipeline("text-generation", model=str(folder), trust_remote_code=True)


@pytest.mark.parametrize("name", ["stem", "dense"])
def test_the_default_pipeline_ends_at_the_context(name, exported):
    pipeline = _pipeline(exported(name))
    pipeline.model.generation_config.eos_token_id = None
    [output] = pipeline("abc", return_tensors=True)
    assert len(output["generated_token_ids"]) == CONTEXT


def test_nothing_beyond_the_context(exported):
    """More tokens than asked for are not there; a prompt without room is refused at once."""
    model = _pipeline(exported("stem")).model
    options = {"max_new_tokens": 1000, "eos_token_id": None, "do_sample": True}
    prompt = torch.tensor([[256, *b"a prompt"]])
    assert model.generate(prompt, **options).shape == (1, CONTEXT)
    masked = torch.tensor([[0] * 3 + [1] * 6])
    assert model.generate(prompt, attention_mask=masked, **options).shape == (1, CONTEXT)
    few = model.generate(prompt, max_new_tokens=4, eos_token_id=None)
    assert few.shape == (1, 13)
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"Input length of input_ids is 128"):
        model.generate(prompt.repeat(1, 15)[:, :CONTEXT], **options)
    assert calls == []


@pytest.mark.parametrize("name", ["stem_padded", "dense_padded"])
def test_ids_without_text_are_not_made(name, exported):
    model = _pipeline(exported(name)).model
    settings = json.loads((exported(name) / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == list(range(258, 288))
    prompt = torch.full((4, 3), 256)
    torch.manual_seed(0)
    options = {"do_sample": True, "max_new_tokens": 60, "eos_token_id": None}
    assert model.generate(prompt, **options).max() < 258
    assert model.generate(prompt, suppress_tokens=None, **options).max() >= 258


@pytest.mark.parametrize("name", ["stem", "dense"])
def test_bos_of_a_prompt_is_no_padding(name, exported):
    """Without a mask, generate takes tokens that are padding for padding; bos may pad batches."""
    pipeline = _pipeline(exported(name))
    tokenizer, model = pipeline.tokenizer, pipeline.model
    assert tokenizer.pad_token_id == tokenizer.bos_token_id == BYTES.bos_id
    inputs = tokenizer("a prompt", return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 20}
    masked = model.generate(**inputs, **options)
    assert torch.equal(model.generate(inputs["input_ids"], **options), masked)


def test_an_export_of_an_earlier_version(tmp_path):
    """It has code of its own; its tokenizer splits special tokens and pads with eos."""
    folder = tmp_path / "export"
    shutil.copytree(FACTS, folder)
    shutil.copy(FACTS.parent / "earlier" / "export" / "modeling_stem.py", folder)
    values = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(values))
    pipeline = _pipeline(folder)
    [output] = pipeline("The capital of Spain is", do_sample=False, max_new_tokens=3)
    assert output["generated_text"].startswith("The capital of Spain is Madrid.")
