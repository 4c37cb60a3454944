"""The programs that a plan compiles, from shapes alone: the train step, and a plain lookup."""

import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.config import Config
from stem_jax.errors import InputError
from stem_jax.mesh import BATCH_AXES, axis_size, batch_sharding, check_divides, check_placement
from stem_jax.model.attention import check_heads, resolve_backend
from stem_jax.tables.exchange import Exchange
from stem_jax.tables.row_optimizer import RowBlock, adamw
from stem_jax.tables.spec import TableSpec
from stem_jax.training.report import placed_arrays
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state
from stem_jax.training.step import Batch, TrainStep


@dataclasses.dataclass(frozen=True)
class Program:
    """lowered: ready to compile. argument_bytes: of one chip's share of the arguments. exchange:
    the sizes of the row exchange; None without one. rounds: of it, to be expected of loops whose
    end only the device knows.
    """

    lowered: jax.stages.Lowered
    argument_bytes: int
    exchange: Exchange | None
    rounds: int = 1


def train_step_program(config: Config, mesh: Mesh, *, all_distinct: bool = False) -> Program:
    """`TrainStep.update` on inputs that exist as shapes only.

    Args:
        all_distinct: make room for every token of a device distinct; else the row blocks have the
            size that tokens by Zipf's law need.

    Raises:
        InputError: sizes that do not divide over the mesh, or large replicated arrays.
    """
    check_divides(
        config.micro_batch_size,
        "train.global_batch_size / train.micro_batches",
        BATCH_AXES,
        mesh,
    )
    check_heads(config.model, mesh)
    resolve_backend(config.model, mesh, config.train.seq_len)
    step = TrainStep(config, mesh)
    check_placement(placed_arrays(config, step.model), mesh, config.mesh.max_replicated_mib)
    state = abstract_state(config, step.model, mesh)
    shape = (config.train.micro_batches, config.micro_batch_size, config.train.seq_len)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=step.batch_sharding)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=step.batch_sharding)
    batch = Batch(ints, ints, ints, ints, mask)
    schedule = jax.eval_shape(lambda: make_schedule(config, config.train.steps))
    table = step.table(ints)
    if table is not None and not all_distinct:
        counts = zipf_counts(config, mesh)
        table = dataclasses.replace(table, sizes=table.choose_sizes(counts))
    sizes = None if table is None else table.sizes
    exchange = None if table is None else table.exchange
    slots = None
    if step.spec.offloaded:
        size = exchange.num_owners * exchange.owned_rows
        sharding = NamedSharding(mesh, step.spec.index_spec)
        slots = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)
    program = _program(step.update, (state, batch, schedule, slots), exchange, sizes=sizes)
    if exchange is None or exchange.num_owners == 1:
        return program
    return dataclasses.replace(program, rounds=zipf_rounds(config, mesh, exchange.capacity))


def zipf_rounds(config: Config, mesh: Mesh, capacity: int) -> int:
    """Rounds of an exchange whose pairs of devices move so many rows each in one.

    The pair with most rows decides. What one of them has is a sum of independent draws, near enough
    to normal: of N pairs the largest lies where one in N is larger.
    """
    spec = TableSpec.from_config(config)
    owners, devices = axis_size(mesh, spec.vocab_axes), axis_size(mesh, BATCH_AXES)
    asked_K = 1 - (1 - _zipf_shares(config)) ** (config.tokens_per_step // devices)
    rows_K = spec.layout.row_numbers(np.arange(len(asked_K)))
    owner_K = rows_K // (spec.num_rows // owners)
    mean_P = np.bincount(owner_K, asked_K, owners)
    deviation_P = np.sqrt(np.bincount(owner_K, asked_K * (1 - asked_K), owners))
    largest = statistics.NormalDist().inv_cdf(1 - 1 / (owners * devices))
    return max(1, math.ceil(np.max(mean_P + largest * deviation_P) / capacity))


def zipf_counts(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Distinct rows to expect of a device, and rows asked of an owner, per step.

    Tokens are drawn independently with a probability inverse to their rank; text repeats itself
    more and has fewer. Rows are spread over their owners evenly.
    """
    shares = _zipf_shares(config)

    def distinct(tokens: int) -> float:
        return float(np.sum(1 - (1 - shares) ** tokens))

    own = distinct(config.tokens_per_step // axis_size(mesh, BATCH_AXES))
    owners = axis_size(mesh, config.tables.vocab_axes)
    return math.ceil(own), math.ceil(distinct(config.tokens_per_step) / owners)


def _zipf_shares(config: Config) -> np.ndarray:
    shares = 1 / np.arange(1, config.model.vocab_size + 1)
    return shares / shares.sum()


def naive_lookup_program(config: Config, mesh: Mesh) -> Program:
    """The table's part of a step without an exchange: `table[ids]`, partitioned automatically.

    Lookup, the scatter-add of its gradient and AdamW on the table. The rows are scaled and squared
    so that the backward pass needs them, as the model's does.
    """
    spec = TableSpec.from_config(config)
    if not spec.num_layers:
        raise InputError(
            "--naive-lookup looks rows up, and model.stem_layers=none has no table; choose a STEM "
            "configuration"
        )
    check_divides(spec.num_rows, "padded vocabulary", spec.vocab_axes, mesh)
    dtype = config.model.compute_dtype
    tokens_spec = batch_sharding(mesh)
    rows_spec = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, None, "tensor"))
    table_spec = NamedSharding(mesh, spec.row_spec)

    def loss(table_VxSxF, ids_BxL, scale_BxL):
        rows_BxLxSxF = table_VxSxF.astype(dtype)[ids_BxL]
        rows_BxLxSxF = jax.lax.with_sharding_constraint(rows_BxLxSxF, rows_spec)
        scaled = rows_BxLxSxF * scale_BxL[..., None, None]
        return jnp.sum(jnp.square(scaled).astype(jnp.float32))

    def update(table, mu, nu, ids_BxL, scale_BxL, rate, step):
        gradient = jax.grad(loss)(table, ids_BxL, scale_BxL)
        block = adamw(spec, RowBlock(table, mu, nu), gradient, rate, step)
        return block.rows, block.mu, block.nu

    size = (spec.num_rows, spec.num_layers, spec.width)
    table = jax.ShapeDtypeStruct(size, jnp.float32, sharding=table_spec)
    shape = (config.micro_batch_size, config.train.seq_len)
    check_divides(shape[0], "sequences of a micro-batch", BATCH_AXES, mesh)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=tokens_spec)
    scale = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=tokens_spec)
    scalars = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(update, donate_argnums=(0, 1, 2), out_shardings=(table_spec,) * 3)
    return _program(compiled, (table, table, table, ids, scale, *scalars), None)


def _program(jitted, arguments: tuple, exchange: Exchange | None, **static) -> Program:
    def share(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    size = sum(share(x) for x in jax.tree.leaves(arguments))
    return Program(jitted.lower(*arguments, **static), size, exchange)
