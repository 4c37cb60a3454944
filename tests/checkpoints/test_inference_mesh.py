"""A model divided over several devices says and scores what it does on one, in half the memory."""

import json

import jax
import numpy as np
import pytest

from stem_jax import generate
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.evaluation.scoring import Scorer
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.tables.overlaid_rows import OverlaidRows
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import init_state

BYTES = load_tokenizer("bytes")
PROMPTS = ["abc", "one more.", "a longer prompt: 123"]
GREEDY = Sampling(temperature=0.0)
# Heads in twos share the layers; three do not divide over two devices, which divide the batch then.
HEADS = {"tensor": (4, 2), "fsdp": (3, 1)}


@pytest.fixture(scope="module", params=["tensor", pytest.param("fsdp", marks=pytest.mark.long)])
def axis(request):
    return request.param


@pytest.fixture(scope="module")
def run_folder(axis, tiny_config, device_mesh, tmp_path_factory):
    folder = tmp_path_factory.mktemp(axis)
    BYTES.save(folder / "tokenizer")
    heads, kv_heads = HEADS[axis]
    sizes = {"vocab_size": 258, "num_layers": 2, "stem_layers": (0,), "embed_dim": 128}
    sizes |= {"ffn_dim": 512, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 32}
    keys = {f"model.{name}": size for name, size in sizes.items()}
    config = tiny_config(**keys, **{"train.seq_len": 64, "mesh.data": 1})
    mesh = device_mesh((1, 1, 1))
    state = init_state(Blueprint(config, mesh))
    # As they are at the start, they hardly look back.
    for name, value in state.params.items():
        state.params[name] = 3 * value
    info = CheckpointInfo(1, 1, 0, {"stem": 258}, BYTES.fingerprint, {"seed": 0}, config)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None)
    return folder


@pytest.fixture(scope="module")
def runs(run_folder):
    return [load_run(run_folder, devices=devices) for devices in (1, 2)]


def _generator(run, rows=None) -> Generator:
    return Generator(
        run.config, run.params, {"stem": rows} if rows else run.rows, run.tokenizer, run.mesh
    )


def _tokens(generator: Generator, prompts=PROMPTS) -> list[list[int]]:
    return [c.tokens for c in generator.complete(prompts, 12, GREEDY)]


def test_two_devices_say_the_same(axis, runs):
    one, two = runs
    assert two.mesh.shape[axis] == two.mesh.size == 2
    expected = _tokens(_generator(one))
    assert _tokens(_generator(two)) == expected
    # Fewer than the shards of the batch.
    assert _tokens(_generator(two), PROMPTS[:1]) == expected[:1]


def test_two_devices_score_the_same(runs):
    sequences = [BYTES.encode_prompt(prompt) for prompt in PROMPTS]
    one, two = (Scorer(run, batch_size=3).score(sequences) for run in runs)
    for found, expected in zip(two, one, strict=True):
        # Of logits up to 50, summed in another order.
        np.testing.assert_allclose(found.log_likelihoods, expected.log_likelihoods, rtol=3e-5)
        assert found.greedy.tolist() == expected.greedy.tolist()


@pytest.mark.long
def test_each_of_two_devices_needs_half(axis, runs):
    """Of parameters, rows and, where layers are shared, what a program makes on its way.

    Where the batch is divided, XLA for CPUs brings the weights of all layers together at once.
    """

    def needs(run) -> list[int]:
        tokens_BxL, lengths_B = np.zeros((2, 16), np.int32), np.ones(2, np.int32)
        seeds_B, scalars = np.zeros(2, np.uint32), GREEDY.scalars()
        generator, scorer = _generator(run), Scorer(run, batch_size=2)
        prompt = (run.params, run.rows, tokens_BxL, lengths_B, seeds_B, scalars)
        token_B, state = generator.prefill(*prompt, slots=32)
        step = (run.params, run.rows, token_B, scalars)
        scored = (run.params, run.rows, tokens_BxL, tokens_BxL, lengths_B, tokens_BxL)
        programs = [
            generator.prefill.lower(*prompt, slots=32),
            generator.decode.lower(*step, state=state),
            scorer.program.lower(*scored),
        ]
        memory = [program.compile().memory_analysis() for program in programs]
        shared = axis == "tensor"
        return [m.argument_size_in_bytes + shared * m.temp_size_in_bytes for m in memory]

    for one, two in zip(*map(needs, runs), strict=True):
        assert two <= 0.55 * one


@pytest.mark.long
def test_rows_of_a_patch_are_read_on_every_device(runs):
    ids = np.array(BYTES.encode_prompt("b")[-1:])
    extra_1xSxF = np.random.default_rng(0).normal(size=(1, 1, 512)).astype(np.float32)
    said = [
        _tokens(_generator(run, OverlaidRows(run.rows["stem"], 258, 9 * extra_1xSxF, ids)))
        for run in runs
    ]
    assert said[0] == said[1] != _tokens(_generator(runs[0]))


def test_rows_in_host_memory(axis, run_folder, runs):
    if axis == "fsdp":
        with pytest.raises(InputError, match=r"resident_rows=64 .* give --resident-rows=288"):
            load_run(run_folder, resident_rows=64, devices=2)
        return
    offloaded = load_run(run_folder, resident_rows=64, devices=2)
    assert _tokens(_generator(offloaded)) == _tokens(_generator(runs[0]))
    offloaded.close()


def test_no_more_devices_than_there_are(run_folder):
    number = len(jax.local_devices())
    with pytest.raises(InputError, match=rf"--devices={number + 1} .* at most the {number} "):
        load_run(run_folder, devices=number + 1)


def test_the_command_divides_it(runs, run_folder, capsys):
    flags = [f"--workdir={run_folder}", "--prompt=abc", "--greedy", "--max-new-tokens=12", "--json"]
    generate.main([*flags, "--devices=2"])
    assert json.loads(capsys.readouterr().out)[0]["tokens"] == _tokens(_generator(runs[0]))[0]
