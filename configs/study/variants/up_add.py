"""STEM half's rows added to the up projection, which stays."""


def vary(config):
    """silu(W_gate x) * (W_up x + U[t])."""
    config.model.stem_layers = "half"
    config.model.stem_site = "up_add"
