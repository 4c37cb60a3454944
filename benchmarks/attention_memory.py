"""Memory of one attention layer on a GPU, forward and backward, from its compiler, without one.

python -m benchmarks.attention_memory [--topology=h100:1] [--batch=16] [--lengths=2048]
    [--heads=15] [--kv-heads=5] [--kernels=auto,chunked] [--dtypes=bfloat16]

Prints a JSON object for each: temporaries in MiB, the workspace that cuDNN takes beside them, and
how many of the program's arrays hold all pairs of positions, as masks and biases do.
"""

import argparse
import json

import absl.logging
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from configs.base import get_config
from stem_jax.config_file import build
from stem_jax.mesh import make_mesh
from stem_jax.model.attention import attend, resolve_backend
from stem_jax.planning import gpus, hlo
from stem_jax.planning.gpu_kernels import cudnn_workspace
from stem_jax.planning.topology import Topology


def main() -> None:
    """Compiles each and prints a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="h100:1")
    for name, size in (("batch", 16), ("heads", 15), ("kv-heads", 5), ("head-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=size)
    for name, values in (("lengths", "2048"), ("kernels", "auto"), ("dtypes", "bfloat16")):
        parser.add_argument(f"--{name}", default=values)
    args = parser.parse_args()
    # Libraries that look for timings of this GPU warn that they have none.
    absl.logging.set_verbosity(absl.logging.FATAL)
    jax.config.update("jax_platforms", "cpu")
    device = Topology.parse(args.topology).devices()[0]
    for kernel in args.kernels.split(","):
        for dtype in args.dtypes.split(","):
            for length in map(int, args.lengths.split(",")):
                found = _measured(args, device, kernel, dtype, length)
                print(json.dumps(found), flush=True)


def _measured(args, device, kernel: str, dtype: str, length: int) -> dict:
    raw = get_config()
    raw.model.attention, raw.model.compute_dtype = kernel, dtype
    raw.model.num_heads, raw.model.num_kv_heads = args.heads, args.kv_heads
    raw.model.head_dim = args.head_dim
    config = build(raw.to_dict())
    mesh = make_mesh(config.mesh, [device])
    chosen = resolve_backend(config.model, mesh, length)

    def both(q, k, v, gradient, segments):
        out, pull = jax.vjp(lambda *x: attend(*x, segments, chosen, None), q, k, v)
        return out, *pull(gradient)

    def shape(*sizes, dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))

    wide, narrow = (
        shape(args.batch, length, heads, args.head_dim, dtype=jnp.dtype(dtype))
        for heads in (args.heads, args.kv_heads)
    )
    segments = shape(args.batch, length, dtype=jnp.int32)
    with gpus.lowering_for(device):
        lowered = jax.jit(both).lower(wide, narrow, narrow, wide, segments)
    compiled = lowered.compile(compiler_options=gpus.OPTIONS)
    module = hlo.parse(compiled.as_text())
    arrays = [array for i, _ in module.scheduled() for array in i.arrays]
    return {
        "kernel": chosen,
        "dtype": dtype,
        "length": length,
        "temporaries_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "workspace_mib": round(cudnn_workspace(module) / 2**20, 1),
        "arrays_of_all_pairs": sum(array.shape.count(length) > 1 for array in arrays),
    }


if __name__ == "__main__":
    main()
