"""A dense model of STEM half's active size: every layer a little narrower, in place of tables."""


def vary(config):
    """F' = F - S F / (3 N): each of S up projections is a third of its layer's three matrices."""
    model = config.model
    S = model.num_layers // 2
    model.ffn_dim -= round(S * model.ffn_dim / (3 * model.num_layers))
