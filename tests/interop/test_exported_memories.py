"""Exports of models with value and per-layer embeddings say what we say, and are read again."""

import itertools
import json

import numpy as np
import pytest
import torch
import transformers

from stem_jax import export, import_torch
from stem_jax.checkpoints.loading import load_run
from stem_jax.checkpoints.saved_model import open_saved_model
from stem_jax.editing.patch import make_patch
from stem_jax.editing.swaps import recipes_of
from stem_jax.errors import InputError
from stem_jax.interop.hf_export import CODE_FILES
from stem_jax.interop.stem_attention import CACHE
from stem_jax.memory.catalogue import table_specs
from tests.saved_models import BYTES, greedy, logits, run_folders

# At a third of the rate of the other exports': there both sides are up to 1.3e-5 off float64.
RATE = {"optimizer.learning_rate": 0.003}
NONE = {"model.stem_layers": "none"}
VALUE = RATE | {"value.layers": (0, 2), "model.num_kv_heads": 2}
PER_LAYER = RATE | {"per_layer.layers": (1, 2), "per_layer.width": 20}
MODELS = {
    "value": NONE | VALUE,
    "per_layer": NONE | PER_LAYER | {"model.tie_embeddings": True},
    "stem value": VALUE | {"model.stem_site": "up_add"},
    "stem both": VALUE | PER_LAYER | {"model.head_dim": 10, "model.norm_eps": 1e-3},
}
FILES = {
    "value": {"modeling_stem_value.py"},
    "per_layer": {"modeling_stem_per_layer.py"},
    "both": {
        "modeling_stem_value.py",
        "modeling_stem_per_layer.py",
        "modeling_stem_value_per_layer.py",
    },
}
TABLES = {"value": "self_attn.value_table", "per_layer": "per_layer.table"}


