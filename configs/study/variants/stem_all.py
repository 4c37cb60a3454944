"""STEM in all layers: rows of the token in place of up projections."""


def vary(config):
    """As published: rows have the backbone's rate and weight decay."""
    config.model.stem_layers = "all"
