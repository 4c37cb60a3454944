"""How hard XLA works on the programs that tests compile, and on those of processes they start."""

import os

import jax
from jax._src import compiler

# Neither the emitters that go through MLIR, nor a program in parts that are compiled side by side.
_LITTLE = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
_LITTLE_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in _LITTLE.items())
_options = compiler.get_compile_options
# XLA reads its flags once, before a first program: later ones are those of started processes.
_flags = os.environ.get("XLA_FLAGS", "")


def _options_of_effort(*args, env_options_overrides=None, **kwargs):
    """A CPU program of little effort costs half, and a tenth less in one part.

    Through a private name of JAX, which has no setting for it: flags hold for a whole process.
    """
    if jax.config.values["jax_disable_most_optimizations"]:
        env_options_overrides = _LITTLE | dict(env_options_overrides or {})
    return _options(*args, env_options_overrides=env_options_overrides, **kwargs)


def set_effort(little: bool) -> None:
    """Programs from here on are compiled with little effort, or as users' programs are."""
    if compiler.get_compile_options is _options:
        jax.devices()
        compiler.get_compile_options = _options_of_effort
    if little != jax.config.values["jax_disable_most_optimizations"]:
        # JAX takes a program that it has for one of the other effort.
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", little)
    # Programs that tests start.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(little))
    os.environ["XLA_FLAGS"] = f"{_flags} {_LITTLE_FLAGS}" if little else _flags


def flags(devices: int = 1) -> str:
    """XLA_FLAGS of a program that a test starts: so many CPU devices, and the test's effort."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
