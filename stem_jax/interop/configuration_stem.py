"""The configuration of a STEM language model for the transformers library, version 5.

It needs no PyTorch: tokenizers are opened with it, too.
"""

from transformers import PretrainedConfig

SITES = ("up", "gate", "up_add")


class StemConfig(PretrainedConfig):
    """Sizes under the names of Llama's configuration, and what Llama has not.

    stem_layers: the layers with tables. stem_site: what a row does there, see `modeling_stem`.
    memories: what a model has beside them, by name: {"value": {"layers": [0, 2]}}; each has a file.
    table_device: where the tables stay whatever `model.to` says; None: with the rest.
    """

    model_type = "stem"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012
    # Rows are whole on each device, so in layers with tables both sides of the product are, too;
    # vLLM fuses and shards the dense layers by itself.
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise_gather_output",
        "layers.*.mlp.up_proj": "colwise_gather_output",
        "layers.*.mlp.down_proj": "rowwise_split_input",
    }

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        stem_layers=(),
        stem_site="up",
        memories=None,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters=None,
        initializer_range=0.02,
        use_cache=True,
        table_device=None,
        **kwargs,
    ):
        if stem_site not in SITES:
            raise ValueError(f"stem_site={stem_site!r} is none of {', '.join(SITES)}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.stem_layers = list(stem_layers)
        self.stem_site = stem_site
        self.memories = memories or {}
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.table_device = table_device
        # Llama's modules read these.
        self.hidden_act = kwargs.pop("hidden_act", "silu")
        self.attention_bias = kwargs.pop("attention_bias", False)
        self.attention_dropout = kwargs.pop("attention_dropout", 0.0)
        self.mlp_bias = kwargs.pop("mlp_bias", False)
        super().__init__(**kwargs)


# To transformers a class of configurations says that of the model. Each has an __init__ of its own:
# else transformers makes one.


class StemValueConfig(StemConfig):
    """Of `modeling_stem_value`, which refuses values that a plan has divided."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class StemPerLayerConfig(StemConfig):
    """Of `modeling_stem_per_layer`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class StemValuePerLayerConfig(StemConfig):
    """Of `modeling_stem_value_per_layer`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
