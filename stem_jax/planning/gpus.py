"""GPUs to compile for on a machine without one, as openxla/xla describes them."""

import contextlib
import importlib.metadata
import os
from pathlib import Path

import jax
from jax.experimental import topologies

from stem_jax.cuda_plugin import show_cuda_plugin
from stem_jax.errors import InputError

# name, compute capability, multiprocessors, bytes of memory and of them per second, of the L2
# cache, clock: openxla/xla, xla/backends/gpu/target_config/specs/{h100_sxm,h200,b200}.txtpb.
_FACTS = {
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 84942979072, 3352320000000, 52428800, 1.98),
    "h200": ("NVIDIA H200 141GB HBM3e", 9, 132, 151397597184, 4800000000000, 52428800, 1.98),
    "b200": ("NVIDIA B200", 10, 148, 191514411008, 7672320000000, 132644864, 1.965),
}
KINDS = tuple(_FACTS)
# A stream_executor.GpuTargetConfigProto. Newer fields of those files are unknown to older JAX;
# with the version of a library for sorts every sort would want that library.
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  fpus_per_core: 128 core_count: {cores} clock_rate_ghz: {clock} l2_cache_size: {cache}
  device_memory_size: {memory} memory_bandwidth: {bandwidth} device_address_bits: 64
  cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
# What cuDNN's wheel would be installed for: its version, as in dnn_version.
_CUDNN = 91000
OPTIONS = {"xla_gpu_enable_cub_radix_sort": False}
INSTALL_CUDA = f'pip install "jax[cuda12-local]=={jax.__version__}" nvidia-cuda-nvcc-cu12'


def gpu_devices(kind: str, gpus: int, hosts: int) -> list[jax.Device]:
    """Descriptions of `gpus` on each of `hosts`, whose `process_index` is their host's number.

    Raises:
        InputError: the CUDA plugin, or what it compiles with, is missing.
    """
    show_cuda_plugin()
    if reason := missing():
        raise InputError(
            f"--topology={kind}:{gpus} needs {reason}, to compile for GPUs on any Linux machine; "
            f"install it with: {INSTALL_CUDA}"
        )
    name, major, cores, memory, bandwidth, cache, clock = _FACTS[kind]
    text = _DESCRIPTION.format(
        name=name,
        major=major,
        cores=cores,
        memory=memory,
        bandwidth=bandwidth,
        cache=cache,
        clock=clock,
    )
    # Partitions of hosts of GPUs.
    shape = f"1x{hosts}x{gpus}"
    return topologies.get_topology_desc(platform="cuda", target_config=text, topology=shape).devices


def missing() -> str | None:
    """What a machine lacks to compile for GPUs; None if nothing."""
    if not _installed("jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        return "JAX's CUDA plugin"
    toolkit = Path(os.environ.get("CUDA_ROOT", "/usr/local/cuda"))
    if not _installed("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc") and not toolkit.exists():
        return "CUDA's nvcc"
    return None


def _installed(*packages: str) -> bool:
    """Whether one of them is."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(package)
            return True
    return False


@contextlib.contextmanager
def lowering_for(device: jax.Device):
    """Within, libraries that ask for the GPU of this process are told of this one, and of cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.extend import backend

    asked, checked = backend.get_default_device, cudnn.check_cudnn_version
    backend.get_default_device = lambda: device
    cudnn.check_cudnn_version = lambda: _CUDNN
    try:
        yield
    finally:
        backend.get_default_device, cudnn.check_cudnn_version = asked, checked
