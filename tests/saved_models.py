"""Small trained models in work folders, and what both sides of an export say about a batch."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.data.tokenizer import Tokenizer, load_tokenizer
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import memories
from stem_jax.model.inputs import Inputs
from stem_jax.model.memory_rows import MemoryRows
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import TrainState, init_state
from stem_jax.training.step import TrainStep

BYTES = load_tokenizer("bytes")
UPDATES = 40
CONTEXT = 128
SIZES = {
    "model.vocab_size": 258,
    "model.num_layers": 3,
    "model.stem_layers": (0, 2),
    "train.seq_len": 16,
    "train.steps": UPDATES,
    "optimizer.learning_rate": 0.01,
    "mesh.data": 1,
}


# Several files ask for the same ones.
_TRAINED: dict[TrainStep, TrainState] = {}


def trained_state(step: TrainStep, make_batch) -> TrainState:
    """A state after some updates. Rows lag behind by different numbers of them."""
    if step not in _TRAINED:
        _TRAINED[step] = jax.device_get(_train(step, make_batch))
    return jax.device_put(_TRAINED[step], step.shardings)


def _train(step: TrainStep, make_batch) -> TrainState:
    """Ids of a sequence come from a group of 16, each followed by the same one.

    Batch by batch another group is left out.
    """
    schedule = make_schedule(step.config, UPDATES)
    state = init_state(step.blueprint)
    for number in range(UPDATES):
        batch = make_batch(step, seed=number)
        # In NumPy: each operation on small arrays of JAX is a program of its own.
        tokens = np.asarray(batch.tokens)
        group = tokens[..., :1] % 16
        group = np.where(group == number % 16, group + 1, group) % 16
        series = [tokens[..., 0] % 16]
        for _ in range(tokens.shape[-1]):
            series.append((5 * series[-1] + 3) % 16)
        ids = 16 * group + np.stack(series, axis=-1)
        tokens, targets = (
            jax.device_put(part, step.batch_sharding) for part in (ids[..., :-1], ids[..., 1:])
        )
        batch = dataclasses.replace(batch, tokens=tokens, targets=targets)
        state, _ = step.update(state, batch, schedule)
    return state


def save_run(
    folder: Path,
    step: TrainStep,
    state: TrainState,
    tokenizer: Tokenizer = BYTES,
    context: int = CONTEXT,
):
    """A work folder with this state, whose context is longer than what it was trained on."""
    train = dataclasses.replace(step.config.train, seq_len=context)
    config = dataclasses.replace(step.config, train=train)
    tokenizer.save(folder / "tokenizer")
    data, touched = {"seed": 0, "sources": "none"}, dict.fromkeys(memories(config), 0)
    info = CheckpointInfo(UPDATES, UPDATES, 0, touched, tokenizer.fingerprint, data, config)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None)


def run_folders(models: dict[str, dict], train_step, make_batch, tmp_path_factory):
    """A function of a name in `models` (overrides of SIZES): the work folder of that model."""

    @functools.cache
    def make(name: str) -> Path:
        step = train_step(**{**SIZES, **models[name]})
        folder = tmp_path_factory.mktemp(name)
        save_run(folder, step, trained_state(step, make_batch))
        return folder

    return make


def logits(run: LoadedRun, tokens_BxL: np.ndarray) -> np.ndarray:
    """Our logits [B, L, V] of whole sequences."""
    B, L = tokens_BxL.shape
    tokens = jnp.asarray(tokens_BxL, jnp.int32)
    sources = MemoryRows(memories(run.config), run.rows)
    rows = sources.serve(tokens)

    @jax.jit
    def forward(params, rows):
        ones, dtype = jnp.ones_like(tokens), run.config.model.compute_dtype
        blocks, index = sources.blocks(rows, tokens, ones, dtype)
        positions = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L))
        model = ModelDef(run.config).bind(params)
        return model.logits(model(Inputs(tokens, positions, ones, index), blocks).hidden)

    return np.asarray(forward(run.params, rows))


def greedy(run: LoadedRun, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Our greedy completions of a batch, ended by eos."""
    generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
    steps = generator.steps(prompts, new_tokens, Sampling(temperature=0.0))
    columns = list(zip(*steps, strict=True))
    return [[token for token in column if token is not None] for column in columns]
