"""What a block calls the results that rematerialisation may keep for the backward pass."""

from jax.ad_checkpoint import checkpoint_name

# Outputs of matmuls with weights; results of attention, from which no kernel need run again.
PROJECTION, ATTENTION = "projection", "attention"


def projection(x):
    """The same, named so."""
    return checkpoint_name(x, PROJECTION)


def attention(x):
    """The same, named so."""
    return checkpoint_name(x, ATTENTION)
