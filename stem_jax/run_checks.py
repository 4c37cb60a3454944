"""What must hold before step 0: refusals that belong to a start, not to a configuration.

A checkpoint's configuration is validated whenever it is read (`config_checks`), so what is refused
there can never be read again. What only a training cannot do is refused here.
"""

import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jaxlib
from jax.sharding import Mesh

from stem_jax.config import MEMORY_SECTIONS, Config, ModelConfig
from stem_jax.errors import InputError
from stem_jax.kernels.float8 import check_float8
from stem_jax.memory.catalogue import table_specs, with_eos
from stem_jax.mesh import BATCH_AXES, axis_size, check_context
from stem_jax.model.attention import check_heads, resolve_backend
from stem_jax.model.lora import adapter_weights
from stem_jax.processes.agreement import exchange
from stem_jax.tables.coast_groups import MOST_TERMS, num_terms
from stem_jax.tables.disk_space import check_disk
from stem_jax.tables.disk_store import DiskStore
from stem_jax.tables.host_memory import available_host_bytes, check_host_memory
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.row_slots import too_few_slots
from stem_jax.tables.spec import ADAMW, TableSpec, check_host_rows
from stem_jax.training.run_data import RunData
from stem_jax.training.schedule import ENDING, schedule_length
from stem_jax.training.step import TrainStep
from stem_jax.training.working_set import most_rows, working_set

# The first version of jaxlib whose programs for GPUs bring back what scanned layers had offloaded.
_RIGHT_OFFLOAD = (0, 11, 2)
_GIB = 2**30


def check_first_start(config: Config) -> None:
    """Checks of a run that has made no update yet; a run under way goes on as it began.

    Raises:
        InputError: nothing to train, a schedule whose rates jump, or betas with which rows coast
            for too long.
    """
    has_memories = config.model.stem_layers or any(
        getattr(config, section).layers for section in MEMORY_SECTIONS
    )
    if not config.optimizer.trains_backbone and not has_memories:
        raise InputError(
            f"optimizer.train={config.optimizer.train} trains nothing: with model.stem_layers=none "
            "and no other memory there are no tables; set it to all, or choose STEM layers"
        )
    if config.lora.rank and not config.origins:
        raise InputError(
            f"lora.rank={config.lora.rank} keeps the backbone as it begins, which would be random; "
            "give the run that it begins with by train.init_from, or set lora.rank=0"
        )
    if config.lora.rank and not adapter_weights(config):
        raise InputError(
            f"lora.targets={','.join(config.lora.targets)}: no layer has one of them (STEM layers "
            "have no up_proj, those with rows for the gate no gate_proj), so no adapter would "
            "train; name others"
        )
    _check_schedule(config)
    # Of sizes and rates: which token ends n-grams is not known yet.
    for name, spec in table_specs(with_eos(config, 0)).items():
        coasts = (spec.optimizer, spec.moments) == ("deferred_adamw", ADAMW)
        if coasts and (terms := num_terms(spec.beta1, spec.beta2)) > MOST_TERMS:
            raise InputError(
                f"beta1={spec.beta1} is so close to the square root of beta2={spec.beta2} that a "
                f"row of {name} coasts for {terms:,} updates, of which tables.optimizer="
                f"deferred_adamw can make up for {MOST_TERMS:,}; choose other betas (optimizer's, "
                "or the memory's own), or tables.optimizer=dense_adamw"
            )


def _check_schedule(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.schedule == "inv_sqrt" and not optimizer.warmup_steps:
        raise InputError(
            "optimizer.warmup_steps=0 with optimizer.schedule=inv_sqrt: the rate is the peak times "
            "(warmup_steps / step)^inv_sqrt_exponent, which is its minimum from the second update "
            "on; set optimizer.warmup_steps to 1 or more, or optimizer.schedule=constant"
        )
    if optimizer.min_lr_ratio > 1:
        raise InputError(
            f"optimizer.min_lr_ratio={optimizer.min_lr_ratio} is more than the peak that it is a "
            "share of; set it to 1 or less"
        )
    end, steps = schedule_length(config), config.train.steps
    if optimizer.schedule in ENDING and optimizer.warmup_steps >= end and end < steps:
        raise InputError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is no less than "
            f"optimizer.schedule_steps={end}, and train.steps={steps} goes on from there at the "
            "minimum: the peak is never reached; set optimizer.schedule_steps to more, or "
            "optimizer.warmup_steps to less"
        )


