"""Per-layer embeddings behind the FFN of every layer, with a table of STEM half's size."""


def vary(config):
    """P = S F / N numbers a layer."""
    model = config.model
    config.per_layer.layers = "all"
    config.per_layer.width = (model.num_layers // 2) * model.ffn_dim // model.num_layers
