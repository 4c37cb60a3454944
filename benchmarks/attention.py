"""The attention kernels of this platform against the plain einsum: error and time, both ways.

python -m benchmarks.attention [--batch=16] [--length=2048] [--heads=15] [--kv-heads=5]

Documents of random lengths fill each row; cuDNN takes part with `--documents=1`. Errors are those
of bfloat16 inputs against the same numbers in float32, as |out - ref| / |ref|.
"""

import argparse
import json
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.interleave import interleave
from stem_jax.kernels.document_attention import missing
from stem_jax.model.attention import attend

_KERNELS = {"gpu": ("tokamax", "cudnn", "chunked"), "tpu": ("splash", "chunked")}


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, size in (
        ("batch", 16),
        ("length", 2048),
        ("heads", 15),
        ("kv-heads", 5),
        ("head-dim", 64),
    ):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--documents", type=int, default=4, help="of a row")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    kernels = list(_KERNELS.get(jax.default_backend(), ("chunked",)))
    if "tokamax" in kernels and (reason := missing(jax.devices()[0])):
        print(f"tokamax {reason}", file=sys.stderr)
        kernels.remove("tokamax")
    # It attends over whole rows.
    if "cudnn" in kernels and args.documents > 1:
        kernels.remove("cudnn")
    inputs = _inputs(args)
    programs = {name: _program(name) for name in (*kernels, "xla")}
    reference = _program("xla")(*(x.astype(jnp.float32) for x in inputs[:4]), inputs[4])
    found = {name: program(*inputs) for name, program in programs.items()}
    seconds = interleave(
        {
            name: lambda program=program: jax.block_until_ready(program(*inputs))
            for name, program in programs.items()
        },
        args.rounds,
    )
    result = {
        name: {
            "forward_and_backward_ms": round(1e3 * statistics.median(seconds[name]), 3),
            "relative_error": {
                part: round(_error(ours, theirs), 6)
                for part, ours, theirs in zip(
                    ("out", "dq", "dk", "dv"), found[name], reference, strict=True
                )
            },
        }
        for name in programs
    }
    result |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(result | {"shape": vars(args)}, indent=2))


def _program(backend: str):
    @jax.jit
    def both(q, k, v, cotangent, segments):
        out, pull = jax.vjp(lambda *x: attend(*x, segments, backend, None), q, k, v)
        return out, *pull(cotangent)

    return both


def _inputs(args) -> tuple:
    random = np.random.default_rng(0)
    shapes = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    arrays = [
        jnp.asarray(
            random.standard_normal((args.batch, args.length, heads, args.head_dim)), jnp.bfloat16
        )
        for heads in shapes
    ]
    share = args.documents / args.length if args.documents > 1 else 0.0
    starts = random.random((args.batch, args.length)) < share
    return *arrays, jnp.asarray(1 + np.cumsum(starts, axis=1), jnp.int32)


def _error(ours, theirs) -> float:
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


if __name__ == "__main__":
    main()
