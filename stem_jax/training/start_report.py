"""What a run says before its first step: sizes, bytes, placement, batch arithmetic."""

import math

import jax
from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.memory.memory import STEM
from stem_jax.mesh import AXES, BATCH_AXES, CONTEXT, axis_size
from stem_jax.model.attention import refusal, resolve_backend
from stem_jax.model.cost import count_parameters, training_flops_per_token
from stem_jax.tables.host_memory import available_host_bytes
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.spec import ADAMW, TableSpec
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import abstract_state
from stem_jax.training.working_set import most_rows

_MIB = 2**20


def describe_run(blueprint: Blueprint, working_sets: dict[str, int] | None = None) -> str:
    """The start-up report as text.

    Args:
        working_sets: of offloaded tables, rows that the batches in flight need at a time.
    """
    config, mesh = blueprint.config, blueprint.mesh
    lines = [
        *_parameter_lines(config),
        f"attention    {attention_kernel(config, mesh)}",
        *_memory_lines(blueprint),
        *_table_lines(blueprint, working_sets or {}),
        *_batch_lines(config, mesh),
    ]
    return "\n".join(lines)


def _parameter_lines(config: Config) -> list[str]:
    count = count_parameters(config)
    model = config.model
    layers = ", ".join(map(str, model.stem_layers)) or "none"
    return [
        f"parameters   total {_millions(count.total)}, active {_millions(count.active)}, "
        f"table {_millions(count.table)}",
        f"model        {model.num_layers} layers, D {model.embed_dim}, F {model.ffn_dim}, "
        f"V {model.vocab_size}, heads {model.num_heads}/{model.num_kv_heads}; "
        f"STEM layers: {layers}",
    ]


def attention_kernel(config: Config, mesh: Mesh) -> str:
    """The kernel of the run's attention, and why it is not the fastest of GPUs or of CPUs."""
    length, device = config.train.seq_len, mesh.devices.flat[0]
    kernel = resolve_backend(config.model, mesh, length)
    if device.platform == "gpu" and config.model.attention == "auto" and kernel != "tokamax":
        reason = refusal("tokamax", config.model, mesh, length)
        return f"{kernel}: tokamax, which is faster, {reason}"
    if (device.platform, kernel) == ("cpu", "splash"):
        return "splash: interpreted, as it is a kernel of TPUs, and slow; auto takes xla here"
    return kernel


def _memory_lines(blueprint: Blueprint) -> list[str]:
    mesh, specs = blueprint.mesh, blueprint.specs
    backbone = _backbone_bytes(blueprint)
    table = sum(array.device_bytes(mesh) for spec in specs.values() for array in spec.placed())
    host, offloaded = "0 MiB", {name: spec for name, spec in specs.items() if spec.offloaded}
    if offloaded:
        most = {
            name: most_rows(blueprint.config, blueprint.memories[name], spec)
            for name, spec in offloaded.items()
        }
        needed = (HostStore.needed_bytes(s, mesh, rows=most[n]) for n, s in offloaded.items())
        grows = any(spec.made_when_asked for spec in offloaded.values())
        host = ("up to " if grows else "") + _mib(sum(needed))
        available = available_host_bytes()
        host += "" if available is None else f" of {_mib(available)} available"
    shape = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES)
    return [
        f"mesh         {shape}: {mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
        f"memory       per device {_mib(backbone + table)}: backbone with optimizer "
        f"{_mib(backbone)}, tables with moments {_mib(table)}; host memory {host}",
    ]


def _backbone_bytes(blueprint: Blueprint) -> int:
    """Bytes on each device of the parameters and what their optimizer keeps."""
    state = abstract_state(blueprint)
    return sum(
        math.prod(kept.sharding.shard_shape(kept.shape)) * kept.dtype.itemsize
        for kept in jax.tree.leaves((state.params, state.opt_state))
    )


def _table_lines(blueprint: Blueprint, working_sets: dict[str, int]) -> list[str]:
    if not blueprint.specs:
        return ["tables       none: every layer has an up projection"]
    return [
        line
        for name in blueprint.specs
        for line in _lines_of_table(blueprint, name, working_sets.get(name))
    ]


def _lines_of_table(blueprint: Blueprint, name: str, working_set: int | None) -> list[str]:
    config, mesh, spec = blueprint.config, blueprint.mesh, blueprint.specs[name]
    memory = blueprint.memories[name]
    owners = axis_size(mesh, spec.vocab_axes)
    columns = mesh.shape["tensor"]
    where = "resident on device"
    if spec.offloaded:
        share = spec.num_slots / spec.num_rows
        where = f"in host memory, {share:.0%} of the rows resident on device"
    size = _mib(memory.num_keys * spec.row_bytes("rows") // spec.vectors)
    of_layers = [layer for layer in range(config.model.num_layers) if memory.reads(layer)]
    where_read = "layers " + ", ".join(map(str, of_layers)) if of_layers else "before the layers"
    if name == STEM:
        begins = [f"table        layer {layer}: " for layer in of_layers]
    else:
        of_all = f"{memory.vectors} x " if memory.vectors > 1 else ""
        begins = [f"table        {name}, {where_read}: {of_all}"]
    lines = [
        f"{begin}{memory.num_keys} x {spec.width} {size}, {where}, rows over {owners} shards, "
        f"columns over {columns}"
        for begin in begins
    ] + [
        f"             {spec.optimizer}, {spec.num_rows} rows of {spec.vectors} x {spec.width}, "
        f"{spec.num_rows // owners} a shard{_format(spec)}"
    ]
    if spec.offloaded:
        tables = config.tables
        known = "" if working_set is None else f"; batches in flight need {working_set:,}"
        lines.append(
            f"resident     {spec.num_slots:,} rows, {spec.num_slots // owners:,} a shard{known}; "
            f"look-ahead of {tables.prefetch} batches, {tables.cache_policy} cache"
        )
    return lines


def _format(spec: TableSpec) -> str:
    """How rows are kept, where it is not as usual."""
    usual = (spec.row_format, spec.moments) == ("float32", ADAMW)
    return "" if usual else f", {spec.row_format} with {spec.moments} moments"


def _batch_lines(config: Config, mesh: Mesh) -> list[str]:
    train = config.train
    devices = axis_size(mesh, BATCH_AXES)
    flops = training_flops_per_token(config, train.seq_len) * config.tokens_per_step
    context = mesh.shape[CONTEXT]
    each = f", {train.seq_len // context} of them on a device" if context > 1 else ""
    return [
        f"batch        {train.global_batch_size} sequences = {train.micro_batches} micro-batches x "
        f"{devices} device groups x {config.micro_batch_size // devices}; x {train.seq_len} "
        f"tokens{each} = {config.tokens_per_step:,} tokens per step",
        f"length       {train.steps:,} steps = {train.steps * config.tokens_per_step:,} tokens, "
        f"{flops / 1e9:,.1f} matmul GFLOP per step",
    ]


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def _mib(number: int) -> str:
    return f"{number / _MIB:,.1f} MiB"
