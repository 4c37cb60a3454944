"""What the compiler is told beyond its defaults, for runs and for plans alike."""

# By platform. Only what has been seen to help the programs of this package.
_OPTIONS = {
    # All-to-alls start and end apart, as other collectives do, so that matmuls may stand between.
    "tpu": {"xla_tpu_enable_async_all_to_all": True},
}


def compiler_options(platform: str) -> dict[str, bool]:
    """Options for `jax.jit` or `Lowered.compile` on devices of a platform: cpu, gpu or tpu."""
    return dict(_OPTIONS.get(platform, {}))
