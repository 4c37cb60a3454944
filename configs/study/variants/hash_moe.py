"""Hash layers in STEM half's layers: the token chooses one of several FFNs."""


def vary(config):
    """As many FFNs as bring the total parameters nearest to STEM half's.

    A STEM layer has (V - D) F numbers more than a dense one, an FFN has 3 D F.
    """
    model = config.model
    model.hash_moe_layers = "half"
    model.hash_moe_experts = 1 + round((model.vocab_size - model.embed_dim) / (3 * model.embed_dim))
