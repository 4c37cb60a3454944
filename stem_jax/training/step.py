"""The train step: one program from a global batch to the next state, dense or STEM."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.compiler_options import compiler_options
from stem_jax.config import Config
from stem_jax.context_order import slots as context_slots
from stem_jax.data.loader import HostBatch
from stem_jax.kernels.head_loss import head_loss
from stem_jax.kernels.row_sums import adds, way_on
from stem_jax.mesh import BATCH_AXES, CONTEXT, TOKEN_AXES, axis_size
from stem_jax.model.transformer import Inputs
from stem_jax.parts import part
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.block_sizes import BlockSizes, choose_sizes, levels_above, nearly_filled
from stem_jax.tables.requests import Requests
from stem_jax.tables.sharded_table import Demand, ShardedTable
from stem_jax.tables.spec import TableSpec
from stem_jax.training.optimizer import apply_update, clip_factor
from stem_jax.training.schedule import Schedule
from stem_jax.training.state import ModelDef, TrainState, dropout_key, state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A global batch as micro-batches, each array [A, B, L].

    B lies over the batch axes, and L over context in the order of `context_order`.
    tokens, targets, positions, segment_ids: int32. loss_mask: bool, the positions that are scored.
    """

    tokens: jax.Array
    targets: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    loss_mask: jax.Array


