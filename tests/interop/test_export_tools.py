"""What people use exports with gives what plain generation gives: caches, compilers, adapters."""

import json
import os
import subprocess
import sys

import onnxruntime
import peft
import pytest
import torch
import transformers
from torchao.quantization import Int8WeightOnlyConfig

from stem_jax import export
from stem_jax.interop.stem_attention import CACHE
from tests.facts_model import export_into
from tests.saved_models import run_folders

RATE = {"optimizer.learning_rate": 0.003}
VALUE = {"value.layers": (0, 2), "model.num_kv_heads": 2} | RATE
PER_LAYER = {"per_layer.layers": (1, 2), "per_layer.width": 20} | RATE
NONE = {"model.stem_layers": "none"}
MEMORIES = {
    "memories": VALUE | PER_LAYER,
    "value": NONE | VALUE,
    "per_layer": NONE | PER_LAYER | {"model.tie_embeddings": True},
}
PROMPTS = ["The capital of Spain is", "The capital of Peru is", "The currency of Japan is"]
TABLES = ["value_table", "per_layer.table"]
NEW = 8
# Of names that these packages have of each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


# Of what takes long once more, without memories and with all of them.
compiled = pytest.mark.parametrize(
    "folder",
    [
        "facts",
        "memories",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("value", "per_layer")),
    ],
    indirect=True,
)


@pytest.fixture(
    scope="module", params=["facts", *(pytest.param(m, marks=pytest.mark.long) for m in MEMORIES)]
)
def folder(request, tmp_path_factory):
    """An export of the committed model, of one that reads three memories, or one without STEM."""
    out = tmp_path_factory.mktemp(request.param)
    if request.param == "facts":
        return export_into(out)
    made = request.getfixturevalue("train_step"), request.getfixturevalue("make_batch")
    run = run_folders(MEMORIES, *made, tmp_path_factory)(request.param)
    export.main([f"--workdir={run}", f"--out={out / 'out'}", "--format=hf"])
    return out / "out"


@pytest.fixture(scope="module")
def load(folder):
    """load(**options): a model of it."""

    def make(kind=transformers.AutoModelForCausalLM, **options):
        return kind.from_pretrained(folder, trust_remote_code=True, **options).eval()

    return make


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Ids of each prompt, or of its beginning where a token is a byte."""
    return [tokenizer(prompt)["input_ids"][:11] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def alone(load, prompts):
    """What is generated after each prompt by itself."""
    return _generated(load(), prompts)


def _generated(model, prompts, **options):
    outputs = [
        model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=NEW, **options)
        for ids in prompts
    ]
    return [out[0, len(ids) :].tolist() for out, ids in zip(outputs, prompts, strict=True)]


def test_the_base_model(load, prompts):
    model, base = load(), load(transformers.AutoModel)
    ids = torch.tensor(prompts[:1])
    hidden = base(ids).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(ids).logits)
    assert torch.equal(base(ids, return_dict=False)[0], hidden)
    with pytest.raises(ValueError, match="input_ids are missing"):
        base(inputs_embeds=torch.zeros(1, 2, base.config.hidden_size))


@pytest.mark.parametrize("folder", ["facts"], indirect=True)
def test_greedy_answers(alone, tokenizer):
    for ids, answer in zip(alone, ["Madrid", "Lima", "the yen"], strict=True):
        assert tokenizer.decode(ids).startswith(f" {answer}.")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches(cache, load, prompts, alone):
    assert _generated(load(), prompts, cache_implementation=cache) == alone


def test_assisted(load, prompts, alone):
    assert _generated(load(), prompts, assistant_model=load()) == alone


def test_beams(load, prompts):
    how = {"do_sample": False, "max_new_tokens": NEW, "num_beams": 3}
    ids = torch.tensor([prompts[0][:4], prompts[2][:4]])
    found = [load().generate(ids, use_cache=use, **how) for use in (True, False)]
    assert found[0].shape[1] > 4 and torch.equal(*found)


def test_pipeline(folder, tokenizer, prompts, alone):
    maker = transformers.pipeline("text-generation", folder, trust_remote_code=True)
    prompt = tokenizer.decode(prompts[0][1:])
    [found] = maker(prompt, do_sample=False, max_new_tokens=NEW, return_tensors=True)
    assert found["generated_token_ids"] == [*prompts[0], *alone[0]]


@pytest.mark.long
def test_continuous_batching(load, prompts, alone, tokenizer):
    settings = transformers.GenerationConfig(
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Else it takes most of the machine's memory.
    size = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    outputs = load().generate_batch(
        prompts, generation_config=settings, continuous_batching_config=size
    )
    found = {tuple(one.prompt_ids): list(one.generated_tokens) for one in outputs.values()}
    assert [found[tuple(ids)] for ids in prompts] == alone


def test_what_is_recorded(load, prompts):
    model, ids = load(attn_implementation="eager"), torch.tensor(prompts[:1])
    output = model(ids, output_attentions=True, output_hidden_states=True)
    layers = model.config.num_hidden_layers
    assert len(output.attentions) == layers and len(output.hidden_states) == layers + 1
    assert torch.allclose(output.attentions[0].sum(-1), torch.ones(()))
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, output.logits, atol=1e-5, rtol=0)


@pytest.mark.long
@compiled
def test_flex_attention(load, prompts):
    ids = torch.tensor(prompts[:1])
    with torch.no_grad():
        found = load(attn_implementation="flex_attention")(ids).logits
        torch.testing.assert_close(found, load()(ids).logits, atol=1e-5, rtol=0)


def test_gradient_checkpointing(load, prompts):
    model, ids = load().train(), torch.tensor(prompts[:1])
    gradients, calls = [], []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids, use_cache=True).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.gradient_checkpointing_enable()
    # Once without; with it again on the way back.
    assert len(calls) == 3
    for before, after in zip(*gradients, strict=True):
        torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_stay_float32(dtype, load):
    whole = load().model.rotary_emb.inv_freq
    for model in (load(dtype=dtype), load().to(dtype)):
        assert model.lm_head.weight.dtype == dtype
        assert torch.equal(model.model.rotary_emb.inv_freq, whole)
        angles = model.model.rotary_emb(torch.zeros(1, 2, 64, dtype=dtype), torch.arange(2)[None])
        assert angles[0].dtype == torch.float32


def test_a_saved_model_is_whole(load, prompts, folder, tmp_path):
    ids = torch.tensor(prompts[:1])
    for kind, name in (
        (transformers.AutoModelForCausalLM, "logits"),
        (transformers.AutoModel, "last_hidden_state"),
    ):
        model = load(kind)
        model.save_pretrained(tmp_path / name)
        codes = [path.name for path in folder.glob("*.py")]
        assert len(codes) >= 4
        for code in codes:
            assert (tmp_path / name / code).read_text() == (folder / code).read_text()
        again = kind.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert torch.equal(again(ids)[name], model(ids)[name])
        assert again.config.auto_map.keys() >= {"AutoConfig", "AutoModelForCausalLM"}


def test_the_configuration_needs_no_torch(folder):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from transformers import AutoConfig, AutoTokenizer\n"
        "config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(config.stem_layers, config.memories, len(tokenizer('a').input_ids))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    config = json.loads((folder / "config.json").read_text())
    layers, memories = config["stem_layers"], config.get("memories", {})
    assert layers or memories
    expected = f"{layers} {memories} 2"
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


# --- Compilers ---


class _Logits(torch.nn.Module):
    """A model without its cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.fixture(scope="module")
