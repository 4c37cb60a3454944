"""The decoder: it takes a block of rows and indices into it, wherever the table lives."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from stem_jax.config import ModelConfig
from stem_jax.kernels.kept_names import ATTENTION, PROJECTION
from stem_jax.kernels.row_sums import RowOrder
from stem_jax.mesh import constrain_tokens
from stem_jax.model.attention import Attention
from stem_jax.model.embedding import Embedding
from stem_jax.model.feed_forward import kinds_of
from stem_jax.model.kind import Aux, FeedForward, Read
from stem_jax.model.layer_plan import LayerGroups, repeating_groups
from stem_jax.model.layers import Linear, RMSNorm
from stem_jax.model.rotary import rotary_angles
from stem_jax.parts import part
from stem_jax.tables.lookup import LayerRows, close_rows, lookup, open_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the decoder reads for one batch.

    tokens: [B, L] int32 ids. inverse: [B, L] int32, index of each token's row in the row block of
    its device. positions: [B, L] int32 within the document. segment_ids: [B, L] int32, 0 = padding.
    dropped: [B, L] bool, tokens whose embedding is replaced (their rows stay), or None. order: of
    `inverse`, for gradients of the rows; without it they sort in every layer.
    """

    tokens: jax.Array
    inverse: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    dropped: jax.Array | None = None
    order: RowOrder | None = None


