"""STEM models for vLLM, which finds `register` by its entry point `vllm.general_plugins`."""


def register() -> None:
    """Makes the model and its configuration known, in each process that vLLM starts."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vllm_stem.configuration_stem import StemConfig

    AutoConfig.register("stem", StemConfig, exist_ok=True)
    # By name: a module that is imported here would begin with CUDA before vLLM forks.
    # Models with more memories come here to be refused by name.
    for kind in ("", "Value", "PerLayer", "ValuePerLayer"):
        ModelRegistry.register_model(f"Stem{kind}ForCausalLM", "vllm_stem.model:StemForCausalLM")
