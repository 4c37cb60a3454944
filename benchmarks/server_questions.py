"""A small random model as a run, questions to it, and what it answers to each alone."""

import dataclasses
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.train_step import bench_config
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.config import Config
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.generation.generator import Generator, sequence_seeds
from stem_jax.generation.sampling import Sampling, keep_likeliest
from stem_jax.mesh import make_mesh
from stem_jax.model.cache import NewCache
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import init_state

CONTEXT = 128


def make_run(folder: Path) -> None:
    """Writes a run of bytes in float32 whose parameters are random.

    As they are at the start they hardly look back; three times as large, they do.
    """
    sizes = {"vocab_size": 258, "embed_dim": 64, "num_layers": 2, "num_heads": 4}
    sizes |= {"num_kv_heads": 2, "ffn_dim": 96, "stem_layers": (1,)}
    keys = {f"model__{name}": size for name, size in sizes.items()}
    config: Config = bench_config(**keys, train__seq_len=CONTEXT, mesh__data=1)
    state = init_state(Blueprint(config, make_mesh(config.mesh, jax.devices()[:1])))
    params = {name: 3 * value for name, value in state.params.items()}
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(folder / "tokenizer")
    said = {"seed": 0, "sources": "none"}
    info = CheckpointInfo(0, 0, 0, {}, tokenizer.fingerprint, said, config)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(dataclasses.replace(state, params=params), info, None)
        checkpoints.wait()


@dataclasses.dataclass(frozen=True)
class Question:
    """What a client asks for; without a seed it is greedy."""

    prompt: str | tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    seed: int | None

    def body(self) -> dict:
        """As it is sent."""
        how = dataclasses.asdict(self.sampling)
        top_k = how.pop("top_k")
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        asked = {"prompt": prompt, "max_tokens": self.max_tokens, "seed": self.seed}
        return {**asked, **how, "extra_body": {"top_k": top_k}}


def questions(number: int, seed: int = 0) -> list[Question]:
    """Prompts of all lengths as texts and ids, half of them sampled."""
    rng = random.Random(seed)
    found = []
    for index in range(number):
        length = rng.randint(1, CONTEXT - 4)
        ids = tuple(rng.randrange(256) for _ in range(length))
        text = "".join(rng.choice("abcdefgh .,\n") for _ in range(length))
        sampling, own = Sampling(0.0, 0, 1.0), None
        if index % 2:
            sampling = Sampling(rng.uniform(0.5, 2), rng.choice([0, 5, 40]), rng.choice([0.5, 1.0]))
            own = rng.randrange(2**31)
        most = rng.randint(1, CONTEXT - 1 - length)
        found.append(Question(text if index % 4 < 2 else ids, most, sampling, own))
    return found


@dataclasses.dataclass(frozen=True)
class Known:
    """What the model says to a question alone. ids: of the prompt. tokens: new ones, all."""

    ids: list[int]
    tokens: list[int]


class Reference:
    """Answers every question alone, by `Generator`."""

    def __init__(self, workdir: Path):
        self._run = load_run(workdir)
        run = self._run
        self.generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)

    def known(self, question: Question) -> Known:
        """As `generate` with this seed and prompt alone."""
        prompt = question.prompt
        ids = self.generator.encode(prompt) if isinstance(prompt, str) else list(prompt)
        seeds = sequence_seeds(question.seed or 0, [ids])
        steps = self.generator.steps([ids], question.max_tokens, question.sampling, seeds)
        return Known(ids, [token for [token] in steps if token is not None])

    def gap(self, question: Question, known: Known, place: int) -> float:
        """Between the two best of what the token at `place` was chosen by, with its noise."""
        generator, ids = self.generator, [*known.ids, *known.tokens[:place]]
        tokens_1xL = jnp.asarray([ids], jnp.int32)
        lengths_1 = jnp.asarray([len(ids)], jnp.int32)
        caches = [NewCache(CONTEXT)] * generator.config.model.num_layers
        rows = generator.rows.serve(tokens_1xL)
        logits_1xV, _ = generator.advance(generator.params, rows, tokens_1xL, lengths_1, caches)
        scores_1xV = generator.drawable(logits_1xV)
        temperature, top_k, top_p = question.sampling.scalars()
        if temperature > 0:
            scores_1xV = keep_likeliest(scores_1xV / temperature, top_k, top_p)
            [seed] = sequence_seeds(question.seed or 0, [known.ids])
            key = jax.random.fold_in(jax.random.key(np.uint32(seed)), place)
            scores_1xV = scores_1xV + jax.random.gumbel(key, scores_1xV.shape[1:])
        second, best = np.sort(np.asarray(scores_1xV)[0])[-2:]
        return float(best - second)
