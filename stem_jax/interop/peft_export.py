"""Export of LoRA's adapters in PEFT's format, for the export of the run that they began with.

`peft.PeftModel.from_pretrained(model, folder)` puts them into the base, as `--format=hf` exports
it. Our factors are [in, rank] and [rank, out], PEFT's linear weights [rank, in] and [out, rank].
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from stem_jax.checkpoints.files import check_outside
from stem_jax.checkpoints.saved_model import SavedModel
from stem_jax.errors import InputError
from stem_jax.files import new_folder
from stem_jax.interop.llama_names import llama_weights
from stem_jax.interop.memory_names import memories_of
from stem_jax.interop.said_keys import check_format
from stem_jax.lora_targets import LORA_TARGETS
from stem_jax.memory.per_layer import PER_LAYER
from stem_jax.model.lora import factors

_PREFIX = "base_model.model."
# What transformers calls the parts of a block.
_MODULES = {"attention": "self_attn", "ffn": "mlp"}


def export_peft(saved: SavedModel, out: str | Path, *, base: str | None = None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, float32.

    Args:
        saved: the run with adapters.
        out: a folder that does not exist.
        base: what the configuration calls the base model, a folder or a name; None: nothing.

    Raises:
        InputError: a run without adapters, or whose tables trained, too; a model that no export
            has; the folder exists or cannot be written.
    """
    lora = saved.config.lora
    if not lora.rank:
        raise InputError(
            f"{saved.folder} was trained with lora.rank=0 and has no adapters; use --format=hf"
        )
    has_rows = saved.model.stem_layers or memories_of(saved.config)
    if saved.config.optimizer.trains_tables and has_rows:
        raise InputError(
            f"{saved.folder} was trained with optimizer.train={saved.config.optimizer.train}: its "
            "tables moved, too, and PEFT's format has adapters of projections alone; use "
            "--format=hf, or train with optimizer.train=backbone"
        )
    check_format(saved.config, "hf")
    check_outside(out, "--out")
    names = {weight.ours: weight.theirs for weight in llama_weights(saved.model)}
    tensors: dict[str, np.ndarray] = {}
    for projection in saved.adapters:
        theirs = names[f"{projection}.kernel"].removesuffix(".weight")
        for letter, factor in zip("AB", factors(projection), strict=True):
            value = np.ascontiguousarray(saved.trained_param(factor).T)
            tensors[f"{_PREFIX}{theirs}.lora_{letter}.weight"] = value
    present = {projection.rpartition(".")[2] for projection in saved.adapters}
    targets = [target for target in lora.targets if target in present]
    if PER_LAYER in memories_of(saved.config):
        # It has a gate_proj of its own. Bare names are what most readers expect.
        targets = [f"{_MODULES[LORA_TARGETS[target]]}.{target}" for target in targets]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with new_folder(Path(out), "--out") as folder:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        content = safetensors.numpy.save(tensors, {"format": "pt"})
        (folder / "adapter_model.safetensors").write_bytes(content)
