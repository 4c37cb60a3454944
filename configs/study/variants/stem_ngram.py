"""STEM half and the hashed n-grams together: both tables, so twice their size."""

from configs.study.variants.ngram import vary as with_ngram
from configs.study.variants.stem_half import vary as with_stem


def vary(config):
    """As each alone."""
    with_stem(config)
    with_ngram(config)