def check_mesh(config: Config, mesh: Mesh, under_way: bool = False) -> None:
    """Checks of a configuration against the devices that it is to train on.

    Args:
        under_way: the run has made updates; with plain products, which can cut heads, it goes on
            as it began.

    Raises:
        InputError: sizes that do not divide over the mesh, or that the attention kernel refuses; a
            rematerialisation that the compiler gets wrong.
    """
    _check_offload(config, mesh)
    check_float8(config.model.matmul_dtype, mesh.devices.flat[0])
    backend = resolve_backend(config.model, mesh, config.train.seq_len)
    if not (under_way and backend in ("xla", "chunked")) or _shares_cut_heads(config.model, mesh):
        check_heads(config.model, mesh)
    check_context(config.train.seq_len, mesh)
    check_host_rows(table_specs(with_eos(config, 0)).values(), mesh)
    devices = axis_size(mesh, BATCH_AXES)
    if config.micro_batch_size % devices:
        raise InputError(
            f"train.global_batch_size={config.train.global_batch_size} in train.micro_batches="
            f"{config.train.micro_batches} gives {config.micro_batch_size} sequences, which do not "
            f"divide over the {devices} devices of mesh axes {', '.join(BATCH_AXES)}; change one "
            "of them"
        )


def _shares_cut_heads(model: ModelConfig, mesh: Mesh) -> bool:
    """Whether queries would be dealt out to devices that share a KV head, and do not divide."""
    tensor = mesh.shape["tensor"]
    return tensor % model.num_kv_heads == 0 and model.num_heads % tensor != 0


def _check_offload(config: Config, mesh: Mesh) -> None:
    """Refuses what older compilers for GPUs silently get wrong (openxla/xla#46231, #46308).

    The backward pass of scanned layers read what is in host memory from the first layer on.
    """
    model, platform = config.model, mesh.devices.flat[0].platform
    if model.remat != "offload" or not model.scan_layers or platform != "gpu":
        return
    if tuple(map(int, re.findall(r"\d+", jaxlib.__version__)[:3])) < _RIGHT_OFFLOAD:
        right = ".".join(map(str, _RIGHT_OFFLOAD))
        raise InputError(
            "model.remat=offload with model.scan_layers=True: jaxlib "
            f"{jaxlib.__version__} computes wrong gradients of that on GPUs; install {right} or "
            "newer, set model.scan_layers to False, or model.remat to attention"
        )


def check_documents(config: Config, mesh: Mesh, data: RunData) -> None:
    """Checks the rows that a training reads against what its attention kernel knows of documents.

    Raises:
        InputError: the kernel attends over whole rows, and one holds several documents.
    """
    length = config.train.seq_len
    if resolve_backend(config.model, mesh, length) != "cudnn":
        return
    held_out = () if data.held_out is None else data.held_out.rows
    for rows in (*data.batches.rows, *held_out):
        row, name = rows.packed_row(), rows.store.meta.name
        if row is not None:
            raise InputError(
                f"model.attention=cudnn attends over whole rows, and row {row} of {length} tokens "
                f"(train.seq_len) of {name!r} (data.sources) holds several documents; "
                "set model.attention to auto, or train on rows of one document each"
            )


