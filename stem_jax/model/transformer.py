"""The decoder: it takes blocks of rows and indices into them, wherever the tables live."""

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from stem_jax.config import Config, ModelConfig
from stem_jax.kernels.kept_names import ATTENTION, PROJECTION
from stem_jax.memory.memory import INPUT_LAYER, Memory
from stem_jax.mesh import constrain_tokens
from stem_jax.model import reader as sites
from stem_jax.model.attention import Attention
from stem_jax.model.draws import Unnamed
from stem_jax.model.embedding import Embedding
from stem_jax.model.feed_forward import kinds_of
from stem_jax.model.inputs import Inputs, Outputs
from stem_jax.model.kind import Aux, FeedForward, Read
from stem_jax.model.layer_plan import LayerGroups, repeating_groups
from stem_jax.model.layer_rows import LayerVectors, OpenRows
from stem_jax.model.layers import Linear, RMSNorm
from stem_jax.model.lora import add_adapters
from stem_jax.model.reader import Reader
from stem_jax.model.readers import READERS
from stem_jax.model.rotary import rotary_angles
from stem_jax.model.row_reads import RowRead, layer_forms, row_reads
from stem_jax.parts import part


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), the latter of one of the kinds of layers.

    Readers take rows in before, in and after these.
    """

    def __init__(
        self,
        config: Config,
        layer: int,
        kind: type[FeedForward],
        mesh: Mesh | None,
        reads: tuple[RowRead, ...] = (),
        memories: Mapping[str, Memory] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        model = config.model
        factor = residual_factor(model, layer)
        norm = functools.partial(RMSNorm, model.embed_dim, model.norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(model, factor, mesh, rngs=rngs)
        self.ffn_norm = norm()
        # Each kind is made alike; the base itself is none.
        make: Callable[..., FeedForward] = kind
        self.ffn = make(model, factor, mesh, rngs=rngs)
        self.readers = _readers(config, layer, reads, memories or {}, mesh, rngs)
        self.mesh = mesh

    @part("block_rest")
    def __call__(
        self,
        x_BxLxD,
        vectors: LayerVectors,
        inputs: Inputs,
        angles,
        embedded_BxLxD=None,
        cache=None,
        states=None,
    ):
        """The layer's part of the residual stream, added.

        Args:
            vectors: what the layer reads of rows.
            embedded_BxLxD: the token embeddings; None without readers.
            states: of the readers, by memory, for the tokens before; None where texts begin.

        Returns:
            The residual stream, the layer's Aux, what is left of the rows for the next layer, the
            longer cache and the readers' new states.
        """
        segments = inputs.segment_ids
        # In here, so that rematerialisation looks rows up again and keeps no [B, L, F].
        found, rest = vectors.look_up(inputs.index, self.mesh)
        new_states = {}

        def read_at(site: str, x):
            results = []
            for name in self.readers:
                reader = self.readers[name]
                if reader.site == site:
                    rows_BxLxKxF = found[name]
                    before = None if states is None else states[name]
                    y, new_states[name] = reader(x, embedded_BxLxD, rows_BxLxKxF, segments, before)
                    results.append(y)
                    x = x if site == sites.VALUES else y
            return results, x

        _, x_BxLxD = read_at(sites.BEFORE_ATTENTION, x_BxLxD)
        normed_BxLxD = self.attention_norm(x_BxLxD)
        added, _ = read_at(sites.VALUES, normed_BxLxD)
        more_BxLxKxD = functools.reduce(jnp.add, added) if added else None
        attended, cache = self.attention(normed_BxLxD, angles, segments, cache, more_BxLxKxD)
        x_BxLxD = x_BxLxD + attended
        # Of all memories but one a reader takes the rows.
        of_kind = [found[name] for name in found if name not in self.readers]
        read = Read(inputs.tokens, segments, of_kind[0] if of_kind else None)
        y_BxLxD, aux = self.ffn(self.ffn_norm(x_BxLxD), read)
        x_BxLxD = x_BxLxD + y_BxLxD
        _, x_BxLxD = read_at(sites.AFTER_FEED_FORWARD, x_BxLxD)
        return x_BxLxD, aux, rest, cache, new_states


def _readers(
    config: Config,
    layer: int,
    reads: Iterable[RowRead],
    memories: Mapping[str, Memory],
    mesh: Mesh | None,
    rngs: nnx.Rngs,
) -> nnx.Dict:
    """By memory; of a layer, or of INPUT_LAYER."""
    made = {}
    for read in reads:
        if read.reader is not None:
            # The backbone begins with the same bits whatever reads beside it.
            key = jax.random.fold_in(
                jax.random.key(config.train.seed), zlib.crc32(f"{layer} {read.memory}".encode())
            )
            make: type[Reader] = READERS[read.reader]
            own = rngs if isinstance(rngs, Unnamed) else nnx.Rngs(params=key)
            made[read.memory] = make.of(config, memories[read.memory], mesh, rngs=own)
    return nnx.Dict(made)


class Transformer(nnx.Module):
    """Decoder-only language model; what it reads of tables comes as row blocks."""

    def __init__(self, config: Config, mesh: Mesh | None = None, *, rngs: nnx.Rngs):
        model, reads = config.model, row_reads(config)
        self.embed = Embedding(
            model.vocab_size,
            model.embed_dim,
            mesh,
            has_dropout=model.token_embedding_dropout > 0,
            rngs=rngs,
        )
        self.readers = _readers(
            config, INPUT_LAYER, reads.of(INPUT_LAYER), reads.memories, mesh, rngs
        )
        self.blocks = nnx.List(
            [
                Block(config, layer, kind, mesh, reads.of(layer), reads.memories, rngs=rngs)
                for layer, kind in enumerate(kinds_of(model))
            ]
        )
        add_adapters(self.blocks, config)
        self.norm = RMSNorm(model.embed_dim, model.norm_eps)
        std = model.embed_dim**-0.5
        self.head = (
            None
            if model.tie_embeddings
            else Linear(
                (model.embed_dim, model.vocab_size),
                ("embed", "vocab"),
                std,
                3 * std,
                rngs=rngs,
            )
        )
        self.config = model
        self.mesh = mesh
        # Of places in the groups of a scan: their blocks' parameters, stacked. Whoever has them so
        # says it here; else a scan stacks those of the blocks.
        self.stacks: list[nnx.State] | None = None
        self._groups = repeating_groups(layer_forms(config)) if model.scan_layers else None
        self._reads = reads

    def __call__(
        self,
        inputs: Inputs,
        rows: Mapping[str, jax.Array],
        caches=None,
        collect=None,
        row_sums: Mapping[str, jax.Array] | None = None,
        states=None,
    ) -> Outputs:
        """Runs the blocks.

        Args:
            inputs: the batch, B over the batch axes of the mesh and L over context.
            rows: of each memory the row block [S, U, F]; with several devices the concatenation of
                each device's block of U rows, which its index names.
            caches: None, or one `cache.NewCache` or `cache.LayerCache` per layer.
            collect: None, or a list that receives the residual stream after the embedding and
                after every block (tests and analysis).
            row_sums: None, or of each memory [S, U, F] float32 to which the gradients of the rows
                are added: their gradient is the sum, and the rows have none.
            states: `Outputs.states` of the tokens before; None where texts begin.

        Returns:
            Outputs.
        """
        config = self.config
        with part("rotary"):
            angles = rotary_angles(inputs.positions, config)
        x = self.embed(inputs.tokens, config.compute_dtype, inputs.dropped)
        embedded = x = constrain_tokens(x, self.mesh)
        opened = OpenRows.of(self._reads, rows, row_sums or {}, inputs.index, self.mesh)
        x, state = self._read_input(x, opened, inputs, None if states is None else states[0])
        seen, new_caches, new_states, aux = [x], [], [state], Aux()
        # Caches and what is collected are lists of layers; only training runs groups.
        groups = None if caches is not None or collect is not None else self._groups
        layer = 0
        while layer < config.num_layers:
            if groups is not None and layer == groups.first:
                x, more, opened = self._run_groups(groups, x, opened, inputs, angles, embedded)
                aux += more
                layer = groups.end
                continue
            cache = None if caches is None else caches[layer]
            before = None if states is None else states[layer + 1]
            graph, state = nnx.split(self.blocks[layer])
            places = opened.places(self._reads.of(layer))
            x, more, opened, cache, after = self._run(
                graph, state, layer, x, opened, places, inputs, angles, embedded, cache, before
            )
            aux += more
            seen.append(x)
            new_caches.append(cache)
            new_states.append(after)
            layer += 1
        if collect is not None:
            collect.extend(seen)
        x = opened.close(x, self.mesh)
        if caches is None:
            return Outputs(self.norm(x), None, aux)
        return Outputs(self.norm(x), new_caches, aux, new_states)

    def _read_input(self, x_BxLxD, opened: OpenRows, inputs: Inputs, states):
        """The residual stream with the rows that are read before the layers."""
        reads, embedded = self._reads.of(INPUT_LAYER), x_BxLxD
        after: dict[str, Any] = {}
        if not reads:
            return x_BxLxD, after
        found, _ = opened.of_layer(reads, opened.places(reads)).look_up(inputs.index, self.mesh)
        for name in self.readers:
            before = None if states is None else states[name]
            x_BxLxD, after[name] = self.readers[name](
                x_BxLxD, embedded, found[name], inputs.segment_ids, before
            )
        return constrain_tokens(x_BxLxD, self.mesh), after

    def _run(
        self, graph, state, layer, x_BxLxD, opened, places, inputs, angles, embedded, *carried
    ):
        """One block, given as nnx has it split, under the rematerialisation policy.

        Args:
            layer: or one that reads as it does.
            places: where it reads, see `OpenRows.places`.
        """
        reads = self._reads.of(layer)
        run = _remat(lambda state, *args: nnx.merge(graph, state)(*args), self.config.remat)
        vectors = opened.of_layer(reads, places)
        # Who does not read them keeps none.
        embedded = embedded if any(read.reader for read in reads) else None
        x_BxLxD, aux, rest, *carried = run(
            state, x_BxLxD, vectors, inputs, angles, embedded, *carried
        )
        return constrain_tokens(x_BxLxD, self.mesh), aux, opened.after(rest), *carried

    def _run_groups(self, groups: LayerGroups, x_BxLxD, opened, inputs: Inputs, angles, embedded):
        """The same blocks as a scan over groups of them."""
        graphs = [nnx.graphdef(self.blocks[place]) for place in groups.places]
        states = self.stacks or [
            jax.tree.map(
                lambda *layers: jnp.stack(layers),
                *(nnx.state(self.blocks[layer]) for layer in groups.layers(place)),
            )
            for place in groups.places
        ]
        places = [
            jax.tree.map(
                lambda *numbers: jnp.array(numbers),
                *(opened.places(self._reads.of(layer)) for layer in groups.layers(place)),
            )
            for place in groups.places
        ]

        def one_group(carry, group):
            x, threads = carry
            # What is read is the same in every group; in the carry, each would keep a copy of it.
            opened_, aux = opened.after(threads), Aux()
            for layer, graph, state, places in zip(groups.places, graphs, *group, strict=True):
                x, more, opened_, *_ = self._run(
                    graph, state, layer, x, opened_, places, inputs, angles, embedded
                )
                aux += more
            return (x, opened_.threads), aux

        carry = x_BxLxD, opened.threads
        (x, threads), aux = jax.lax.scan(one_group, carry, (states, places))
        return x, aux.summed(), opened.after(threads)

    def head_weight(self) -> jax.Array:
        """The output head [D, V] in the dtype of the parameters."""
        return self.embed.weight[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden_BxLxD: jax.Array) -> jax.Array:
        """Float32 logits [B, L, V] of final hidden states."""
        head_DxV = self.head_weight().astype(hidden_BxLxD.dtype)
        return jnp.einsum("bld,dv->blv", hidden_BxLxD, head_DxV, preferred_element_type=jnp.float32)


def reader_of(name: str) -> str | None:
    """The memory whose reader has the parameter of this name, by layer or of a state."""
    before, _, rest = name.rpartition("readers.")
    is_readers = not before or before.startswith("blocks.")
    return rest.partition(".")[0] if is_readers and rest != name else None


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
