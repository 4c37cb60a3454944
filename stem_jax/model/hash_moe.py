"""Hash layers (arXiv 2106.04426): the token alone chooses the FFN that its position goes through.

Expert (id * A mod V) mod E, A as in a table's layout: each expert has as many ids of the vocabulary
as any other, up to one, and neighbours in frequency go to different ones. No counts of the data are
needed, and there is nothing to learn or to balance; experts of frequent tokens have more to do.

On each device tokens are sorted by expert, padding last, so that an expert's positions are rows of
one block. Then a product with each expert's weights is one `jax.lax.ragged_dot` on TPUs and GPUs.
CPUs would multiply all rows with all experts there; they loop over blocks of rows of one expert.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from stem_jax.config import ModelConfig
from stem_jax.kernels.kept_names import projection
from stem_jax.mesh import gather, live_axes, parameter_spec, token_spec
from stem_jax.model.ffn import gated
from stem_jax.model.kind import Aux, FeedForward, LayerCost, Read
from stem_jax.model.layers import truncated_normal
from stem_jax.parts import part
from stem_jax.tables.layout import TableLayout

# How each platform multiplies rows with the weights of their experts.
WAYS = {"tpu": "ragged", "gpu": "ragged", "cpu": "blocks"}
_AXES = ("experts", "embed", "ffn")
# Rows of a block: few, as the last one of each expert is half empty; each reads whole weights.
_MOST_ROWS = 32


class Experts(nnx.Module):
    """A matrix [D, F] of each of E experts."""

    def __init__(self, shape_ExDxF: tuple[int, int, int], std: float, *, rngs: nnx.Rngs):
        value = truncated_normal(rngs.params(), shape_ExDxF, std, 3 * std, _AXES)
        self.kernel = nnx.Param(value, logical_axes=_AXES)


class HashExperts(FeedForward):
    """y = FFN_e(x), e the expert of the token; each a gated FFN of a dense layer's shape."""

    def __init__(self, config: ModelConfig, factor: float, mesh: Mesh | None, *, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.ffn_dim
        shape = (config.hash_moe_experts, D, F)
        in_std = config.init_base_std or D**-0.5
        out_std = (config.init_base_std or F**-0.5) / factor
        self.gate_proj = Experts(shape, in_std, rngs=rngs)
        self.up_proj = Experts(shape, in_std, rngs=rngs)
        self.down_proj = Experts(shape, out_std, rngs=rngs)
        self.num_experts, self.vocab_size, self.mesh = (
            config.hash_moe_experts,
            config.vocab_size,
            mesh,
        )

    @classmethod
    def weights(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See `FeedForward`."""
        shape = (config.hash_moe_experts, config.embed_dim, config.ffn_dim)
        return {f"{name}.kernel": shape for name in ("gate_proj", "up_proj", "down_proj")}

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """A token multiplies with the weights of one expert."""
        whole = sum(map(math.prod, cls.weights(config).values()))
        one = whole // config.hash_moe_experts
        return LayerCost(whole, reads=one, matmuls=one, elementwise=5 * config.ffn_dim)

    def __call__(self, x_BxLxD: jax.Array, read: Read) -> tuple[jax.Array, Aux]:
        """Zero where the segment is 0."""
        experts_BxL = experts_of(read.tokens, self.vocab_size, self.num_experts)
        experts_BxL = jnp.where(read.segment_ids > 0, experts_BxL, self.num_experts)
        kernels = [
            experts.kernel[...].astype(x_BxLxD.dtype)
            for experts in (self.gate_proj, self.up_proj, self.down_proj)
        ]
        mesh = self.mesh
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        local = functools.partial(_local, mesh=mesh, way=WAYS[platform])
        if mesh is not None:
            tokens, kernel = token_spec(), parameter_spec(_AXES)
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(tokens, tokens, kernel, kernel, kernel),
                out_specs=tokens,
                check_vma=False,
            )
        return local(x_BxLxD, experts_BxL, *kernels), Aux()


def experts_of(tokens: jax.Array, vocab_size: int, num_experts: int) -> jax.Array:
    """The expert of each token id, int32 of the same shape."""
    return TableLayout(vocab_size, 1).rows_of(tokens) % num_experts


def _local(x_BxLxD, experts_BxL, *kernels, mesh: Mesh | None, way: str):
    """What a device makes of its positions; it has the experts' matrices in shards."""
    gate, up, down = (gather(kernel, "fsdp", 1, mesh) for kernel in kernels)
    width = x_BxLxD.shape[-1]
    with part("expert_order"):
        groups = groups_of(experts_BxL.reshape(-1), len(gate), way)
        x_SxD = _taken(x_BxLxD.reshape(-1, width), groups.positions, groups.slots)
    with part("block_matmuls"):
        gate_SxF, up_SxF = (projection(groups.product(x_SxD, kernel)) for kernel in (gate, up))
        y_SxD = groups.product(gated(gate_SxF, up_SxF), down, back=True)
    with part("expert_order"):
        y_NxD = _taken(y_SxD, groups.slots, groups.positions)
    # Of the F columns each device of `tensor` has some.
    y_NxD = jax.lax.psum(y_NxD, live_axes(mesh, "tensor"))
    return projection(y_NxD.reshape(x_BxLxD.shape))


@dataclasses.dataclass(frozen=True)
class Groups:
    """N positions in S slots, each expert's in a row.

    positions: [S] int32, of each slot; N where it is free. slots: [N] int32, of each position; S of
    padding, which has none. sizes: [E] int32, positions of each expert. experts: of each block of
    slots, and rounds, how many blocks there are; None for one ragged product.
    """

    positions: jax.Array
    slots: jax.Array
    sizes: jax.Array
    experts: jax.Array | None = None
    rounds: jax.Array | None = None

    def product(self, x_SxI: jax.Array, kernel_ExDxF: jax.Array, back: bool = False) -> jax.Array:
        """Rows times their expert's matrix, or with `back` its transpose."""
        if self.experts is not None:
            return _block_product(x_SxI, kernel_ExDxF, self.experts, self.rounds, back)
        kernel = kernel_ExDxF.swapaxes(1, 2) if back else kernel_ExDxF
        return jax.lax.ragged_dot(x_SxI, kernel, self.sizes)


def groups_of(experts_N: jax.Array, num_experts: int, way: str) -> Groups:
    """The groups of positions by expert, `num_experts` being padding; in the order they came."""
    count = len(experts_N)
    order_N = jnp.argsort(experts_N)
    sorted_N = experts_N[order_N]
    bounds = jnp.searchsorted(sorted_N, jnp.arange(num_experts + 1)).astype(jnp.int32)
    starts_E, sizes_E = bounds[:-1], jnp.diff(bounds)
    real_N, own_N = sorted_N < num_experts, jnp.minimum(sorted_N, num_experts - 1)
    if way == "ragged":
        room, slot_N, more = count, jnp.arange(count), {}
    else:
        # A power of two, so that few positions, as in decoding, are not many rows.
        rows = min(_MOST_ROWS, 1 << max(0, (count // num_experts).bit_length() - 1))
        blocks_E = -(-sizes_E // rows)
        ends_E = jnp.cumsum(blocks_E)
        most = min(count, count // rows + num_experts)
        room = most * rows
        slot_N = jnp.arange(count) - starts_E[own_N] + (ends_E - blocks_E)[own_N] * rows
        experts = jnp.searchsorted(ends_E, jnp.arange(most), side="right").astype(jnp.int32)
        more = {"experts": experts, "rounds": ends_E[-1]}
    slot_N = jnp.where(real_N, slot_N, room).astype(jnp.int32)
    positions = (
        jnp.full(room, count, jnp.int32)
        .at[slot_N]
        .set(order_N.astype(jnp.int32), mode="drop", unique_indices=True)
    )
    slots = jnp.zeros(count, jnp.int32).at[order_N].set(slot_N, unique_indices=True)
    return Groups(positions, slots, sizes_E, **more)


@jax.custom_vjp
def _taken(x_RxI: jax.Array, index: jax.Array, back: jax.Array) -> jax.Array:
    """Rows by an index of each at most once, zeros where it is past all; `back` is its inverse."""
    return x_RxI.at[index].get(mode="fill", fill_value=0)


_taken.defvjp(
    lambda x, index, back: (_taken(x, index, back), (index, back)),
    # Gathered, too: a scatter would be slower, and knows nothing of unique rows.
    lambda kept, gradient: (_taken(gradient, kept[1], kept[0]), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _block_product(x_SxI, kernel_ExDxF, experts, rounds, back: bool):
    rows = len(x_SxI) // len(experts)

    def one_block(block, y_SxO):
        x = _rows(x_SxI, block, rows)
        kernel = kernel_ExDxF[experts[block]]
        return _with_rows(y_SxO, x @ (kernel.T if back else kernel), block, rows)

    width = kernel_ExDxF.shape[1 if back else 2]
    return jax.lax.fori_loop(0, rounds, one_block, jnp.zeros((len(x_SxI), width), x_SxI.dtype))


def _block_product_backward(back, kept, gradient_SxO):
    x_SxI, kernel_ExDxF, experts, rounds = kept
    rows = len(x_SxI) // len(experts)

    def one_block(block, carry):
        dx_SxI, dkernel_ExDxF = carry
        x, gradient = (_rows(array, block, rows) for array in (x_SxI, gradient_SxO))
        expert = experts[block]
        kernel = kernel_ExDxF[expert]
        dx_SxI = _with_rows(dx_SxI, gradient @ (kernel if back else kernel.T), block, rows)
        outer = jnp.matmul(
            *((gradient.T, x) if back else (x.T, gradient)), preferred_element_type=jnp.float32
        )
        return dx_SxI, dkernel_ExDxF.at[expert].add(outer)

    start = jnp.zeros_like(x_SxI), jnp.zeros(kernel_ExDxF.shape, jnp.float32)
    dx_SxI, dkernel_ExDxF = jax.lax.fori_loop(0, rounds, one_block, start)
    return dx_SxI, dkernel_ExDxF.astype(kernel_ExDxF.dtype), None, None


_block_product.defvjp(
    lambda x, kernel, experts, rounds, back: (
        _block_product(x, kernel, experts, rounds, back),
        (x, kernel, experts, rounds),
    ),
    _block_product_backward,
)


def _rows(array_SxI, block, rows: int):
    return jax.lax.dynamic_slice_in_dim(array_SxI, block * rows, rows)


def _with_rows(array_SxI, rows_RxI, block, rows: int):
    return jax.lax.dynamic_update_slice_in_dim(array_SxI, rows_RxI, block * rows, 0)
