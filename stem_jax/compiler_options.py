"""What the compiler is told beyond its defaults, for runs and for plans alike."""

import jax

_ASYNC_ALL_TO_ALL = "xla_tpu_enable_async_all_to_all"
# By kind of device, or its maker. Only what this package's programs have been compiled with.
_OPTIONS = {
    # All-to-alls start and end apart, as other collectives do, so that matmuls may stand between.
    # On v5e that "is not supported on limited ICI": there nothing larger than 4x4 compiles with it.
    ("TPU v5", "TPU v5p"): {_ASYNC_ALL_TO_ALL: True},
    # Collectives start early and end late, as other matmuls allow: by itself in jaxlib 0.10.2, said
    # so that no version leaves it off. Pipelining of gathers over the turns of a loop hides more of
    # them, for a fifth more memory (benchmarks/RESULTS.md).
    ("NVIDIA",): {"xla_gpu_enable_latency_hiding_scheduler": True},
}


def compiler_options(device: jax.Device) -> dict[str, bool]:
    """Options for `jax.jit` or `Lowered.compile`, for programs of devices like this one."""
    kind = device.device_kind
    # "TPU v5 lite" is another than "TPU v5".
    for kinds, options in _OPTIONS.items():
        if kind in kinds or kind.partition(" ")[0] in kinds:
            return dict(options)
    return {}


def has_async_all_to_alls(device: jax.Device) -> bool:
    """Whether a TPU like this one works while all-to-alls are under way."""
    return compiler_options(device).get(_ASYNC_ALL_TO_ALL, False)