@pytest.fixture(scope="module")
def run_folder(train_step, make_batch, tmp_path_factory):
    """run_folder(name): the work folder of a trained model."""
    return run_folders(MODELS, train_step, make_batch, tmp_path_factory)


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    """exported(name): its export for transformers."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("exports") / "out"
            export.main([f"--workdir={run_folder(name)}", f"--out={made[name]}", "--format=hf"])
        return made[name]

    return make


def _load(folder, kind=transformers.AutoModelForCausalLM, **options):
    return kind.from_pretrained(folder, trust_remote_code=True, **options).eval()


def _tokens(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 258, shape))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits(name, attention, exported, run_folder):
    tokens = _tokens(3, 40)
    ours = logits(load_run(run_folder(name)), tokens.numpy())
    with torch.no_grad():
        theirs = _load(exported(name), attn_implementation=attention)(tokens).logits.numpy()
    assert np.abs(ours).max() > 1
    print(f"\n{name}, {attention}: {np.abs(theirs - ours).max():.2e} of {np.abs(ours).max():.1f}")
    np.testing.assert_allclose(theirs, ours, atol=1e-5, rtol=0)


def test_each_memory_takes_part(name, exported):
    """Without its rows the logits are others."""
    model, tokens = _load(exported(name)), _tokens(1, 12)
    assert model.config.memories
    with torch.no_grad():
        before = model(tokens).logits
        for memory, values in model.config.memories.items():
            for layer in values["layers"]:
                table = model.get_parameter(f"model.layers.{layer}.{TABLES[memory]}.weight")
                kept = table.clone()
                table.zero_()
                assert (model(tokens).logits - before).abs().max() > 1e-3, (memory, layer)
                table.copy_(kept)
        assert torch.equal(model(tokens).logits, before)


def test_the_files_of_its_memories_alone(name, exported):
    expected = {*CODE_FILES} | FILES[name.removeprefix("stem ")]
    assert {path.name for path in exported(name).glob("*.py")} == expected


def test_greedy_generation(name, exported, run_folder):
    prompts = [[BYTES.bos_id, *BYTES.encode(text)] for text in ("abc", "a longer prompt: 123")]
    ours = greedy(load_run(run_folder(name)), prompts, 48)
    longest = max(map(len, prompts))
    pads = [longest - len(one) for one in prompts]
    tokens = torch.tensor([[7] * pad + one for pad, one in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    theirs = _load(exported(name)).generate(
        tokens, attention_mask=mask, max_new_tokens=48, do_sample=False
    )
    assert ours[0] != ours[1]
    assert theirs[:, longest:].tolist() == ours


def _flex(name: str):
    """It is compiled, for half a minute; the last model has both memories."""
    marks = [pytest.mark.long, *([] if name == "stem both" else [pytest.mark.nightly])]
    return pytest.param(name, "flex_attention", marks=marks)


@pytest.mark.parametrize(
    ("name", "attention"),
    [*itertools.product(MODELS, ["sdpa", "eager"]), *map(_flex, MODELS)],
)
def test_cached_steps_and_packed_rows(name, attention, exported):
    model = _load(exported(name), attn_implementation=attention)
    tokens = _tokens(1, 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        whole = model(tokens).logits
        cache = model(tokens[:, :5], use_cache=True)[CACHE]
        rest = model(tokens[:, 5:], **{CACHE: cache}).logits
        packed = model(tokens, position_ids=positions).logits
        alone = torch.cat([model(part).logits for part in torch.split(tokens, [5, 7], 1)], 1)
    torch.testing.assert_close(rest, whole[:, 5:], atol=1e-5, rtol=0)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    assert (packed - whole).abs().max() > 1e-2


def test_saved_again(name, exported, tmp_path):
    model, tokens = _load(exported(name), table_device="cpu"), _tokens(1, 6)
    base = _load(exported(name), transformers.AutoModel)
    model.save_pretrained(tmp_path / "model")
    base.save_pretrained(tmp_path / "base")
    again = _load(tmp_path / "model")
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(again(tokens).logits, expected)
        states = _load(tmp_path / "base", transformers.AutoModel)(tokens).last_hidden_state
        assert torch.equal(again.lm_head(states), expected)


def test_tables_stay_on_their_device(name, exported):
    """The device "meta" stands for an accelerator."""
    model = _load(exported(name), table_device="cpu").to("meta")
    tables = {n for n, value in model.named_parameters() if value.device.type == "cpu"}
    expected = {f"model.layers.{n}.mlp.up_table.weight" for n in model.config.stem_layers}
    for memory, values in model.config.memories.items():
        expected |= {f"model.layers.{n}.{TABLES[memory]}.weight" for n in values["layers"]}
    assert tables == expected
    ids, x = _tokens(1, 4), torch.empty(1, 4, 32, device="meta")
    for layer in model.model.layers:
        assert layer.self_attn.values(x, ids).device.type == "meta"
        if hasattr(layer, "per_layer"):
            assert layer.per_layer(x, ids, x).shape == x.shape


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradients_are_those_without_checkpointing(name, exported):
    model, tokens, found = _load(exported(name)).train(), _tokens(1, 10), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        found.append({n: value.grad for n, value in model.named_parameters()})
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(found[1][parameter], gradient, atol=1e-6, rtol=0)


def test_back_again(name, exported, run_folder, tmp_path):
    """Bit for bit; what config.json says of memories is held against the tensors."""
    import_torch.main(["--from=hf", f"--path={exported(name)}", f"--workdir={tmp_path / 'back'}"])
    run, again = (open_saved_model(f) for f in (run_folder(name), tmp_path / "back"))
    for section in ("value", "per_layer"):
        assert getattr(again.config, section).layers == getattr(run.config, section).layers
    params = load_run(run_folder(name)).params
    assert load_run(tmp_path / "back").params.keys() == params.keys()
    for one, value in params.items():
        np.testing.assert_array_equal(again.param(one), np.asarray(value), one)
    for memory in table_specs(run.config):
        rows = [_rows(saved, memory) for saved in (run, again)]
        assert np.abs(rows[0]).max() > 0
        np.testing.assert_array_equal(*rows, memory)


def test_edits_are_baked_in(exported, run_folder, tmp_path):
    """Rows of two memories, each as its patch says."""
    run, flags = load_run(run_folder("stem value")), []
    for memory in ("stem", "value"):
        recipes = recipes_of(run.tokenizer, ["^a=>^b"], [], "average")
        make_patch(run, recipes, layers=[0], memory=memory).save(tmp_path / memory)
        flags.append(str(tmp_path / memory))
    edits = f"--edits={','.join(flags)}"
    folder = f"--workdir={run_folder('stem value')}"
    export.main([folder, f"--out={tmp_path / 'out'}", "--format=hf", edits])
    before, after = (_load(path) for path in (exported("stem value"), tmp_path / "out"))
    for table in ("mlp.up_table", TABLES["value"]):
        old, new = (m.get_parameter(f"model.layers.0.{table}.weight") for m in (before, after))
        assert torch.equal(new[97], old[98])
        assert not torch.equal(new[97], old[97])
        assert torch.equal(new[98:], old[98:])


def _rows(saved, memory):
    """[V, S * F] by token id."""
    pieces = {}
    for ids, columns, piece in saved.table_pieces(memory):
        for one, row in zip(ids, piece, strict=True):
            pieces.setdefault(int(one), {})[columns.start] = row
    return np.stack(
        [np.concatenate([*dict(sorted(pieces[n].items())).values()], -1) for n in range(258)]
    )


@pytest.mark.parametrize(
    ("memories", "message"),
    [
        ({"sauce": {"layers": [0]}}, "memories has sauce with layers; only value with layers and"),
        ({"value": {"layers": [0], "heat": 3}}, "memories has value with layers, heat; only"),
        ({"value": {"layers": [0, 3]}}, r"expected a list of whole numbers from 0 to 2"),
        ({"value": {"layers": [2, 0]}}, r"layers is \[2, 0\], expected rising numbers of layers"),
        ({"value": {"layers": [0]}}, "layers.2.self_attn.value_gate.weight is unknown"),
        ({}, "layers.0.self_attn.value_gate.weight is unknown"),
    ],
)
def test_configurations_that_are_refused(memories, message, exported, tmp_path):
    for path in exported("value").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    config = json.loads((exported("value") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"memories": memories}))
    with pytest.raises(InputError, match=message):
        import_torch.main(["--from=hf", f"--path={tmp_path}", f"--workdir={tmp_path / 'back'}"])


def test_keys_that_the_model_decides(exported, tmp_path):
    flags = ["--from=hf", f"--path={exported('value')}", f"--workdir={tmp_path / 'back'}"]
    with pytest.raises(InputError, match=r"--config.value.layers=1 is given, the model has \(0, 2"):
        import_torch.main([*flags, "--config.value.layers=1"])
    with pytest.raises(InputError, match=r"ngram.layers.* is a memory that the imported model has"):
        import_torch.main([*flags, "--config.ngram.layers=1"])


def test_values_divided_over_devices_are_refused(exported):
    """As vLLM divides them, after the plan of the configuration."""
    model = _load(exported("value"))
    plan = model.config.base_model_tp_plan
    assert plan["layers.*.self_attn.v_proj"] == "colwise"
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight = torch.nn.Parameter(attention.v_proj.weight[:8])
    with pytest.raises(ValueError, match=r"8 of 16 values are on this device: .*parallel-size=1"):
        model(_tokens(1, 4))


def test_a_class_that_leaves_a_memory_out_is_refused(exported):
    from stem_jax.interop.modeling_stem import StemForCausalLM

    with pytest.raises(ValueError, match=r"config.memories has value, this class reads none; take"):
        StemForCausalLM.from_pretrained(exported("value"))
