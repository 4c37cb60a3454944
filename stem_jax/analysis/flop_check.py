"""FLOPs by formula beside the compiler's count of the programs that run.

Compiled are `Generator.prefill` and `Generator.decode` for one sequence, and the train step, from
shapes alone. The compiler counts every operation of a program, also those of the sampler, of the
keys of n-grams and of the optimizer, which no formula has; the sampler and the keys are compiled
alone, and their operations taken from there. A loop
counts once there, so the check has no loops: one chunk of the loss, one micro-batch, no groups of
layers, no rematerialisation. It counts an operation for each number that is converted, too, twice
for each bfloat16 operand on CPUs, so the check is in float32, where nothing is.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stem_jax.config import MEMORY_SECTIONS, Config, ModelConfig
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling, sample
from stem_jax.memory.catalogue import memories, table_specs
from stem_jax.mesh import make_mesh
from stem_jax.model.cost import generation_flops, training_flops_per_token
from stem_jax.model.layer_plan import layer_kinds, with_layers
from stem_jax.planning.program import train_step_program
from stem_jax.tables.row_source import ResidentRows
from stem_jax.tables.spec import abstract_table
from stem_jax.training.blueprint import ModelDef

PROGRAMS = ("prefill", "decode", "training")
# FLOPs are a sum over layers, so a few show what many do; compiling takes time for each.
_MOST_LAYERS = 4
_TRAINED_SEQUENCES = 8
# Machine code is written in half the time and never run; the module that is counted is the same.
_QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class FlopCheck:
    """FLOPs of one compiled program.

    program: of PROGRAMS. stem_layers: of the compiled model; empty for a dense one. matmul,
    elementwise: by formula (`model.cost`); a training step has no formula for the second, and 0.
    sampling, keys: compiled alone; keys of memories where they are no tokens. compiled: of the
    whole program.
    """

    program: str
    stem_layers: tuple[int, ...]
    matmul: int
    elementwise: int
    sampling: int
    keys: int
    compiled: int

    @property
    def ratio(self) -> float:
        """Formula over compiled, the sampler and keys in both."""
        alone = self.sampling + self.keys
        return (self.matmul + self.elementwise + alone) / self.compiled

    @property
    def matmul_ratio(self) -> float:
        """Matmuls by formula over all that is compiled."""
        return self.matmul / self.compiled

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self) | {"ratio": self.ratio, "matmul_ratio": self.matmul_ratio}


def checked_config(config: Config) -> Config:
    """The configuration at its own widths and context, cut to what is compiled for a check.

    At most four layers, of which one at least has a table if any of the whole has; in float32.
    """
    kinds = layer_kinds(config.model)
    first = kinds[:_MOST_LAYERS]
    if "stem" in kinds and "stem" not in first:
        first = (*first[:-1], "stem")
    model = with_layers(config.model, first)
    return _countable(dataclasses.replace(config, model=model), _TRAINED_SEQUENCES)


def _countable(config: Config, sequences: int) -> Config:
    """The configuration as a program that is counted rightly, see above."""
    model, train = config.model, config.train
    resident: dict[str, Any] = {
        section: dataclasses.replace(getattr(config, section), resident_rows=None)
        for section in ("tables", *MEMORY_SECTIONS)
    }
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            param_dtype="float32",
            compute_dtype="float32",
            attention="xla",
            remat="none",
            scan_layers=False,
        ),
        train=dataclasses.replace(
            train,
            global_batch_size=sequences,
            micro_batches=1,
            loss_chunk=train.seq_len,
        ),
        **resident,
        mesh=config.mesh.on_one_device(),
    )


def check_flops(config: Config, programs: Sequence[str] = PROGRAMS) -> list[FlopCheck]:
    """Compiles the programs of a configuration for one device, and counts them both ways.

    Args:
        config: see `checked_config`. A prompt fills the context, and so does the cache.
        programs: of PROGRAMS.
    """
    found = []
    if "prefill" in programs or "decode" in programs:
        found += _generation(config, programs)
    if "training" in programs:
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        lowered = train_step_program(config, mesh, all_distinct=True).lowered
        matmul = training_flops_per_token(config, config.train.seq_len)
        matmul *= config.tokens_per_step
        stem = config.model.stem_layers
        found.append(FlopCheck("training", stem, matmul, 0, 0, 0, _count(lowered)))
    return found


def step_flops(config: Config) -> int:
    """FLOPs of a train step of the whole configuration, compiled for one device.

    Unlike in a check, all layers are compiled, and row blocks are as large as a batch needs by
    Zipf's law: a row optimizer costs what the distinct rows do.
    """
    counted = _countable(config, config.train.global_batch_size)
    mesh = make_mesh(counted.mesh, jax.devices()[:1])
    return _count(train_step_program(counted, mesh).lowered)


def cache_slots(config: Config) -> int:
    """Slots of a cache that holds the whole context: the power of two that generation takes."""
    return 1 << (config.train.seq_len - 1).bit_length()


def _generation(config: Config, programs: Sequence[str]) -> list[FlopCheck]:
    model, length, slots = config.model, config.train.seq_len, cache_slots(config)
    rows = {
        name: ResidentRows(abstract_table(spec).rows, spec, None)
        for name, spec in table_specs(config).items()
    }
    params: Any = ModelDef(config).shapes()
    generator = Generator(config, params, rows, None)
    tokens_1xL = jax.ShapeDtypeStruct((1, length), jnp.int32)
    token_1 = jax.ShapeDtypeStruct((1,), jnp.int32)
    seeds_1 = jax.ShapeDtypeStruct((1,), jnp.uint32)
    scalars = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in Sampling().scalars())
    prompt = (params, rows, tokens_1xL, token_1, seeds_1, scalars)
    sampling = _sampling(model, seeds_1, scalars)

    def check(program: str, lowered: jax.stages.Lowered, length: int, met: int) -> FlopCheck:
        flops = generation_flops(config, length, met)
        terms = (flops.matmul, flops.elementwise, sampling, _keys(config, length))
        return FlopCheck(program, model.stem_layers, *terms, _count(lowered))

    found = []
    if "prefill" in programs:
        lowered = generator.prefill.lower(*prompt, slots=slots)
        found.append(check("prefill", lowered, length, length))
    if "decode" in programs:
        _, state = jax.eval_shape(lambda *args: generator.prefill(*args, slots=slots), *prompt)
        lowered = generator.decode.lower(params, rows, token_1, scalars, state=state)
        found.append(check("decode", lowered, 1, slots))
    return found


def _sampling(model: ModelConfig, seeds_1, scalars: tuple) -> int:
    logits_1xV = jax.ShapeDtypeStruct((1, model.vocab_size), jnp.float32)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return _count(jax.jit(sample).lower(logits_1xV, seeds_1, step, *scalars))


def _keys(config: Config, length: int) -> int:
    """Of so many tokens of one sequence; a memory's keys that are the tokens cost nothing."""
    tokens_1xL = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return sum(
        _count(jax.jit(memory.keys).lower(tokens_1xL, tokens_1xL))
        for memory in memories(config).values()
        if memory.reach
    )


def _count(lowered: jax.stages.Lowered) -> int:
    """FLOPs of the compiled module."""
    costs = lowered.compile(compiler_options=_QUICK).cost_analysis()
    assert costs is not None, "this backend counts nothing"
    return round(costs["flops"])
