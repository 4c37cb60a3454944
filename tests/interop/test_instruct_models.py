"""Chat models as transformers saves them: in, and out again, with all that they came with."""

import json

import numpy as np
import pytest
import torch
import transformers

from stem_jax import export, import_torch
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.interop.tokenizer_export import probe_texts
from tests.facts_model import import_into
from tests.saved_models import logits
from tests.tokenizer_kinds import write_kind

MESSAGES = [{"role": "user", "content": "Where is Lima?"}]


def _saved_llama(kind, folder):
    """A folder as `save_pretrained` of model and tokenizer leaves it."""
    shipped = write_kind(kind, folder / "shipped")
    values = json.loads((shipped / "config.json").read_text())
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        **values,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig.from_pretrained(shipped)
    model.save_pretrained(folder / "saved")
    transformers.AutoTokenizer.from_pretrained(shipped).save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("kind", ["llama3_instruct", "chatml"])
def test_in_and_out_again(kind, tmp_path):
    saved = _saved_llama(kind, tmp_path)
    assert (saved / "chat_template.jinja").is_file()
    import_torch.main(["--from=llama", f"--path={saved}", f"--workdir={tmp_path / 'run'}"])
    export.main([f"--workdir={tmp_path / 'run'}", "--format=hf", f"--out={tmp_path / 'out'}"])
    before, after = (
        transformers.AutoTokenizer.from_pretrained(folder) for folder in (saved, tmp_path / "out")
    )
    prompts = [
        tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
        for tokenizer in (before, after)
    ]
    assert prompts[0] == prompts[1]
    for text in ("a text", "one" + before.eos_token):
        assert before(text)["input_ids"] == after(text)["input_ids"]
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (saved, tmp_path / "out")
    ]
    first, second = (model.generation_config for model in models)
    assert sorted(second.eos_token_id) == sorted(first.eos_token_id)
    assert (second.do_sample, second.temperature) == (first.do_sample, first.temperature)
    inputs = torch.tensor(prompts[:1])
    with torch.no_grad():
        expected, found = (model(inputs).logits for model in models)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # Whichever stop comes first ends the completion, in both.
    likely = expected[0, -1].argmax().item()
    stop = first.eos_token_id[-1]
    with torch.no_grad():
        for model in models:
            weight = model.get_input_embeddings().weight
            weight[stop] = 2 * weight[likely]
    outputs = [model.generate(inputs, do_sample=False, max_new_tokens=4) for model in models]
    assert torch.equal(*outputs)
    assert outputs[0].tolist() == [[*prompts[0], stop]]


def test_a_tuned_export_comes_back(tmp_path):
    """As Trainer leaves it: model and tokenizer saved by transformers, ours left behind."""
    import_into(tmp_path / "run")
    export.main([f"--workdir={tmp_path / 'run'}", "--format=hf", f"--out={tmp_path / 'out'}"])
    options = {"trust_remote_code": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", **options)
    with torch.no_grad():
        model.model.layers[1].mlp.up_table.weight += 0.1
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tuned")
    flags = ["--from=hf", f"--path={tmp_path / 'tuned'}", f"--workdir={tmp_path / 'again'}"]
    import_torch.main(flags)
    run, before = load_run(tmp_path / "again"), load_run(tmp_path / "run").tokenizer
    for text in probe_texts():
        assert run.tokenizer.encode(text) == before.encode(text)
    found, expected = run.tokenizer.special, before.special
    assert (found.bos_id, found.stop_ids) == (expected.bos_id, expected.stop_ids)
    assert found.prompt_ids == expected.prompt_ids
    tokens = np.random.default_rng(0).integers(3, 700, (1, 20))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(run, tokens), theirs, atol=1e-4, rtol=0)
    assert load_tokenizer("hf", tmp_path / "tuned" / "tokenizer.json").eos_id == before.eos_id