def check_tables(config: Config, programs: TrainStep, data: RunData, start: int) -> dict[str, int]:
    """Rows of offloaded tables that the batches in flight need, as far as it is known before.

    Raises:
        InputError: a batch does not fit into the slots, or tables not into the hosts' memory.
    """
    reads, mesh = programs.reads, programs.mesh
    offloaded = {name: reads.specs[name] for name in reads.offloaded}
    # Rows on devices lie in the same memory.
    on_host = mesh.devices.flat[0].platform == "cpu"
    if not offloaded and not (on_host and reads.specs):
        return {}

    def own_part() -> bytes:
        needed = []
        for name, spec in offloaded.items():
            owners = axis_size(mesh, spec.vocab_axes)
            found = working_set(config, reads.memories[name], spec, owners, data, start)
            needed.append((found.batch, found.in_flight))
        store_bytes = sum(
            HostStore.peak_bytes(spec, mesh, most_rows(config, reads.memories[name], spec))
            for name, spec in offloaded.items()
        )
        _check_disk(config, programs, {n: spec for n, spec in offloaded.items() if spec.on_disk})
        memory = (socket.gethostname(), store_bytes, available_host_bytes())
        return json.dumps([needed, memory, device_table_bytes(mesh, reads.specs)]).encode()

    # Each process has seen its memory and its share of the data; all come to one verdict.
    parts = [json.loads(part) for part in exchange(own_part)]
    check_hosts([tuple(memory) for _, memory, _ in parts], list(offloaded.values()))
    if on_host:
        check_device_tables(
            [(host, store + own, available) for _, (host, store, available), own in parts],
            reads.specs,
        )
    in_flight = {}
    for place, (name, spec) in enumerate(offloaded.items()):
        batch, in_flight[name] = (max(part[0][place][n] for part in parts) for n in (0, 1))
        if batch > spec.num_slots:
            raise InputError(too_few_slots(spec, batch))
    return in_flight


def _check_disk(config: Config, programs: TrainStep, specs: dict[str, TableSpec]) -> None:
    """Refuses rows on disk for which this process's has no room, at least when all are written."""
    if not specs or config.tables.disk is None:
        return
    # The newest checkpoints, the best, and the one that is being written.
    saves = config.checkpoint.keep + (config.eval.every > 0) + 1
    needed = taken = 0
    for name, spec in specs.items():
        rows = most_rows(config, programs.reads.memories[name], spec)
        needed += DiskStore.disk_bytes_needed(spec, programs.mesh, rows, saves)
        taken += DiskStore.disk_bytes_taken(spec, programs.mesh)
    check_disk(Path(config.tables.disk), needed, taken)


def device_table_bytes(mesh: Mesh, specs: Mapping[str, TableSpec]) -> int:
    """Bytes of what tables keep on the devices of this process."""
    arrays = [array for spec in specs.values() for array in spec.placed()]
    return len(mesh.local_devices) * sum(array.device_bytes(mesh) for array in arrays)


def check_device_tables(
    parts: list[tuple[str, int, int | None]], specs: Mapping[str, TableSpec]
) -> None:
    """Checks tables of CPU devices, whose rows are in host memory wherever they are.

    Args:
        parts: see `check_hosts`; of the tables all that is kept of them.

    Raises:
        InputError: names the host, both figures and the keys that make tables large.
    """
    sizes = ", ".join(dict.fromkeys(key for spec in specs.values() for key in spec.size_keys))
    for where, needed, available in _by_host(parts):
        if available is not None and needed > available:
            raise InputError(
                f"devices are CPUs here, and the tables of {', '.join(specs)} with their moments "
                f"are {needed / _GIB:.2f} GiB on {where}, {available / _GIB:.2f} GiB are "
                f"available; give the host or its container more memory, use more hosts, or lower "
                f"{sizes}"
            )


def check_hosts(parts: list[tuple[str, int, int | None]], specs: Sequence[TableSpec] = ()) -> None:
    """Checks what the tables need of each host, over all of its processes.

    Args:
        parts: of each process: its host, the bytes of its tables, and those that are available on
            the host; None if unknown.
        specs: of the tables.

    Raises:
        InputError: names the host and both figures.
    """
    for where, needed, available in _by_host(parts):
        check_host_memory(needed, available, where, specs)


def _by_host(parts: list[tuple[str, int, int | None]]) -> Iterator[tuple[str, int, int | None]]:
    """Of each host: what refusals call it, and both figures over its processes."""
    for host in dict.fromkeys(host for host, _, _ in parts):
        own = [(needed, available) for name, needed, available in parts if name == host]
        known = [available for _, available in own if available is not None]
        where = f"host {host}" if len(own) == 1 else f"host {host} for its {len(own)} processes"
        yield where, sum(needed for needed, _ in own), min(known, default=None)
