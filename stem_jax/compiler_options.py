"""What the compiler is told beyond its defaults, for runs and for plans alike."""

import jax

# By kind of device. Only what this package's programs have been compiled with.
_OPTIONS = {
    # All-to-alls start and end apart, as other collectives do, so that matmuls may stand between.
    # On v5e that "is not supported on limited ICI": there nothing larger than 4x4 compiles with it.
    "TPU v5": {"xla_tpu_enable_async_all_to_all": True},
}


def compiler_options(device: jax.Device) -> dict[str, bool]:
    """Options for `jax.jit` or `Lowered.compile`, for programs of devices like this one."""
    return dict(_OPTIONS.get(device.device_kind.removesuffix("p"), {}))