def exported_program(load, prompts):
    """The graph of torch.export, of any length."""
    model, ids = load(), torch.tensor(prompts[:1])
    most = model.config.max_position_embeddings
    length = {1: torch.export.Dim("length", min=2, max=most)}
    with torch.no_grad():
        return torch.export.export(_Logits(model), (ids,), dynamic_shapes=(length,))


def _both_rows(prompts):
    """More tokens than the graphs were made with."""
    return torch.tensor([prompts[0] + prompts[1]])


@pytest.mark.long
def test_torch_export(exported_program, load, prompts):
    ids = _both_rows(prompts)
    with torch.no_grad():
        found = exported_program.module()(ids)
        torch.testing.assert_close(found, load()(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.long
@compiled
def test_onnx(exported_program, load, prompts, tmp_path):
    path, ids = tmp_path / "model.onnx", _both_rows(prompts)
    torch.onnx.export(exported_program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    [found] = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    with torch.no_grad():
        expected = load()(ids).logits
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)


@pytest.mark.long
@compiled
def test_torch_compile(load, prompts):
    model, ids = load(), torch.tensor(prompts[:1])
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=0)


# --- Adapters and small numbers ---


@pytest.mark.long
@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "gate_proj", "down_proj"], ["up_table"], TABLES]
)
def test_lora(targets, load, prompts, tmp_path):
    names = [name for name, _ in load().named_modules()]
    if isinstance(targets, list) and not any(n.endswith(t) for n in names for t in targets):
        pytest.skip("this model has no such tables")
    torch.manual_seed(0)
    ids = torch.tensor(prompts[:1])
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    model = peft.get_peft_model(load(), settings)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    if targets == "all-linear":
        linear = {n for n, m in load().named_modules() if isinstance(m, torch.nn.Linear)}
        targets = linear - {"lm_head"}
        assert len(trained) == 2 * len(targets)
    assert trained and all(any(target in name for target in targets) for name in trained)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 0.01)
    losses = []
    for _ in range(24):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    expected = model.eval()(ids).logits
    again = peft.PeftModel.from_pretrained(load(), tmp_path)
    torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=0)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=0)
    assert merged.state_dict().keys() == load().state_dict().keys()


def _int8(load):
    return load(quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()))


@pytest.mark.long
@pytest.mark.parametrize("folder", ["facts"], indirect=True)
def test_int8_answers(load, prompts, alone):
    # The first words.
    found = _generated(_int8(load), prompts)
    assert [one[:3] for one in found] == [one[:3] for one in alone]


@pytest.mark.long
def test_int8_weights(load, prompts):
    model = _int8(load)
    kind = type(model.model.layers[0].mlp.gate_proj.weight).__name__
    assert "Int8" in kind or "Quantized" in kind, kind
    # Greedy answers may part where two tokens are nearly as likely.
    whole = load()
    for ids in prompts:
        exact, found = (one(torch.tensor([ids])).logits for one in (whole, model))
        assert 0 < torch.linalg.norm(found - exact) / torch.linalg.norm(exact) < 0.05
    tables = [(n, p.dtype) for n, p in model.named_parameters() if "table" in n]
    assert tables and {dtype for _, dtype in tables} == {torch.float32}
    assert CACHE in model(torch.tensor(prompts[:1]), use_cache=True)
