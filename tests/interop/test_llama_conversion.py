"""A pretrained Llama as a STEM model: rows are mean up projections; training them alone helps."""

import dataclasses
import re
import sys

import jax
import numpy as np
import pytest
import torch
import transformers

from stem_jax import cli, export, import_torch
from stem_jax.analysis.up_means import UpMeans
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.corpora import read_corpus
from stem_jax.interop.import_flags import BASE_CONFIG
from stem_jax.interop.import_model import import_config
from stem_jax.interop.imports import read_model
from stem_jax.mesh import make_mesh
from stem_jax.training.step import TrainStep
from tests.saved_models import BYTES, logits

CONTEXT = 64
LAYERS = (1, 2)
SETTINGS = [
    "--tokenizer=bytes",
    "--config.train.global_batch_size=8",
    "--config.tables.pad_multiple=32",
    "--config.data.validation_fraction=0.1",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of documents in a few fixed forms."""
    path = tmp_path_factory.mktemp("text") / "facts.txt"
    path.write_text("\n\n".join(list(read_corpus("facts"))[:370]))
    return path


@pytest.fixture(scope="module")
def llama(text, tmp_path_factory):
    """The folder of a small Llama, trained on the text until it knows its forms."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,
        bos_token_id=BYTES.bos_id,
        eos_token_id=BYTES.eos_id,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.tensor(BYTES.encode(text.read_text()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        starts = torch.randint(len(ids) - CONTEXT, (8,), generator=generator)
        batch = torch.stack([ids[start : start + CONTEXT] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.5
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def _tokens(seed=0):
    return np.random.default_rng(seed).integers(0, 200, (4, CONTEXT))


def _torch_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def _flags(llama, folder, *more):
    return ["--from=llama", f"--path={llama}", f"--workdir={folder}", *SETTINGS, *more]


@pytest.mark.long
def test_a_trained_llama_says_the_same_here(llama, tmp_path):
    import_torch.main(_flags(llama, tmp_path / "run"))
    ours = logits(load_run(tmp_path / "run"), _tokens())
    with torch.no_grad():
        theirs = _torch_model(llama)(torch.from_numpy(_tokens())).logits.numpy()
    assert np.abs(theirs).max() > 5
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.long
def test_rows_are_means_of_up_projections(llama):
    imported = read_model("llama", llama)
    config = import_config(imported, BYTES, BASE_CONFIG, {"train.global_batch_size": "4"})
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1))
    programs = TrainStep(config, make_mesh(config.mesh, jax.devices()[:1]))
    params = {name: jax.numpy.asarray(value) for name, value in imported.params.items()}
    means = UpMeans(programs, params, LAYERS)
    batches = [_batch(_tokens(seed)) for seed in (0, 1)]
    batches[1]["segment_ids"][:, 40:] = 0
    means.read(batches)
    model, outputs = _torch_model(llama), {layer: [] for layer in LAYERS}
    for layer in LAYERS:
        up = model.model.layers[layer].mlp.up_proj
        up.register_forward_hook(lambda *call, layer=layer: outputs[layer].append(call[-1]))
    with torch.no_grad():
        for batch in batches:
            model(torch.from_numpy(batch["tokens"]).long())
        embeddings = model.model.embed_tokens.weight
        alone = {
            layer: block.mlp.up_proj(block.post_attention_layernorm(embeddings)).numpy()
            for layer, block in enumerate(model.model.layers)
        }
    real = np.concatenate([(batch["segment_ids"] > 0).reshape(-1) for batch in batches])
    ids = np.concatenate([batch["tokens"].reshape(-1) for batch in batches])[real]
    np.testing.assert_array_equal(means.counts, np.bincount(ids, minlength=258))
    assert 0 < (means.counts == 0).sum() < 258
    for index, layer in enumerate(LAYERS):
        # The forward passes above come first, the one over the embeddings last.
        ups = torch.cat([output.reshape(-1, 80) for output in outputs[layer][:2]]).numpy()[real]
        expected = alone[layer].copy()
        for token in np.unique(ids):
            expected[token] = ups[ids == token].mean(0)
        rows = np.concatenate(
            [means.rows(index, np.arange(100)), means.rows(index, np.arange(100, 258))]
        )
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(rows, expected, atol=1e-4, rtol=0)


def _batch(tokens_BxL):
    tokens = tokens_BxL.astype(np.int32)
    positions = np.broadcast_to(np.arange(CONTEXT, dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens,
        "targets": tokens,
        "positions": positions,
        "segment_ids": np.ones_like(tokens),
        "loss_mask": np.ones(tokens.shape, np.float32),
    }


@pytest.mark.long
def test_conversion(llama, text, tmp_path, capsys):
    import_torch.main(_flags(llama, tmp_path / "dense"))
    capsys.readouterr()
    more = [f"--calibration-text={text}", "--table-steps=300", "--table-rate=0.01"]
    import_torch.main(_flags(llama, tmp_path / "stem", "--stem_layers=1,2", *more))
    printed = capsys.readouterr().out
    assert re.search(r"^layers 1, 2: rows of 59 of 258 tokens from 67,072 tokens", printed)
    dense, converted, trained = (
        float(re.search(rf"{name} +(\d+\.\d+)  ", printed)[1])
        for name in ("dense", "converted", "after 300 steps of the tables alone")
    )
    assert dense < 1
    assert dense < trained < converted < 2 * dense
    assert (converted - trained) / (converted - dense) > 0.4
    run, before = load_run(tmp_path / "stem"), load_run(tmp_path / "dense")
    assert run.config.model.stem_layers == LAYERS
    assert before.params.keys() - run.params.keys() == {
        f"blocks.{layer}.ffn.up_proj.kernel" for layer in LAYERS
    }
    assert all(np.array_equal(run.params[name], before.params[name]) for name in run.params)
    # What was trained is what was saved, and what an export says.
    ids = BYTES.encode(text.read_text())[:CONTEXT]
    tokens = np.array([[BYTES.bos_id, *ids[:-1]]])
    ours = logits(run, tokens)
    loss = -np.log(jax.nn.softmax(ours[0])[np.arange(CONTEXT), ids][8:]).mean()
    assert loss < (converted + trained) / 2
    export.main([f"--workdir={tmp_path / 'stem'}", "--format=hf", f"--out={tmp_path / 'out'}"])
    with torch.no_grad():
        theirs = _torch_model(tmp_path / "out")(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=0)


@pytest.mark.long
def test_without_training_the_tables(llama, text, tmp_path, capsys):
    more = [f"--calibration-text={text}", "--table-steps=0", "--calibration-tokens=600"]
    import_torch.main(_flags(llama, tmp_path / "stem", "--stem_layers=1", *more))
    printed = capsys.readouterr().out
    # Two batches of 8 sequences.
    assert " tokens from 1,024 tokens of text" in printed
    assert "converted" in printed
    assert "tables alone" not in printed
    run = load_run(tmp_path / "stem")
    block = _torch_model(llama).model.layers[1]
    with torch.no_grad():
        embedding = _torch_model(llama).model.embed_tokens.weight[250:255]
        alone = block.mlp.up_proj(block.post_attention_layernorm(embedding)).numpy()
    rows = np.asarray(run.rows["stem"].rows)[
        0, run.rows["stem"].spec.layout.row_numbers(np.arange(250, 255))
    ]
    np.testing.assert_allclose(rows, alone, atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--stem_layers=1", "--from=hf"], 2, "--stem-layers turns a Llama into a STEM model"),
        (["--table-steps=9"], 2, "need --stem-layers, which are not given"),
        (["--stem_layers=3"], 1, "model.stem_layers=(3,) is out of range"),
        (["--stem_layers=none"], 1, "--stem-layers=none names no layer"),
        (["--stem_layers=1", "--calibration-text=nothing.txt"], 1, "'nothing.txt' matches no file"),
        (["--stem_layers=1", "--calibration-tokens=0"], 1, "--calibration-tokens=0 must be"),
        (["--stem_layers=1", "--table-steps=-1"], 1, "--table-steps=-1 must be 0 or more"),
        (
            ["--stem_layers=1", "--config.optimizer.learning_rate=1e-4"],
            1,
            "learning_rate=1e-4 does not apply to --stem-layers, whose tables are trained as "
            "--table-rate says",
        ),
        (["--stem_layers=1", "--config.train.steps=9"], 1, "are trained as --table-steps says"),
        (["--stem_layers=1", "--table-rate=0"], 1, "--table-rate=0.0 must be between"),
        (
            ["--stem_layers=1", "--config.data.validation_fraction=0"],
            1,
            "data.validation_fraction=0 leaves no text",
        ),
    ],
)
def test_refusals(more, status, message, llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", *_flags(llama, tmp_path / "run", *more)])
    with pytest.raises(SystemExit) as left:
        cli.run(import_torch.main)
    assert left.value.code == status
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