class Outputs(NamedTuple):
    """What the decoder makes of a batch.

    hidden: the normalised final hidden states [B, L, D]. caches: the extended ones, one per layer;
    None without caches. aux: of all layers.
    """

    hidden: jax.Array
    caches: list | None
    aux: Aux


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), the latter of one of the kinds of layers."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        kind: type[FeedForward],
        mesh: Mesh | None,
        *,
        rngs: nnx.Rngs,
    ):
        factor = residual_factor(config, layer)
        norm = functools.partial(RMSNorm, config.embed_dim, config.norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(config, factor, mesh, rngs=rngs)
        self.ffn_norm = norm()
        # Each kind is made alike; the base itself is none.
        make: Callable[..., FeedForward] = kind
        self.ffn = make(config, factor, mesh, rngs=rngs)
        self.mesh = mesh

    @part("block_rest")
    def __call__(self, x_BxLxD, rows: LayerRows | None, vector, inputs: Inputs, angles, cache=None):
        """`vector` is the number of the layer's vectors in the rows; None for one that reads none.

        Returns:
            The residual stream, the layer's Aux, the rows' thread for the next layer (None of one
            that reads none), and the longer cache.
        """
        attended, cache = self.attention(
            self.attention_norm(x_BxLxD), angles, inputs.segment_ids, cache
        )
        x_BxLxD = x_BxLxD + attended
        # In here, so that rematerialisation looks rows up again and keeps no [B, L, F].
        values_BxLxF = thread = None
        if vector is not None:
            assert rows is not None
            values_BxLxF, thread = lookup(rows, vector, inputs.inverse, inputs.order, self.mesh)
        read = Read(inputs.tokens, inputs.segment_ids, values_BxLxF)
        y_BxLxD, aux = self.ffn(self.ffn_norm(x_BxLxD), read)
        return x_BxLxD + y_BxLxD, aux, thread, cache


class Transformer(nnx.Module):
    """Decoder-only language model; STEM layers read their up values from a row block."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None = None, *, rngs: nnx.Rngs):
        self.embed = Embedding(
            config.vocab_size,
            config.embed_dim,
            mesh,
            has_dropout=config.token_embedding_dropout > 0,
            rngs=rngs,
        )
        self.blocks = nnx.List(
            [
                Block(config, layer, kind, mesh, rngs=rngs)
                for layer, kind in enumerate(kinds_of(config))
            ]
        )
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)
        std = config.embed_dim**-0.5
        self.head = (
            None
            if config.tie_embeddings
            else Linear(
                (config.embed_dim, config.vocab_size),
                ("embed", "vocab"),
                std,
                3 * std,
                rngs=rngs,
            )
        )
        self.config = config
        self.mesh = mesh
        # Of places in the groups of a scan: their blocks' parameters, stacked. Whoever has them so
        # says it here; else a scan stacks those of the blocks.
        self.stacks: list[nnx.State] | None = None
        # Of the layers that read rows: the number of their vectors in a row.
        self._vectors = {layer: number for number, layer in enumerate(config.stem_layers)}

    def __call__(
        self,
        inputs: Inputs,
        rows_SxUxF: jax.Array | None,
        caches=None,
        collect=None,
        row_sums=None,
    ) -> Outputs:
        """Runs the blocks.

        Args:
            inputs: the batch, B over the batch axes of the mesh and L over context.
            rows_SxUxF: the row block; with several devices the concatenation of each device's
                block of U rows, which its `inverse` indexes.
            caches: None, or one `cache.NewCache` or `cache.LayerCache` per layer.
            collect: None, or a list that receives the residual stream after the embedding and
                after every block (tests and analysis).
            row_sums: None, or [S, U, F] float32 to which the gradients of the rows are added: their
                gradient is the sum, and the rows have none.

        Returns:
            Outputs.
        """
        config = self.config
        with part("rotary"):
            angles = rotary_angles(inputs.positions, config)
        x = self.embed(inputs.tokens, config.compute_dtype, inputs.dropped)
        x = constrain_tokens(x, self.mesh)
        seen, new_caches, aux = [x], [], Aux()
        # Caches and what is collected are lists of layers; only training runs groups.
        plain = caches is not None or collect is not None
        groups = None if plain or not config.scan_layers else repeating_groups(config)
        rows = open_rows(rows_SxUxF, row_sums) if config.stem_layers else None
        layer = 0
        while layer < config.num_layers:
            if groups is not None and layer == groups.first:
                x, more, rows = self._run_groups(groups, x, rows, inputs, angles)
                aux += more
                layer = groups.end
                continue
            cache = None if caches is None else caches[layer]
            graph, state = nnx.split(self.blocks[layer])
            vector = self._vectors.get(layer)
            x, more, rows, cache = self._run(graph, state, x, rows, vector, inputs, angles, cache)
            aux += more
            seen.append(x)
            new_caches.append(cache)
            layer += 1
        if collect is not None:
            collect.extend(seen)
        x = x if rows is None else close_rows(x, rows, self.mesh)
        return Outputs(self.norm(x), None if caches is None else new_caches, aux)

    def _run(self, graph, state, x_BxLxD, rows, vector, inputs: Inputs, angles, cache=None):
        """One block, given as nnx has it split, under the rematerialisation policy."""
        run = _remat(lambda state, *args: nnx.merge(graph, state)(*args), self.config.remat)
        read = None if vector is None else rows
        x_BxLxD, aux, thread, cache = run(state, x_BxLxD, read, vector, inputs, angles, cache)
        if vector is not None:
            # Alone: vectors that had come out of a block would be kept for every group of a scan.
            rows = dataclasses.replace(rows, thread=thread)
        return constrain_tokens(x_BxLxD, self.mesh), aux, rows, cache

    def _run_groups(self, groups: LayerGroups, x_BxLxD, rows, inputs: Inputs, angles):
        """The same blocks as a scan over groups of them."""
        places = groups.places
        graphs = [nnx.graphdef(self.blocks[place]) for place in places]
        states = self.stacks or [
            jax.tree.map(
                lambda *layers: jnp.stack(layers),
                *(nnx.state(self.blocks[layer]) for layer in groups.layers(place)),
            )
            for place in places
        ]
        vectors = {
            place: jnp.array([self._vectors[layer] for layer in groups.layers(place)])
            for place in places
            if place in self._vectors
        }

        def one_group(carry, group):
            x, thread = carry
            states, vectors = group
            # What is read is the same in every group; in the carry, each would keep a copy of it.
            rows_, aux = rows if rows is None else dataclasses.replace(rows, thread=thread), Aux()
            for place, graph, state in zip(places, graphs, states, strict=True):
                vector = vectors.get(place)
                x, more, rows_, _ = self._run(graph, state, x, rows_, vector, inputs, angles)
                aux += more
            return (x, None if rows is None else rows_.thread), aux

        thread = None if rows is None else rows.thread
        (x, thread), aux = jax.lax.scan(one_group, (x_BxLxD, thread), (states, vectors))
        rows = None if rows is None else dataclasses.replace(rows, thread=thread)
        return x, aux.summed(), rows

    def head_weight(self) -> jax.Array:
        """The output head [D, V] in the dtype of the parameters."""
        return self.embed.weight[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden_BxLxD: jax.Array) -> jax.Array:
        """Float32 logits [B, L, V] of final hidden states."""
        head_DxV = self.head_weight().astype(hidden_BxLxD.dtype)
        return jnp.einsum("bld,dv->blv", hidden_BxLxD, head_DxV, preferred_element_type=jnp.float32)


def residual_factor(config: ModelConfig, layer: int) -> float:
    """Divisor of the std of projections into the residual stream, official `init_std_factor`."""
    return {
        "disabled": 1.0,
        "current_depth": (2 * (layer + 1)) ** 0.5,
        "global_depth": (2 * (config.num_layers + 1)) ** 0.5,
        "dim_ratio": config.embed_dim / 4096,
    }[config.init_std_factor]


def _remat(apply, policy: str):
    """`apply(parameters, *args)`, which keeps of its inside what the policy names."""
    if policy == "none":
        return apply
    policies = jax.checkpoint_policies
    kept = {
        "full": policies.nothing_saveable,
        "attention": policies.save_only_these_names(ATTENTION),
        "dots": policies.save_only_these_names(PROJECTION),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[PROJECTION, ATTENTION],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return jax.checkpoint(apply, policy=kept[policy])
