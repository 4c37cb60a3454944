"""Peak memory of the output head's loss and gradients, chunked against plain, without running it.

python -m benchmarks.loss_memory [--vocab=128256] [--length=4096] [--chunk=256]

Prints the temporaries that the compiler reserves for one sequence at D 2048, float32 logits.
"""

import argparse
import json

import jax
import jax.numpy as jnp

from stem_jax.kernels.head_loss import head_loss


def plain_loss(hidden_BxLxD, head_DxV, targets_BxL, weights_BxL):
    """The usual formulation: all logits at once, differentiated by autodiff."""
    logits = (hidden_BxLxD @ head_DxV).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, targets_BxL[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights_BxL * picked)


def temporaries(loss, vocab: int, length: int, width: int = 2048) -> int:
    """Bytes of temporaries of value and gradients for one sequence."""
    shapes = (
        jax.ShapeDtypeStruct((1, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        jax.ShapeDtypeStruct((1, length), jnp.float32),
    )
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=256)
    args = parser.parse_args()

    def chunked_loss(*arrays):
        return head_loss(*arrays, 0.0, args.chunk, None)[0]

    found = {
        name: temporaries(loss, args.vocab, args.length) / 2**20
        for name, loss in (("chunked", chunked_loss), ("plain", plain_loss))
    }
    result = {f"{name}_temporaries_mib": round(size, 1) for name, size in found.items()}
    result["plain_over_chunked"] = round(found["plain"] / found["chunked"], 2)
    print(json.dumps(result | vars(args), indent=2))


if __name__ == "__main__":
    main()
