"""The projections that an adapter may stand beside."""

# What LoRA's adapters may stand beside, by PEFT's names, and the part of a block that has it.
LORA_TARGETS = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "attention",
    "gate_proj": "ffn",
    "up_proj": "ffn",
    "down_proj": "ffn",
}
