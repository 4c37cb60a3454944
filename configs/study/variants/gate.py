"""STEM half's rows in place of the gate projection, not of the up projection."""


def vary(config):
    """silu(U[t]) * W_up x."""
    config.model.stem_layers = "half"
    config.model.stem_site = "gate"
