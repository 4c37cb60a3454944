"""The modeling code of an export: what it reads, keeps and sends, and what it refuses."""

import numpy as np
import pytest
import torch
import transformers

from stem_jax import export
from tests.saved_models import SIZES, save_run, trained_state


@pytest.fixture(scope="module")
def run_folder(train_step, make_batch, tmp_path_factory):
    """The work folder of a trained model."""
    step = train_step(**SIZES)
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, step, trained_state(step, make_batch))
    return folder


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    """Its export for transformers."""
    out = tmp_path_factory.mktemp("exports") / "out"
    export.main([f"--workdir={run_folder}", f"--out={out}", "--format=hf"])
    return out


def _load(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    )
    return model.eval()


def _tokens(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 258, shape))


def test_hidden_states_are_kept_if_asked_for(exported):
    model, tokens = _load(exported), _tokens(1, 5)
    with torch.no_grad():
        assert model(tokens).hidden_states is None
        states = model(tokens, output_hidden_states=True).hidden_states
        assert len(states) == model.config.num_hidden_layers + 1
        assert torch.equal(states[0], model.model.embed_tokens(tokens))
        assert torch.equal(model.lm_head(states[-1]), model(tokens).logits)
        model.config.output_hidden_states = True
        assert len(model(tokens).hidden_states) == len(states)
        assert model(tokens, output_hidden_states=False).hidden_states is None


def test_rows_go_where_the_model_is(exported):
    """The device "meta" stands for an accelerator."""
    mlp = _load(exported, table_device="cpu").model.layers[0].mlp.to("meta", torch.bfloat16)
    assert mlp.down_proj.weight.device.type == "meta"
    assert mlp.up_table.weight.device.type == "cpu"
    ids = _tokens(2, 5)
    assert torch.equal(mlp.up_table(ids), mlp.up_table.weight[ids])
    y = mlp(torch.empty(2, 5, 32, dtype=torch.bfloat16, device="meta"), ids)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (2, 5, 32))


@pytest.mark.parametrize("name", ["auto", "balanced", {"": "cpu"}])
def test_device_map_of_a_model_saved_with_table_device(name, exported, tmp_path):
    model = _load(exported, table_device="cpu")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be had with table_device='cpu'"):
        type(model).from_pretrained(tmp_path, device_map=name)
    again = type(model).from_pretrained(tmp_path, device_map="cpu")
    assert {value.device.type for value in again.parameters()} == {"cpu"}
    free = type(model).from_pretrained(tmp_path, device_map={"": "cpu"}, table_device=None)
    assert free.model.layers[0].mlp.up_table.home is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m(_tokens(1, 3), inputs_embeds=torch.zeros(1, 2, 32)),
            r"inputs_embeds are \(1, 2, 32\), input_ids \(1, 3\); give the ids of the same",
        ),
        (
            lambda m: m.generate(input_ids=_tokens(1, 3), inputs_embeds=torch.zeros(1, 3, 32)),
            "inputs_embeds are for forward only",
        ),
        (
            lambda m: m.generate(inputs_embeds=torch.zeros(1, 3, 32)),
            "inputs_embeds are for forward only",
        ),
    ],
)
def test_calls_that_are_refused(call, message, exported):
    with pytest.raises(ValueError, match=message):
        call(_load(exported))


def test_embeds_of_the_same_tokens(exported):
    model, tokens = _load(exported), _tokens(2, 6)
    with torch.no_grad():
        embeds = model.model.embed_tokens(tokens)
        assert torch.equal(model(tokens, inputs_embeds=embeds).logits, model(tokens).logits)
