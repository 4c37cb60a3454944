"""Export for the transformers library: a folder that `AutoModelForCausalLM` loads.

A dense model becomes a plain `LlamaForCausalLM`; one with tables brings `modeling_stem.py` along,
with its configuration, and a file for each memory beside STEM's. Weights go from the checkpoint
into safetensors files piece by piece.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from stem_jax.checkpoints.files import check_outside
from stem_jax.checkpoints.saved_model import SavedModel
from stem_jax.config import Config, ModelConfig
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.files import new_folder
from stem_jax.interop import model_card
from stem_jax.interop.llama_names import llama_shapes, llama_weights, table_names
from stem_jax.interop.memory_names import (
    CODES,
    Code,
    memories_of,
    memory_shapes,
    memory_tables,
    memory_weights,
)
from stem_jax.interop.safetensors_files import BFLOAT16, SafetensorsWriter
from stem_jax.interop.said_keys import check_format
from stem_jax.interop.tokenizer_export import padding_id, write_tokenizer
from stem_jax.memory.memory import STEM

# Of every model with tables.
CODE_FILES = ("configuration_stem.py", "modeling_stem.py", "stem_attention.py", "stem_tables.py")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}
# Of a model's generation configuration; they speak of its code, or of lengths that we set.
_NOT_CARRIED = {"transformers_version", "_from_model_config", "cache_implementation", "max_length"}
# Constants of `model.rotary`: in turns within the trained context.
_ROPE = {
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0},
}


def export_hf(
    saved: SavedModel,
    out: str | Path,
    *,
    dtype: str = "float32",
    file_bytes: int = 4 * 2**30,
    with_tokenizer: bool = True,
    licence: str | None = None,
) -> None:
    """Writes weights, configuration, generation configuration, tokenizer, code and model card.

    Args:
        saved: the model.
        out: a folder that does not exist.
        dtype: of the weights, float32 or bfloat16.
        file_bytes: a weights file is no larger, unless one tensor is.
        with_tokenizer: export the tokenizer, after a check that its ids are the same.
        licence: identifier for the model card; None: the card says that there is none.

    Raises:
        InputError: the folder exists or does not fit onto the disk, the model has a shape that
            Llama has not, or the tokenizer would give other ids.
    """
    out = Path(out)
    config = hf_config(saved.config, saved.tokenizer, dtype)
    model_card.check_licence(licence)
    card = model_card.model_card(saved.config, saved.info.step, licence)
    check_outside(out, "--out")
    with new_folder(out, "--out") as folder:
        if with_tokenizer:
            write_tokenizer(saved.tokenizer, folder, saved.config.train.seq_len)
        _write_json(folder / "config.json", config)
        generation = generation_config(saved.config, saved.tokenizer)
        _write_json(folder / "generation_config.json", generation)
        (folder / model_card.NAME).write_text(card)
        memories = memories_of(saved.config)
        if saved.model.stem_layers or memories:
            for name in {*CODE_FILES, *CODES[*memories].files}:
                shutil.copyfile(Path(__file__).with_name(name), folder / name)
        shapes = llama_shapes(saved.model) | memory_shapes(saved.model, memories)
        weights = *llama_weights(saved.model), *memory_weights(saved.model, memories)
        tables: dict[str, Collection[str]] = {**memory_tables(saved.model, memories)}
        if saved.model.stem_layers:
            tables[STEM] = table_names(saved.model)
        with SafetensorsWriter(folder, shapes, DTYPES[dtype], file_bytes) as writer:
            for weight in weights:
                writer.write(weight.theirs, weight.exchanged(saved.param(weight.ours)))
            for memory, names in tables.items():
                for ids, columns, rows_nxSxC in saved.table_pieces(memory):
                    for index, name in enumerate(names):
                        writer.write_rows(name, ids, columns, rows_nxSxC[:, index])


def hf_config(config: Config, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        InputError: a shape that Llama has not, or a key that `said_keys` does not list.
    """
    model = config.model
    check_format(config, "hf")
    memories = memories_of(config)
    has_tables = model.stem_layers or memories
    if not has_tables and model.embed_dim % model.num_heads:
        raise InputError(
            f"model.embed_dim={model.embed_dim} does not divide by model.num_heads="
            f"{model.num_heads}, which LlamaForCausalLM asks for; use --format=official"
        )
    kind: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
    }
    if has_tables:
        code = CODES[*memories]
        kind = {
            "architectures": [f"Stem{code.kind}ForCausalLM"],
            "model_type": "stem",
            "auto_map": auto_map(code),
            "stem_layers": list(model.stem_layers),
            "stem_site": model.stem_site,
            **({"memories": memories} if memories else {}),
        }
    return {
        **kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": config.train.seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": _rope_parameters(model),
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": tokenizer.special.bos_id,
        "eos_token_id": tokenizer.special.eos_id,
        "use_cache": True,
        "dtype": dtype,
    }


def auto_map(code: Code) -> dict[str, str]:
    """Where transformers finds the classes of a model."""
    return {
        "AutoConfig": f"configuration_stem.Stem{code.kind}Config",
        "AutoModel": f"{code.name}.Stem{code.kind}Model",
        "AutoModelForCausalLM": f"{code.name}.Stem{code.kind}ForCausalLM",
    }


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    if model.rope_scaling == "none":
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    return {
        "rope_type": model.rope_scaling,
        "rope_theta": model.rope_theta,
        "factor": model.rope_factor,
        "original_max_position_embeddings": model.rope_original_len,
        **_ROPE[model.rope_scaling],
    }


def generation_config(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the tokenizer came with, ends at the context, and no ids that stand for nothing."""
    special = tokenizer.special
    values = {k: v for k, v in tokenizer.generation_config.items() if k not in _NOT_CARRIED}
    stops = [special.eos_id, *(stop for stop in special.stop_ids if stop != special.eos_id)]
    values |= {
        "bos_token_id": special.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": _fill_id(tokenizer),
    }
    if values.get("max_new_tokens") is None:
        # Of prompt and completion; without it a pipeline asks for 256 more in any context.
        values["max_length"] = config.train.seq_len
    found = values.get("suppress_tokens")
    absent = {*(found if isinstance(found, list) else ())}
    absent.update(tokenizer.absent_ids(config.model.vocab_size))
    return {**values, "suppress_tokens": sorted(absent)} if absent else values


def _fill_id(tokenizer: Tokenizer) -> int:
    """What `generate` fills ended sequences with, and takes for padding where no mask is given.

    That may be nothing that begins a prompt, and would be masked.
    """
    padding = padding_id(tokenizer)
    begins = padding in (tokenizer.special.bos_id, *tokenizer.special.begin_ids)
    return tokenizer.special.eos_id if padding is None or begins else padding


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
