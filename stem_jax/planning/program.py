"""The programs that a plan compiles, from shapes alone: the train step, and a plain lookup."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from stem_jax.config import Config
from stem_jax.errors import InputError
from stem_jax.kernels.float8 import check_float8
from stem_jax.memory.catalogue import table_specs
from stem_jax.memory.memory import STEM
from stem_jax.mesh import (
    BATCH_AXES,
    TOKEN_AXES,
    axis_size,
    check_context,
    check_divides,
    check_placement,
    token_spec,
)
from stem_jax.model.attention import check_heads, resolve_backend
from stem_jax.planning.distinct_rows import (
    DistinctRows,
    needs_of,
    step_distinct_rows,
    zipf_shares,
)
from stem_jax.tables.block_sizes import choose_sizes, expected_distinct
from stem_jax.tables.row_coast import RowBlock
from stem_jax.tables.row_rules import adamw
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import ADAMW, check_host_rows
from stem_jax.training.batch import Batch
from stem_jax.training.reads import Reads, ReadSizes
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state
from stem_jax.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Program:
    """lowered: ready to compile. argument_bytes: of one chip's share of the arguments. tables: of
    each memory, with the sizes of its row exchange. rounds: of it, to be expected of loops whose
    end only the device knows. distinct: how many rows the tokens of a micro-batch have on a device,
    over these tokens.
    """

    lowered: jax.stages.Lowered
    argument_bytes: int
    tables: dict[str, ShardedTable]
    rounds: int = 1
    distinct: float = 1.0


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises InputError for a batch that does not divide over the mesh."""
    what = "train.global_batch_size / train.micro_batches"
    check_divides(config.micro_batch_size, what, BATCH_AXES, mesh)
    check_context(config.train.seq_len, mesh)


def planned_tables(
    config: Config, mesh: Mesh, distinct: dict[str, DistinctRows], *, all_distinct: bool = False
) -> dict[str, ShardedTable]:
    """The table of each memory, as a step exchanges its rows.

    Args:
        distinct: what the step asks for.
        all_distinct: see `train_step_program`.
    """
    found = {}
    for name, spec in table_specs(config).items():
        table = ShardedTable(spec, mesh, distinct[name].keys)
        if not all_distinct:
            needed, largest = needs_of(distinct[name], table), table.largest_sizes
            table = dataclasses.replace(table, sizes=choose_sizes(needed, needed, largest))
        found[name] = table
    return found


def train_step_program(
    config: Config,
    mesh: Mesh,
    *,
    all_distinct: bool = False,
    distinct: dict[str, DistinctRows] | None = None,
) -> Program:
    """`TrainStep.update` on inputs that exist as shapes only.

    Args:
        all_distinct: make room for every key of a device distinct; else the row blocks have the
            size that the step needs.
        distinct: what it asks for; None finds it out.

    Raises:
        InputError: sizes that do not divide over the mesh, large replicated arrays, or matmuls that
            its devices have not.
    """
    check_batch(config, mesh)
    check_heads(config.model, mesh)
    check_float8(config.model.matmul_dtype, mesh.devices.flat[0])
    resolve_backend(config.model, mesh, config.train.seq_len)
    step = TrainStep(config, mesh)
    check_placement(step.blueprint.placed(), mesh, config.mesh.max_replicated_mib)
    check_host_rows(step.reads.specs.values(), mesh)
    state = abstract_state(step.blueprint)
    shape = (config.train.micro_batches, config.micro_batch_size, config.train.seq_len)
    ints: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=step.batch_sharding)
    mask: Any = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=step.batch_sharding)
    batch = Batch(ints, ints, ints, ints, mask, _host_keys(step.reads, ints))
    schedule = jax.eval_shape(lambda: make_schedule(config, config.train.steps))
    tables, sizes, slots = step.reads.tables(batch), None, {}
    if tables and not all_distinct:
        distinct = step_distinct_rows(config, mesh) if distinct is None else distinct
        planned = planned_tables(config, mesh, distinct)
        sizes = ReadSizes(tuple((name, t.sizes or t.largest_sizes) for name, t in planned.items()))
        tables = step.reads.tables(batch, sizes)
    for name in step.reads.offloaded:
        exchange = tables[name].exchange
        size = exchange.num_owners * exchange.owned_rows
        sharding = NamedSharding(mesh, tables[name].spec.index_spec)
        slots[name] = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)
    program = _program(step.update, (state, batch, schedule, slots), tables, sizes=sizes)
    if not tables or all_distinct:
        return program
    tokens = config.micro_batch_size * config.train.seq_len // axis_size(mesh, TOKEN_AXES)
    share = expected_distinct(tokens, zipf_shares(config)) / tokens
    return dataclasses.replace(program, distinct=share)


def _host_keys(reads: Reads, tokens: Any) -> dict[str, Any]:
    """Those that come with a batch whose tokens are described so."""

    def described(memory):
        keys = jax.eval_shape(memory.keys, tokens, tokens)
        return jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=tokens.sharding)

    return {name: described(memory) for name, memory in reads.memories.items() if memory.reach}


def naive_lookup_program(config: Config, mesh: Mesh) -> Program:
    """The table's part of a step without an exchange: `table[ids]`, partitioned automatically.

    Lookup, the scatter-add of its gradient and AdamW on the table. The rows are scaled and squared
    so that the backward pass needs them, as the model's does.
    """
    spec = table_specs(config).get(STEM)
    if spec is None:
        raise InputError(
            "--naive-lookup looks rows up, and model.stem_layers=none has no table; choose a STEM "
            "configuration"
        )
    check_divides(spec.num_rows, "padded vocabulary", spec.vocab_axes, mesh)
    # In float32, whatever the tables have: what is compared is the lookup.
    spec = dataclasses.replace(spec, moments=ADAMW)
    dtype = config.model.compute_dtype
    tokens_spec = NamedSharding(mesh, token_spec())
    rows_spec = NamedSharding(mesh, token_spec(None, "tensor"))
    table_spec = NamedSharding(mesh, spec.logical_spec)

    def loss(table_VxSxF, ids_BxL, scale_BxL):
        rows_BxLxSxF = table_VxSxF.astype(dtype)[ids_BxL]
        rows_BxLxSxF = jax.lax.with_sharding_constraint(rows_BxLxSxF, rows_spec)
        scaled = rows_BxLxSxF * scale_BxL[..., None, None]
        return jnp.sum(jnp.square(scaled).astype(jnp.float32))

    def update(table, mu, nu, ids_BxL, scale_BxL, rate, step):
        gradient = jax.grad(loss)(table, ids_BxL, scale_BxL)
        block = adamw(spec, RowBlock(table, mu, nu), gradient, rate, step)
        return block.rows, block.mu, block.nu

    table = jax.ShapeDtypeStruct(spec.shape("rows"), jnp.float32, sharding=table_spec)
    shape = (config.micro_batch_size, config.train.seq_len)
    check_divides(shape[0], "sequences of a micro-batch", BATCH_AXES, mesh)
    check_context(config.train.seq_len, mesh)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=tokens_spec)
    scale = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=tokens_spec)
    scalars = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(update, donate_argnums=(0, 1, 2), out_shardings=(table_spec,) * 3)
    return _program(compiled, (table, table, table, ids, scale, *scalars), {})


def _program(jitted, arguments: tuple, tables: dict[str, ShardedTable], **static) -> Program:
    def share(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    size = sum(share(x) for x in jax.tree.leaves(arguments))
    return Program(jitted.lower(*arguments, **static), size, tables)
