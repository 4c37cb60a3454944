"""What a dense layer's up projection gives for each token, averaged over a text.

    mean over the places i of token t of  W_up n_i   =   W_up (mean of n_i)

n is the normed input of the feed-forward layer, so that vectors of width D are averaged, and the
projection comes last. A token that the text lacks has one thing that is its own, its embedding:
its n is the normed embedding alone.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.data.loader import HostBatch
from stem_jax.kernels.row_sums import order_of, sum_by_row, way_on
from stem_jax.model.ffn import DenseFFN
from stem_jax.model.inputs import Inputs
from stem_jax.model.rotary import rotary_angles
from stem_jax.model.transformer import Transformer
from stem_jax.training.batch import Batch
from stem_jax.training.blueprint import Params
from stem_jax.training.step import TrainStep


class UpMeans:
    """The means of some layers, as far as the text has been read.

    counts: [V] int64, how often each token was seen.
    """

    def __init__(self, programs: TrainStep, params: Params, layers: tuple[int, ...]):
        """Args:
        programs: of the dense model, on a mesh of one device.
        params: its parameters.
        layers: whose means are taken.
        """
        model = programs.config.model
        self.counts = np.zeros(model.vocab_size, np.int64)
        self._programs, self._params, self._layers = programs, params, layers
        self._sums = [jnp.zeros((model.vocab_size, model.embed_dim))] * len(layers)
        self._add = jax.jit(self._with_batch)
        self._project = jax.jit(self._projected, static_argnames="layer")

    def read(self, batches: Iterable[HostBatch]) -> None:
        """Adds the tokens of some batches."""
        for batch in batches:
            self._sums = self._add(self._params, self._sums, self._programs.place(batch))
            real = batch["tokens"][batch["segment_ids"] > 0]
            self.counts += np.bincount(real, minlength=len(self.counts))

    def rows(self, index: int, ids_n: np.ndarray) -> np.ndarray:
        """The means [n, F] float32 of the `index`-th of the layers, for some token ids."""
        counts_n = self.counts[ids_n].astype(np.float32)
        layer, sums_VxD = self._layers[index], self._sums[index]
        return np.asarray(self._project(self._params, sums_VxD, counts_n, ids_n, layer=layer))

    def _with_batch(self, params: Params, sums: list[jax.Array], batch: Batch) -> list[jax.Array]:
        model = self._programs.model.bind(params)
        for number in range(batch.tokens.shape[0]):
            piece = jax.tree.map(lambda x, i=number: x[i], batch)
            # Padding has an index that no row has.
            index = jnp.where(piece.segment_ids > 0, piece.tokens, len(self.counts))
            order, way = order_of(index, len(self.counts)), way_on(self._programs.mesh)
            vectors = _ffn_inputs(model, piece, self._layers)
            sums = [
                total + sum_by_row(x, index, len(self.counts), way, order)
                for total, x in zip(sums, vectors, strict=True)
            ]
        return sums

    def _projected(self, params: Params, sums_VxD, counts_n, ids_n, layer: int) -> jax.Array:
        model = self._programs.model.bind(params)
        block, counts_nx1 = model.blocks[layer], counts_n[:, None]
        [alone_nxD] = block.ffn_norm(model.embed(ids_n[None], jnp.float32))
        mean_nxD = sums_VxD[ids_n] / jnp.maximum(counts_nx1, 1)
        assert isinstance(block.ffn, DenseFFN)
        return block.ffn.up_proj(jnp.where(counts_nx1 > 0, mean_nxD, alone_nxD))


def _ffn_inputs(model: Transformer, batch: Batch, layers: tuple[int, ...]) -> list[jax.Array]:
    """What the feed-forward layers read: [B, L, D] for each of some layers."""
    streams: list[jax.Array] = []
    model(Inputs(batch.tokens, batch.positions, batch.segment_ids), {}, collect=streams)
    angles = rotary_angles(batch.positions, model.config)
    vectors = []
    for layer in layers:
        block, x = model.blocks[layer], streams[layer]
        attended, _ = block.attention(block.attention_norm(x), angles, batch.segment_ids)
        vectors.append(block.ffn_norm(x + attended))
    return vectors
