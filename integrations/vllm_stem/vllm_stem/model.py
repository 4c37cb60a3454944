"""Llama as vLLM runs it, with feed-forward layers that read rows of a table by token id.

Weights are those of `python -m stem_jax.export --format=hf`. Under tensor parallelism a device has
some columns of each table, those that its part of the gate gives; `--cpu-offload-params=up_table`
with `--cpu-offload-gb` keeps tables in pinned host memory, from which devices read rows.
"""

import torch
from torch import nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index
from vllm.sequence import IntermediateTensors


class StemTable(nn.Module):
    """Rows [V, F] by token id, of which this device has F / tensor-parallel size columns."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        devices = get_tensor_model_parallel_world_size()
        if width % devices:
            raise ValueError(
                f"tensor_parallel_size={devices} does not divide intermediate_size={width}; choose "
                "one that does"
            )
        self.weight = nn.Parameter(torch.empty(vocab_size, width // devices), requires_grad=False)
        self.weight.weight_loader = self._load

    def forward(self, ids_N: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids_N, self.weight)

    @staticmethod
    def _load(weight: nn.Parameter, loaded_VxF: torch.Tensor) -> None:
        width = weight.shape[1]
        own = loaded_VxF.narrow(1, get_tensor_model_parallel_rank() * width, width)
        weight.data.copy_(own)


class StemMLP(nn.Module):
    """The feed-forward layer in which a row takes part, as `config.stem_site` says."""

    def __init__(self, config, quant_config, prefix: str):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        # With --trust-remote-code the configuration is the export's own, which may be older.
        self.site = getattr(config, "stem_site", "up")
        options = {"bias": False, "quant_config": quant_config}
        if self.site != "gate":
            self.gate_proj = ColumnParallelLinear(D, width, prefix=f"{prefix}.gate_proj", **options)
        if self.site != "up":
            self.up_proj = ColumnParallelLinear(D, width, prefix=f"{prefix}.up_proj", **options)
        self.down_proj = RowParallelLinear(width, D, prefix=f"{prefix}.down_proj", **options)
        self.up_table = StemTable(config.vocab_size, width)

    def forward(self, x_NxD: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
        rows_NxF = self.up_table(ids_N)
        gate_NxF = rows_NxF if self.site == "gate" else self.gate_proj(x_NxD)[0]
        up_NxF = rows_NxF if self.site == "up" else self.up_proj(x_NxD)[0]
        if self.site == "up_add":
            up_NxF = up_NxF + rows_NxF
        return self.down_proj(F.silu(gate_NxF) * up_NxF)[0]


class StemDecoderLayer(LlamaDecoderLayer):
    """Llama's layer, which hands the token ids to a feed-forward part that reads rows."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config, prefix)
        config = vllm_config.model_config.hf_config
        self.reads = extract_layer_index(prefix) in config.stem_layers
        if self.reads:
            self.mlp = StemMLP(config, self.get_quant_config(vllm_config), f"{prefix}.mlp")

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        token_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        ids = (token_ids,) if self.reads else ()
        return self.mlp(hidden_states, *ids), residual


@support_torch_compile
class StemModel(LlamaModel):
    """The decoder without its head."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layer_type: type[nn.Module] = StemDecoderLayer,
    ):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        # Gate and up projection are one matrix in dense layers, and in these alone.
        stacked = dict(LlamaModel.hf_to_vllm_mapper.orig_to_new_stacked)
        halves = {name: stacked.pop(name) for name in (".gate_proj", ".up_proj")}
        for layer in set(range(self.config.num_hidden_layers)) - set(self.config.stem_layers):
            for name, (both, half) in halves.items():
                mlp = f"layers.{layer}.mlp"
                stacked[f"{mlp}{name}"] = f"{mlp}{both}", half
        self.hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=stacked)

    # `support_torch_compile` reads from these types which arguments have as many rows as tokens.
    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, token_ids=input_ids
        )


class StemForCausalLM(LlamaForCausalLM):
    """The decoder with its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        _check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=StemDecoderLayer)

    def _init_model(self, vllm_config, prefix="", layer_type=StemDecoderLayer):
        return StemModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


def _check(vllm_config: VllmConfig) -> None:
    if memories := getattr(vllm_config.model_config.hf_config, "memories", None):
        raise ValueError(
            f"config.json has the memories {', '.join(memories)}, which vllm_stem does not know; "
            "take vLLM's Transformers backend (--model-impl=transformers --trust-remote-code), or "
            "serve the run by stem_jax.serve"
        )
    if vllm_config.model_config.enable_prompt_embeds:
        raise ValueError(
            "--enable-prompt-embeds cannot be had with a STEM model: its layers look rows up by "
            "token id, which embeddings have none of; leave it out"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "--pipeline-parallel-size cannot be more than 1 with a STEM model: the token ids do "
            "not reach the later parts; use --tensor-parallel-size"
        )
