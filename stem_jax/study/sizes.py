"""How large a variant is, and what a token costs it in training."""

from stem_jax.analysis.flop_check import step_flops
from stem_jax.config import Config
from stem_jax.memory.catalogue import with_eos
from stem_jax.model.cost import count_parameters, training_flops_per_token

# Sizes are the same whichever token ends n-grams.
_ANY_EOS = 0


def size_of(config: Config) -> dict[str, int]:
    """Numbers of parameters, and FLOPs of a token.

    Returns:
        parameters: all that are trained. active_parameters: of the backbone those that a token
        uses. table_parameters: rows. flops_per_token: matmuls of training by formula, forward and
        backward, attention over whole sequences; lookups are none.
    """
    config = with_eos(config, _ANY_EOS)
    count = count_parameters(config)
    return {
        "parameters": count.total,
        "active_parameters": count.active,
        "table_parameters": count.table,
        "flops_per_token": training_flops_per_token(config, config.train.seq_len),
    }


def compiled_flops(config: Config) -> float | None:
    """FLOPs of a token in the train step as the compiler of this machine counts them.

    They include optimizers, also of the rows that a batch is expected to have. None with hash
    layers, whose loops over blocks of rows the compiler counts once.
    """
    if config.model.hash_moe_layers:
        return None
    return step_flops(with_eos(config, _ANY_EOS)) / config.tokens_per_step
