"""Decoding with a cache: the same logits as in training, the same tokens in any batch."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax import cli, generate
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.generation.generator import Generator, sequence_seeds
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import table_specs
from stem_jax.model.cache import NewCache
from stem_jax.tables.row_source import ResidentRows
from stem_jax.training.blueprint import Blueprint, ModelDef
from stem_jax.training.state import init_state
from tests.stem_inputs import stem_inputs

CONTEXT = 48
BYTES = load_tokenizer("bytes")
GREEDY = Sampling(temperature=0.0)
VARIED = Sampling(10.0, 0, 1.0)
# Lengths with bos: 4, 10 and 21 tokens, in two buckets. Batches are of one or three here, and new
# tokens few enough for one cache size per bucket: every other shape would be compiled first.
PROMPTS = ["abc", "one more.", "a longer prompt: 123"]


def rows_of(config, state, mesh=None):
    """The rows of a fresh state, which lag behind nothing."""
    if not state.tables:
        return {}
    source = ResidentRows(state.tables["stem"].rows, table_specs(config)["stem"], mesh)
    return {"stem": source}


@pytest.fixture(scope="module")
def bytes_config(tiny_config):
    return functools.partial(
        tiny_config,
        **{
            "model.vocab_size": 258,
            "model.num_layers": 2,
            "model.stem_layers": (1,),
            "train.seq_len": CONTEXT,
            "mesh.data": 1,
        },
    )


@pytest.fixture(scope="module")
def bytes_state(bytes_config, device_mesh):
    """bytes_state(mesh shape): a random state; equal parameters on every mesh.

    Parameters as they are at the start hardly look back; three times as large, they do.
    """

    @functools.cache
    def make(shape=(1, 1, 1)):
        config, mesh = bytes_config(), device_mesh(shape)
        state = init_state(Blueprint(config, mesh))
        return dataclasses.replace(state, params={n: 3 * p for n, p in state.params.items()})

    return make


@pytest.fixture(scope="module")
def generator(bytes_config, bytes_state, device_mesh):
    config, state, mesh = bytes_config(), bytes_state(), device_mesh((1, 1, 1))
    return Generator(config, state.params, rows_of(config, state, mesh), BYTES, mesh)


@pytest.mark.parametrize(
    ("kv_heads", "stem_layers", "tied"),
    [(2, (0, 1), True), (4, "none", False)],
)
def test_cached_logits_equal_the_training_forward(
    tiny_config, device_mesh, kv_heads, stem_layers, tied
):
    config = tiny_config(
        **{
            "model.num_layers": 2,
            "model.num_kv_heads": kv_heads,
            "model.stem_layers": stem_layers,
            "model.tie_embeddings": tied,
        }
    )
    mesh, spec = device_mesh((1, 1, 1)), table_specs(config).get("stem")
    model = ModelDef(config)
    state = init_state(Blueprint(config, mesh))
    lengths, prefixes, L = (13, 16), (3, 6), 16
    tokens_BxL = np.random.default_rng(0).integers(0, config.model.vocab_size, (2, L), np.int32)

    positions_BxL = np.broadcast_to(np.arange(L, dtype=np.int32), (2, L))
    inputs = stem_inputs(
        tokens_BxL,
        np.arange(2 * L, dtype=np.int32).reshape(2, L),
        positions_BxL,
        np.ones_like(tokens_BxL),
    )
    rows = {}
    if state.tables:
        places = spec.layout.row_numbers(tokens_BxL.reshape(-1))
        rows = {"stem": state.tables["stem"].rows[:, places]}

    @jax.jit
    def train_forward(params, rows):
        bound = model.bind(params)
        return bound.logits(bound(inputs, rows)[0])

    expected_BxLxV = np.asarray(train_forward(state.params, rows))

    source = rows_of(config, state)
    advance = jax.jit(Generator(config, state.params, source, BYTES).advance)
    width = max(prefixes) + 2
    tokens = np.stack([np.pad(t[:p], (0, width - p)) for t, p in zip(tokens_BxL, prefixes)])
    caches = [NewCache(24)] * config.model.num_layers
    logits, after = advance(state.params, source, tokens, np.array(prefixes, np.int32), caches)
    compared = 0
    for step in range(max(n - p for n, p in zip(lengths, prefixes))):
        place = np.asarray(prefixes) + step
        for b in range(2):
            if place[b] <= lengths[b]:
                expected_V = expected_BxLxV[b, place[b] - 1]
                np.testing.assert_allclose(np.asarray(logits)[b], expected_V, atol=1e-4, rtol=0)
                compared += 1
        token = np.take_along_axis(tokens_BxL, place[:, None], axis=1)
        logits, after = advance(state.params, source, token, np.ones(2, np.int32), *after)
    assert compared == sum(lengths) - sum(prefixes)


def test_greedy_tokens_are_those_of_the_whole_forward(generator, bytes_config, bytes_state):
    config, state = bytes_config(), bytes_state()
    spec, model = table_specs(config)["stem"], ModelDef(config)
    rows_SxVxF = state.tables["stem"].rows

    @jax.jit
    def whole_forward(ids_BxL, inverse_BxL):
        ones, positions = jnp.ones_like(ids_BxL), jnp.arange(CONTEXT)[None]
        bound = model.bind(state.params)
        inputs = stem_inputs(ids_BxL, inverse_BxL, positions, ones)
        return bound.logits(bound(inputs, {"stem": rows_SxVxF})[0])

    for prompt, completion in zip(PROMPTS, generator.complete(PROMPTS, 12, GREEDY)):
        ids = generator.encode(prompt)
        new = len(ids) - 1
        ids_BxL = np.zeros((1, CONTEXT), np.int32)
        ids_BxL[0, : len(ids) + 12] = ids + completion.tokens
        inverse_BxL = spec.layout.row_numbers(ids_BxL).astype(np.int32)
        best_L = np.argmax(whole_forward(ids_BxL, inverse_BxL)[0], axis=-1)
        assert best_L[new : new + 12].tolist() == completion.tokens


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(10.0, 20, 0.9)], ids=["greedy", "sampled"])
def test_a_ragged_batch_gives_the_tokens_of_one_by_one(generator, sampling):
    together = generator.complete(PROMPTS, 12, sampling, seed=5)
    alone = [generator.complete([prompt], 12, sampling, seed=5)[0] for prompt in PROMPTS]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]
    assert len({tuple(c.tokens) for c in together}) == len(PROMPTS)


def test_every_batch_size_gives_the_same(generator):
    whole = generator.complete(PROMPTS, 12, GREEDY)
    pieces: dict[int, str] = {}
    parts = generator.complete(
        PROMPTS,
        12,
        GREEDY,
        batch_size=1,
        on_text=lambda index, piece: pieces.update({index: pieces.get(index, "") + piece}),
    )
    assert [c.tokens for c in parts] == [c.tokens for c in whole]
    assert [pieces[index] for index in range(3)] == [c.text for c in whole]


def test_a_mesh_gives_the_tokens_of_one_device(generator, bytes_config, bytes_state, device_mesh):
    shape = (2, 2, 2)
    state = bytes_state(shape)
    rows = state.tables["stem"].rows
    assert len(rows.sharding.device_set) == 8
    assert rows.addressable_shards[0].data.shape[1] < rows.shape[1]
    config, mesh = bytes_config(), device_mesh(shape)
    sharded = Generator(config, state.params, rows_of(config, state, mesh), BYTES, mesh)
    expected = [c.tokens for c in generator.complete(PROMPTS, 8, GREEDY)]
    assert [c.tokens for c in sharded.complete(PROMPTS, 8, GREEDY)] == expected


def test_one_program_serves_all_settings_and_lengths_of_a_bucket(generator):
    generator.complete(["x"], 12, GREEDY)
    programs = generator.prefill._cache_size(), generator.decode._cache_size()
    generator.complete(["xyz"], 9, Sampling(0.5, 0, 1.0))
    generator.complete(["wxyz"], 6, Sampling(2, 3, 0.4))
    assert (generator.prefill._cache_size(), generator.decode._cache_size()) == programs


def test_seeds_reproduce_and_differ(generator):
    draw = functools.partial(generator.complete, max_new_tokens=12, sampling=VARIED)
    first, repeated, other = draw(["abc", "abc", PROMPTS[2]], seed=1)
    assert first.tokens == draw(["abc"], seed=1)[0].tokens
    assert first.tokens != repeated.tokens
    assert first.tokens != draw(["abc"], seed=2)[0].tokens
    assert other.tokens == draw([PROMPTS[2]], seed=1)[0].tokens
    # So hot, the noise alone decides: it has to be fresh at every step.
    assert len(set(draw(["abc"], sampling=Sampling(1e6, 0, 1.0))[0].tokens)) > 6
    assert len(set(sequence_seeds(0, [[1], [1], [2]]))) == 3


def test_eos_ends_its_sequence_alone(generator):
    free = generator.complete(PROMPTS, 10, VARIED)
    others = {token for completion in free[1:] for token in completion.tokens}
    others.add(free[0].tokens[0])
    at, eos = next((i, t) for i, t in enumerate(free[0].tokens) if t not in others)
    original = generator.tokenizer
    special = dataclasses.replace(original.special, stop_ids=(eos,))
    generator.tokenizer = dataclasses.replace(original, special=special)
    try:
        ended, *whole = generator.complete(PROMPTS, 10, VARIED)
        steps = list(generator.steps([generator.encode(PROMPTS[0])], 10, VARIED))
    finally:
        generator.tokenizer = original
    assert (ended.tokens, ended.stop) == (free[0].tokens[:at], "eos")
    assert [(c.tokens, c.stop) for c in whole] == [(c.tokens, "length") for c in free[1:]]
    assert steps == [[token] for token in free[0].tokens[: at + 1]]


def test_the_context_ends_a_completion(generator):
    prompt = "p" * (CONTEXT - 6)
    long, *short = generator.complete([prompt, *PROMPTS[:2]], 8, GREEDY)
    assert (len(long.tokens), long.stop) == (5, "context")
    expected = generator.complete(PROMPTS, 8, GREEDY)[:2]
    assert [(c.tokens, c.stop) for c in short] == [(c.tokens, "length") for c in expected]


def test_refused_prompts_name_value_and_remedy(generator):
    with pytest.raises(InputError, match=r"prompt 2 has 48 tokens.*seq_len=48.*shorten"):
        generator.complete(["x", "p" * (CONTEXT - 1)])
    with pytest.raises(InputError, match=r"ids from 3 to 258, .*0 to 257"):
        generator.steps([[3, 258]])
    with pytest.raises(InputError, match="no prompt"):
        generator.steps([])
    with pytest.raises(InputError, match="max_new_tokens=0"):
        generator.complete(["x"], 0)


@pytest.fixture(scope="module")
def run_folder(bytes_config, bytes_state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    BYTES.save(folder / "tokenizer")
    info = CheckpointInfo(
        step=7,
        # No update yet: no row lags behind.
        updates=0,
        bad_steps=0,
        touched_rows={},
        tokenizer=BYTES.fingerprint,
        data={"seed": 0, "sources": "none"},
        config=bytes_config(**{"model.attention": "splash"}),
    )
    with Checkpointer(folder) as checkpoints:
        state = dataclasses.replace(bytes_state(), step=jnp.int32(7), updates=jnp.int32(7))
        checkpoints.save(state, info, None)
        checkpoints.wait()
    return folder


def test_the_entry_point_completes_prompts(run_folder, generator, tmp_path):
    (tmp_path / "prompts.txt").write_text("one more.\n\nabc\n")
    command = [sys.executable, "-m", "stem_jax.generate", f"--workdir={run_folder}", "--json"]
    command += ["--prompt=abc", f"--prompt_file={tmp_path / 'prompts.txt'}", "--greedy"]
    environment = {**os.environ, "PYTHONWARNINGS": "error::ResourceWarning"}
    done = subprocess.run(
        [*command, "--max-new-tokens=6"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    expected = generator.complete(["abc", "one more.", "abc"], 6, GREEDY)
    for entry, completion in zip(found, expected, strict=True):
        assert entry.pop("tokens_per_second") > 0
        known = dataclasses.asdict(completion)
        del known["tokens_per_second"]
        assert entry == known


def _run(monkeypatch, capsys, *flags):
    """Exit status, stdout and stderr of the entry point, in this process."""
    monkeypatch.setattr(sys, "argv", ["generate", *flags])
    try:
        cli.run(generate.main)
        status = 0
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


def test_the_entry_point_prints_text(run_folder, generator, monkeypatch, capsys):
    flags = [f"--workdir={run_folder}", "--greedy", "--max_new_tokens=6"]
    prompts = ["abc", "p" * (CONTEXT - 6)]
    texts = [c.prompt + c.text for c in generator.complete(prompts, 6, GREEDY, batch_size=1)]
    assert _run(monkeypatch, capsys, *flags, "--prompt=abc") == (0, texts[0] + "\n", "")
    both = [*flags, "--step=7", *(f"--prompt={prompt}" for prompt in prompts)]
    status, output, notes = _run(monkeypatch, capsys, *both)
    assert (status, output) == (0, f"[1] {texts[0]}\n[2] {texts[1]}\n")
    assert notes == "note: [2] stopped at the context of 48 tokens, prompt included\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir={tmp}/none", "--prompt=x"], "none does not exist"),
        (["--workdir={tmp}", "--prompt=x"], "nothing was trained there"),
        (["--workdir={run}", "--prompt=x", "--step=3"], "no checkpoint of step 3"),
        (["--workdir={run}", "--prompt=x", "--top-p=2"], "top_p=2.0 must be"),
        (["--workdir={tmp}/none", "--prompt=x", "--top-p=1e-46"], "top_p=1e-46 must be at least"),
        (["--workdir={tmp}/none", "--prompt=x", "--top-k=3000000000"], "top_k=3000000000 must be"),
        (["--workdir={run}", "--prompt-file={tmp}/none.txt"], "none.txt cannot be read"),
    ],
)
def test_refused_input_is_one_line(run_folder, tmp_path, monkeypatch, capsys, flags, message):
    flags = [flag.format(tmp=tmp_path, run=run_folder) for flag in flags]
    status, output, errors = _run(monkeypatch, capsys, *flags)
    assert (status, output) == (1, "")
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors


def test_batches_and_seeds_that_are_none(generator):
    for size in (0, -3):
        with pytest.raises(InputError, match=f"batch_size={size} must be at least 1"):
            generator.complete(["abc"], 4, GREEDY, batch_size=size)
    for seeds in ([-1], [2**32], [1, 2]):
        with pytest.raises(InputError, match=r"seeds=\[.* must be one number below 2\^32 for each"):
            generator.steps([[1, 2]], 4, GREEDY, seeds)


def test_missing_prompts_are_wrong_usage(monkeypatch, capsys):
    status, _, errors = _run(monkeypatch, capsys, "--workdir=x")
    assert status == 2 and "--prompt" in errors


def test_an_empty_or_foreign_run_is_refused(run_folder, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint"):
        load_run(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").symlink_to(run_folder / "checkpoints")
    train_sentencepiece(["a b c"] * 9, tmp_path / "tokenizer.model", 265)
    other = load_tokenizer("sentencepiece", tmp_path / "tokenizer.model")
    other.save(tmp_path / "tokenizer")
    known, found = BYTES.fingerprint[:12], other.fingerprint[:12]
    with pytest.raises(InputError, match=f"{known}.*{found}"):
        load_run(tmp_path)


def test_a_loaded_run_is_the_saved_one(run_folder, bytes_state):
    run = load_run(run_folder)
    assert (run.step, run.config.model.attention) == (7, "auto")
    for name, value in bytes_state().params.items():
        assert np.array_equal(run.params[name], value)
    assert np.array_equal(run.rows["stem"].rows, bytes_state().tables["stem"].rows)


def test_ids_that_stand_for_nothing_are_never_drawn(generator, device_mesh):
    """A model's vocabulary is often padded; what decodes to nothing is no token to give."""
    few = dataclasses.replace(BYTES, vocab_size=120)
    model = generator.config, generator.params, generator.rows.sources
    padded = Generator(*model, few, device_mesh((1, 1, 1)))
    hot = Sampling(1e6, 0, 1.0)
    drawn = {token for c in padded.complete(PROMPTS, 12, hot) for token in c.tokens}
    assert drawn and max(drawn) < 120
    # Without it they are: the noise alone decides.
    free = {token for c in generator.complete(PROMPTS, 12, hot) for token in c.tokens}
    assert max(free) >= 120
