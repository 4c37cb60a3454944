"""Whether a GPU trains as a CPU does, and with rows in host memory as without: exits 1 if not.

python -m benchmarks.gpu_checks [--steps=8] [--shape=cpu|toy]

Losses of a small model with STEM layers, of the same steps on the same batches. In float32 products
are exact to its rounding; in bfloat16 the GPU takes its own attention kernel.
"""

import argparse
import json
import os
import subprocess
import sys

import jax

from benchmarks.offload import Run, offloaded
from benchmarks.train_step import bench_config, toy_config
from stem_jax.config import Config

# Relative, of the losses.
_BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}


def check_config(shape: str, dtype: str) -> Config:
    """A small model of a shape that every kernel takes, or a smaller one."""
    if shape == "toy":
        return toy_config(model__stem_layers="half", model__compute_dtype=dtype, mesh__data=1)
    return bench_config(
        model__num_layers=2,
        model__num_kv_heads=4,
        model__vocab_size=4096,
        model__stem_layers="half",
        model__compute_dtype=dtype,
        mesh__data=1,
    )


def losses(config: Config, steps: int) -> list[float]:
    """Of the first steps on the first device."""
    with jax.default_matmul_precision("highest"):
        run = Run(config, steps)
        run()
    run.close()
    return run.losses


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shape", choices=("toy", "cpu"), default="cpu")
    parser.add_argument("--losses", action="store_true", help="print those of this platform alone")
    args = parser.parse_args()
    ours = {dtype: losses(check_config(args.shape, dtype), args.steps) for dtype in _BOUNDS}
    if args.losses:
        print(json.dumps(ours))
        return
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--losses"]
    command += [f"--steps={args.steps}", f"--shape={args.shape}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    on_cpu = json.loads(subprocess.check_output(command, env=environment, text=True))
    differences = {
        dtype: max(abs(a / b - 1) for a, b in zip(ours[dtype], on_cpu[dtype], strict=True))
        for dtype in _BOUNDS
    }
    few = offloaded(check_config(args.shape, "float32"), 0.25, prefetch=2)
    equal = losses(few, args.steps) == ours["float32"]
    passed = equal and all(differences[dtype] <= bound for dtype, bound in _BOUNDS.items())
    result = {
        "passed": passed,
        "largest_relative_loss_difference_to_cpu": differences,
        "offloaded_losses_equal_resident": equal,
        "steps": args.steps,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(result, indent=2))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
