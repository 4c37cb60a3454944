"""The backbone: a pre-norm decoder whose gated FFNs take up values from a projection or rows."""
