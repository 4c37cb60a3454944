"""Value embeddings in every other layer: the token's row is added to attention's values."""


def vary(config):
    """As in nanochat, every other layer with the last of an even number, and its rates for rows.

    Rows are as wide as the values: F / D times smaller tables than STEM half's with as many KV
    heads as heads.
    """
    config.value.layers = "half"
    config.value.lr_multiplier = 0.5
    config.value.weight_decay = 0.01
    config.value.beta1 = 0.8
    config.value.beta2 = 0.995
