"""A control: STEM half whose rows stay as they were drawn, so that a token has a random vector."""

from configs.study.variants.stem_half import vary as with_stem


def vary(config):
    """The backbone alone trains."""
    with_stem(config)
    config.optimizer.train = "backbone"
