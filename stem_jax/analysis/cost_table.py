"""What a model costs a token, by how many of its layers read rows."""

import dataclasses
from typing import Any

from stem_jax.analysis.flop_check import PROGRAMS, FlopCheck, cache_slots, check_flops
from stem_jax.analysis.flop_check import checked_config as cut
from stem_jax.config import Config
from stem_jax.layer_patterns import layer_indices
from stem_jax.model.cost import (
    count_parameters,
    decode_reads,
    generation_flops,
    training_flops_per_token,
)
from stem_jax.model.layer_plan import layer_kinds, with_layers

PATTERNS = ("none", "third", "half", "all_but_first", "all")


def cost_table(config: Config) -> list[dict[str, Any]]:
    """The model's cost with other STEM layers, of which none is of another kind, and with its own.

    Returns:
        A record for each of PATTERNS, and a last one, `own`, for the layers that the model has.
        FLOPs are those of matmuls: `training_flops` a trained token at the context,
        `prefill_flops` a token of a prompt that fills the context (the head sees the last alone),
        `decode_flops` a token whose cache is as long. `read_parameters` and `read_bytes`: what
        decoding it reads, the latter with `cache_bytes`. `active` and `table`: parameters.
    """
    own = _record(config, "own")
    return [*(_record(_with_stem_layers(config, name), name) for name in PATTERNS), own]


def check_cost(config: Config) -> list[FlopCheck]:
    """The formulas beside the compiler's counts, for the dense model and the one with tables.

    A dense model is checked with a table in every third layer beside it. See `checked_config`.
    """
    checked = cut(config)
    stem = checked.model.stem_layers or "third"
    return [
        check
        for layers in ("none", stem)
        for check in check_flops(_with_stem_layers(checked, layers), PROGRAMS)
    ]


def _with_stem_layers(config: Config, stem_layers: str | tuple[int, ...]) -> Config:
    layers = layer_indices("model.stem_layers", stem_layers, config.model.num_layers)
    kinds = ["dense" if kind == "stem" else kind for kind in layer_kinds(config.model)]
    for layer in layers:
        kinds[layer] = "stem"
    return dataclasses.replace(config, model=with_layers(config.model, kinds))


def _record(config: Config, name: str) -> dict[str, Any]:
    model, context, slots = config.model, config.train.seq_len, cache_slots(config)
    count, reads = count_parameters(config), decode_reads(config, slots)
    prefill = generation_flops(config, context, context).matmul
    cacheless = decode_reads(config, 0).bytes
    return {
        "pattern": name,
        "stem_layers": list(model.stem_layers),
        "active": count.active,
        "table": count.table,
        "training_flops": training_flops_per_token(config, context),
        "prefill_flops": prefill / context,
        "decode_flops": generation_flops(config, 1, slots).matmul,
        "read_parameters": reads.backbone + reads.row,
        "read_bytes": reads.bytes,
        "cache_bytes": reads.bytes - cacheless,
    }