class TrainStep:
    """Compiled programs of one configuration on one mesh."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config = config
        self.mesh = mesh
        self.model = ModelDef(config, mesh)
        self.spec = TableSpec.from_config(config)
        self.shardings = state_shardings(config, self.model, mesh)
        self.batch_sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, CONTEXT))
        # The first arguments of `_loss`: parameters and rows.
        self._trains = config.optimizer.trains_backbone, config.optimizer.trains_tables
        # Whoever compiles what is lowered from these gets the options with it.
        options = compiler_options(mesh.devices.flat[0])
        self.update = jax.jit(
            self._update,
            donate_argnums=0,
            static_argnames="sizes",
            out_shardings=(self.shardings, None),
            compiler_options=options,
        )
        self.demand = jax.jit(self._demand, static_argnames="whole", compiler_options=options)
        # What the first batch needed, by the keys of a device.
        self._first_needs: dict[int, BlockSizes] = {}
        self.evaluate = jax.jit(self._evaluate, static_argnames="sizes", compiler_options=options)
        self.caught_up_rows = jax.jit(self._caught_up_rows)

    def place(self, batch: HostBatch) -> Batch:
        """A global batch on the devices, from this process's share [B_local, L] of it."""
        train = self.config.train
        shape = (train.micro_batches, self.config.micro_batch_size, train.seq_len)

        def whole(share_BxL) -> jax.Array:
            share_AxBxL = self._in_context_order(share_BxL).reshape(shape[0], -1, shape[2])
            return jax.make_array_from_process_local_data(self.batch_sharding, share_AxBxL, shape)

        scored = {"loss_mask": batch["loss_mask"] > 0}
        return Batch(**{name: whole(array) for name, array in (batch | scored).items()})

    def _in_context_order(self, x):
        """An array [..., L], each position in its place along `context`."""
        devices = self.mesh.shape[CONTEXT]
        return x if devices == 1 else x[..., context_slots(x.shape[-1], devices)]

    def table(self, tokens_AxBxL, sizes: BlockSizes | None = None) -> ShardedTable | None:
        """The table as a step exchanges it; None for a dense model."""
        if not self.spec.vectors:
            return None
        keys = tokens_AxBxL.size // axis_size(self.mesh, TOKEN_AXES)
        return ShardedTable(self.spec, self.mesh, keys, sizes)

    def _table(self, batch: Batch, sizes: BlockSizes | None = None) -> ShardedTable:
        """Of a model that has one."""
        table = self.table(batch.tokens, sizes)
        assert table is not None, "a dense model has no table"
        return table

    def _caught_up_rows(self, state: TrainState, schedule: Schedule) -> jax.Array:
        """All rows as the next forward would see them, stored: [S, V_pad, F]."""
        table = ShardedTable(self.spec, self.mesh, 1)
        assert state.table is not None
        return table.caught_up_rows(state.table, state.updates, schedule.table)

    def _demand(self, batch: Batch, whole: bool = False) -> Demand:
        """What a batch asks of the table."""
        return self._table(batch).demand(batch.tokens, batch.segment_ids > 0, whole=whole)

    def sizes_for(self, batch: Batch, demand: Demand) -> BlockSizes:
        """One of a few levels, for a batch whose demand has come to the host."""
        table = self._table(batch)
        needed = table.needed_by(demand)
        first = self._first_needs.setdefault(table.keys_per_device, needed)
        return choose_sizes(needed, first, table.largest_sizes)

    def larger_sizes(
        self, batch: Batch, demand: Demand, sizes: BlockSizes, *, near: bool
    ) -> list[BlockSizes]:
        """Levels above the one of a batch; with `near` the next, if this batch nearly needs it."""
        table = self._table(batch)
        first = self._first_needs[table.keys_per_device]
        above = levels_above(sizes, first, table.largest_sizes)
        if not near:
            return above
        return above[:1] if nearly_filled(sizes, table.needed_by(demand), first) else []

    def compile_update(
        self,
        state: TrainState,
        batch: Batch,
        schedule: Schedule,
        slots: jax.Array | jax.ShapeDtypeStruct | None,
        sizes: BlockSizes,
    ) -> None:
        """Compiles the step of other sizes than that of these arguments, or what describes them."""
        if slots is not None:
            room = self._table(batch, sizes).exchange.owned_rows
            size = axis_size(self.mesh, self.spec.vocab_axes) * room
            slots = jax.ShapeDtypeStruct((size,), slots.dtype, sharding=slots.sharding)
        self.update.lower(state, batch, schedule, slots, sizes).compile()

    def asked_by(self, batch: Batch, demand: Demand) -> AskedRows:
        """The rows of an offloaded table that a batch asks for."""
        table = self._table(batch)
        # Lists have room for twice the keys of a device; one owner may be asked for more.
        asked = table.asked_by(demand) or table.asked_by(self.demand(batch, whole=True))
        assert asked is not None, "whole lists have every row"
        return asked

    def _update(
        self,
        state: TrainState,
        batch: Batch,
        schedule: Schedule,
        slots: jax.Array | None = None,
        sizes: BlockSizes | None = None,
    ):
        """One step.

        Args:
            slots: where the rows of an offloaded table lie, see `ShardedTable.request`.
            sizes: of its row blocks; without them there is room for any.
        """
        config = self.config
        scored = jnp.sum(batch.loss_mask)
        table = self.table(batch.tokens, sizes)
        rows, requests = self._rows(state, table, batch, schedule, slots)
        dropped = self._dropped(state.step, batch.tokens)
        loss, cross_entropy, layer_metrics, gradients, row_gradients = self._gradients(
            self.model.copies(state.params), rows, requests, batch, dropped, scored
        )
        finite = jnp.isfinite(loss)
        rate = schedule.rates[state.updates]
        metrics = {"loss": cross_entropy, "learning_rate": rate} | layer_metrics
        if gradients is not None:
            with part("optimizer"):
                norm = global_norm(gradients)
            finite &= jnp.isfinite(norm)
            metrics |= {"grad_norm": norm}
        if table is not None:
            metrics |= self._table_metrics(table, requests)
        if row_gradients is not None and table is not None and state.table is not None:
            # Rows travel in the compute dtype both ways; owners sum in float32.
            with part("row_copies"):
                row_gradients = row_gradients.astype(config.model.compute_dtype)
            row_gradients = table.push(row_gradients, requests)
            row_norm = table.norm(row_gradients)
            with part("row_optimizer"):
                finite &= jnp.isfinite(row_norm)
                row_factor = clip_factor(row_norm, self.spec.clip_norm)
            new_table = table.update(
                state.table,
                requests,
                row_gradients,
                state.updates,
                finite,
                schedule.table,
                row_factor,
            )
            metrics |= {"table_grad_norm": row_norm}
            # Counted as they come: rows in host memory are not here to be counted.
            touched_rows = state.touched_rows + (
                jnp.sum(new_table.last_step > 0) - jnp.sum(state.table.last_step > 0)
            )
            metrics |= {"never_touched_rows": self.spec.layout.num_keys - touched_rows}
        else:
            new_table, touched_rows = state.table, state.touched_rows
        params, opt_state = state.params, state.opt_state
        if gradients is not None:
            with part("optimizer"):
                factor = clip_factor(norm, config.optimizer.clip_norm)
                gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * factor, gradients)
                updated = apply_update(self.model.optimizer, params, opt_state, gradients, rate)
                params, opt_state = jax.tree.map(
                    lambda new, old: jnp.where(finite, new, old), updated, (params, opt_state)
                )
        new_state = TrainState(
            step=state.step + 1,
            updates=state.updates + finite,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            touched_rows=touched_rows,
            params=params,
            opt_state=opt_state,
            table=new_table,
        )
        metrics |= {
            "bad_steps": new_state.bad_steps,
            "skipped_steps": new_state.step - new_state.updates,
            "tokens": scored,
        }
        return new_state, metrics

    def _rows(self, state, table: ShardedTable | None, batch: Batch, schedule: Schedule, slots):
        """The row block that serves all micro-batches of the step, and what was asked for."""
        if table is None:
            return None, None
        requests = table.request(batch.tokens, batch.segment_ids > 0, slots)
        dtype = self.config.model.compute_dtype
        rows = table.fetch(state.table, requests, dtype, state.updates, schedule.table)
        return rows, requests

    def _dropped(self, step: jax.Array, tokens_AxBxL: jax.Array) -> jax.Array | None:
        """The tokens whose embedding this step replaces: a function of seed, step and place."""
        rate = self.config.model.token_embedding_dropout
        if rate == 0:
            return None
        key = jax.random.fold_in(dropout_key(self.config), step)
        return self._in_context_order(jax.random.bernoulli(key, rate, tokens_AxBxL.shape))

    def _gradients(self, params, rows, requests, batch: Batch, dropped, scored):
        """Loss, layers' metrics and gradients, means over all micro-batches' scored positions.

        Gradients of what does not train are None.
        """

        def micro_batch(carry, piece):
            # Sums of all rows are long, and a micro-batch has few of these: where that can be, its
            # layers add to them in place.
            row_sums = carry[1][1] if carry is not None and in_place else None
            places = 0, 1 if row_sums is None else 2
            by = tuple(place for place, trains in zip(places, self._trains) if trains)
            (loss, (cross_entropy, metrics)), found = jax.value_and_grad(
                self._loss, argnums=by, has_aux=True
            )(params, rows, row_sums, *piece, scored)
            values = loss, cross_entropy
            found = dict(zip(by, found))
            gradients, row_gradients = map(found.get, places)
            if carry is None:
                return (values, (gradients, row_gradients)), metrics
            sums, (totals, row_totals) = carry
            if row_sums is None:
                with part("row_copies"):
                    row_gradients = _added(row_totals, row_gradients)
            return (_added(sums, values), (_added(totals, gradients), row_gradients)), metrics

        index = _index(batch, requests)
        in_place = rows is not None and self._trains[1] and adds(way_on(self.mesh))
        if batch.tokens.shape[0] == 1:
            first = jax.tree.map(lambda x: x[0], (batch, index, dropped))
            total, metrics = micro_batch(None, first)
        else:
            begun = [
                part if trains else None
                for part, trains in zip((params, rows), self._trains, strict=True)
            ]
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tuple(begun))
            start = ((jnp.float32(0), jnp.float32(0)), zeros)
            total, metrics = jax.lax.scan(micro_batch, start, (batch, index, dropped))
            metrics = jax.tree.map(lambda pieces: pieces.sum(0), metrics)
        (loss, cross_entropy), (gradients, row_gradients) = total
        return loss, cross_entropy, metrics, gradients, row_gradients

    def _loss(self, params, rows, row_sums, batch: Batch, index, dropped, scored):
        """This micro-batch's part of the mean loss, of the cross-entropy alone, and of metrics.

        Args:
            row_sums: of other micro-batches, or None; see `Transformer`.
        """
        train = self.config.train
        model = self.model.bind(params)
        inverse, order = index
        inputs = Inputs(batch.tokens, inverse, batch.positions, batch.segment_ids, dropped, order)
        hidden, _, aux = model(inputs, rows, row_sums=row_sums)
        aux /= train.micro_batches
        weights = batch.loss_mask / jnp.maximum(scored, 1).astype(jnp.float32)
        loss, cross_entropy = head_loss(
            hidden,
            model.head_weight(),
            batch.targets,
            weights,
            train.z_loss,
            train.loss_chunk,
            self.mesh,
        )
        # An Aux of nothing adds no operation.
        loss = loss if aux.loss is None else loss + aux.loss
        return loss, (cross_entropy, aux.metrics)

    def _evaluate(
        self,
        state: TrainState,
        batch: Batch,
        schedule: Schedule,
        slots: jax.Array | None = None,
        sizes: BlockSizes | None = None,
    ):
        """Sum of the cross-entropy in nats and number of scored positions of a global batch."""
        table = self.table(batch.tokens, sizes)
        rows, requests = self._rows(state, table, batch, schedule, slots)
        index = _index(batch, requests)

        def micro_batch(total, piece):
            loss = self._loss(state.params, rows, None, *piece, None, jnp.int32(1))
            _, (cross_entropy, _) = loss
            return total + cross_entropy, None

        total, _ = jax.lax.scan(micro_batch, jnp.float32(0), (batch, index))
        return total, jnp.sum(batch.loss_mask)

    @part("exchange")
    def _table_metrics(self, table: ShardedTable, requests: Requests):
        """What a step asked of the table.

        distinct_rows: over all devices. exchange_bytes: sent by a device, there and back, with
        padding. busiest_owner: rows asked of it over the mean of all owners.
        """
        spec, exchange = self.spec, table.exchange
        owned = jnp.sum(requests.owned < spec.num_rows)
        numbers = spec.row_size // self.mesh.shape["tensor"]
        itemsize = jnp.dtype(self.config.model.compute_dtype).itemsize
        asked_P = requests.asked.astype(jnp.float32)
        return {
            "distinct_rows": owned,
            "exchange_rounds": jnp.int32(exchange.rounds),
            "exchange_bytes": jnp.float32(numbers * exchange.sent_bytes(itemsize)),
            "busiest_owner": jnp.max(asked_P) / jnp.maximum(jnp.mean(asked_P), 1),
        }


def _added(totals, fresh):
    return jax.tree.map(lambda total, new: total + new.astype(total.dtype), totals, fresh)


def _index(batch: Batch, requests: Requests | None):
    """Of each token's row in the row block, and its order; one for each micro-batch."""
    if requests is None:
        return jnp.zeros_like(batch.tokens), None
    return requests.inverse, requests.order


def global_norm(tree) -> jax.Array:
    """Euclidean norm over all arrays of a tree, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
