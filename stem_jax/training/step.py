"""The train step: one program from a global batch to the next state, dense or STEM."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stem_jax.compiler_options import compiler_options, has_async_all_to_alls
from stem_jax.config import Config
from stem_jax.context_order import slots as context_slots
from stem_jax.data.loader import KEYS, HostBatch, with_keys
from stem_jax.kernels.head_loss import head_loss
from stem_jax.kernels.row_sums import adds, way_on
from stem_jax.memory.catalogue import keys_on_the_host
from stem_jax.mesh import CONTEXT
from stem_jax.model.inputs import Inputs, RowIndex
from stem_jax.parts import part
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.requests import Requests
from stem_jax.tables.sharded_table import Demand, ShardedTable
from stem_jax.training.batch import Batch
from stem_jax.training.blueprint import Blueprint, Params
from stem_jax.training.optimizer import apply_update, clip_factor
from stem_jax.training.reads import Reads, ReadSizes, all_finite
from stem_jax.training.schedule import Schedule
from stem_jax.training.state import TrainState, dropout_key, state_shardings


class TrainStep:
    """Compiled programs of one configuration on one mesh."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config = config
        self.mesh = mesh
        self.blueprint = Blueprint(config, mesh)
        self.model = self.blueprint.model
        self.reads = Reads(self.blueprint)
        self._keys_of = keys_on_the_host(self.reads.memories)
        self.shardings = state_shardings(self.blueprint)
        self.batch_sharding = self.blueprint.batch_sharding
        # The first arguments of `_loss`: parameters and rows.
        self._trains = config.optimizer.trains_backbone, config.optimizer.trains_tables
        # Whoever compiles what is lowered from these gets the options with it.
        device = mesh.devices.flat[0]
        options = compiler_options(device)
        self._async_exchange = has_async_all_to_alls(device)
        self.update = jax.jit(
            self._update,
            donate_argnums=0,
            static_argnames="sizes",
            out_shardings=(self.shardings, None),
            compiler_options=options,
        )
        self.demand = jax.jit(self.reads.demand, static_argnames="whole", compiler_options=options)
        self.evaluate = jax.jit(self._evaluate, static_argnames="sizes", compiler_options=options)
        self.caught_up_rows = jax.jit(self._caught_up_rows)

    def place(self, batch: HostBatch) -> Batch:
        """A global batch on the devices, from this process's share [B_local, L] of it.

        Keys of several tokens that do not come with it are made here, where they still lie in their
        order.
        """
        train = self.config.train
        shape = (train.micro_batches, self.config.micro_batch_size, train.seq_len)

        def whole(share_BxL) -> jax.Array:
            more = share_BxL.shape[2:]
            share = self._in_context_order(share_BxL, 1).reshape(shape[0], -1, shape[2], *more)
            return jax.make_array_from_process_local_data(
                self.batch_sharding, share, (*shape, *more)
            )

        if self._keys_of and not any(name.startswith(KEYS) for name in batch):
            batch = with_keys(batch, self._keys_of)
        scored = {"loss_mask": batch["loss_mask"] > 0}
        arrays = {name: whole(array) for name, array in (batch | scored).items()}
        keys = {
            name.removeprefix(KEYS): arrays.pop(name) for name in batch if name.startswith(KEYS)
        }
        return Batch(**arrays, keys=keys)

    def _in_context_order(self, x, axis: int):
        """An array, each position along an axis in its place along `context`."""
        devices = self.mesh.shape[CONTEXT]
        return x if devices == 1 else x.take(context_slots(x.shape[axis], devices), axis)

    def _caught_up_rows(self, state: TrainState, schedule: Schedule) -> dict[str, jax.Array]:
        """All rows as the next forward would see them, stored: [S, V_pad, F]."""
        return {
            name: ShardedTable(spec, self.mesh, 1).caught_up_rows(
                state.tables[name], state.updates, schedule.tables[name]
            )
            for name, spec in self.reads.specs.items()
        }

    def compile_update(
        self,
        state: TrainState,
        batch: Batch,
        schedule: Schedule,
        slots: dict[str, jax.Array],
        sizes: ReadSizes,
    ) -> None:
        """Compiles the step of other sizes than that of these arguments, or what describes them."""
        tables, described = self.reads.tables(batch, sizes), {}
        for name, old in slots.items():
            exchange = tables[name].exchange
            size = exchange.num_owners * exchange.owned_rows
            described[name] = jax.ShapeDtypeStruct((size,), old.dtype, sharding=old.sharding)
        self.update.lower(state, batch, schedule, described, sizes).compile()

    def asked_by(self, batch: Batch, demand: dict[str, Demand]) -> dict[str, AskedRows]:
        """The rows of offloaded tables that a batch asks for."""
        return self.reads.asked_by(batch, demand, functools.partial(self.demand, whole=True))

    def _update(
        self,
        state: TrainState,
        batch: Batch,
        schedule: Schedule,
        slots: dict[str, jax.Array] | None = None,
        sizes: ReadSizes | None = None,
    ):
        """One step.

        Args:
            slots: where the rows of offloaded tables lie, see `ShardedTable.request`.
            sizes: of the row blocks; without them there is room for any.
        """
        config = self.config
        scored = jnp.sum(batch.loss_mask)
        tables = self.reads.tables(batch, sizes)
        rows, requests = self.reads.fetch(tables, state, batch, schedule, slots or {})
        dropped = self._dropped(state.step, batch.tokens)
        loss, cross_entropy, layer_metrics, gradients, row_gradients = self._gradients(
            self.model.copies(state.params), rows, requests, batch, dropped, scored
        )
        finite, after = jnp.isfinite(loss), None
        rate = schedule.rates[state.updates]
        metrics = {"loss": cross_entropy, "learning_rate": rate} | layer_metrics
        if gradients is not None:
            with part("optimizer"):
                norm = global_norm(gradients)
                if self._async_exchange:
                    # Rows' gradients are whole before the first layers', and travel under these.
                    after = global_norm([g for n, g in gradients.items() if n.startswith("blocks")])
            finite &= jnp.isfinite(norm)
            metrics |= {"grad_norm": norm}
        metrics |= self.reads.metrics(tables, requests)
        new_tables, touched_rows = state.tables, state.touched_rows
        if row_gradients is not None:
            sums, row_norms = self.reads.push(tables, requests, row_gradients, after)
            with part("row_optimizer"):
                finite = all_finite(row_norms.values(), finite)
            new_tables, touched_rows, of_update = self.reads.update(
                tables, requests, sums, row_norms, state, finite, schedule
            )
            metrics |= of_update
        params, opt_state = state.params, state.opt_state
        if gradients is not None:
            with part("optimizer"):
                factor = clip_factor(norm, config.optimizer.clip_norm)
                gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * factor, gradients)
                trained, _ = self._parts(params)
                updated = apply_update(self.model.optimizer, trained, opt_state, gradients, rate)
                trained, opt_state = jax.tree.map(
                    lambda new, old: jnp.where(finite, new, old), updated, (trained, opt_state)
                )
                params = {**params, **trained}
        new_state = TrainState(
            step=state.step + 1,
            updates=state.updates + finite,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            touched_rows=touched_rows,
            params=params,
            opt_state=opt_state,
            tables=new_tables,
        )
        metrics |= {
            "bad_steps": new_state.bad_steps,
            "skipped_steps": new_state.step - new_state.updates,
            "tokens": scored,
        }
        return new_state, metrics

    def _dropped(self, step: jax.Array, tokens_AxBxL: jax.Array) -> jax.Array | None:
        """The tokens whose embedding this step replaces: a function of seed, step and place."""
        rate = self.config.model.token_embedding_dropout
        if rate == 0:
            return None
        key = jax.random.fold_in(dropout_key(self.config), step)
        return self._in_context_order(jax.random.bernoulli(key, rate, tokens_AxBxL.shape), 2)

    def _gradients(self, params, rows, requests, batch: Batch, dropped, scored):
        """Loss, layers' metrics and gradients, means over all micro-batches' scored positions.

        Gradients of what does not train are None, or are not among those of the parameters.
        """
        params, frozen = self._parts(params)

        def micro_batch(carry, piece):
            # Sums of all rows are long, and a micro-batch has few of these: where that can be, its
            # layers add to them in place.
            row_sums = carry[1][1] if carry is not None and in_place else None
            places = 0, 1 if row_sums is None else 2
            by = tuple(place for place, trains in zip(places, self._trains) if trains)
            (loss, (cross_entropy, metrics)), found = jax.value_and_grad(
                self._loss, argnums=by, has_aux=True
            )(params, rows, row_sums, *piece, scored, frozen)
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

        index = _index(requests)
        in_place = bool(rows) and self._trains[1] and adds(way_on(self.mesh))
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

    def _parts(self, params: Params) -> tuple[Params, Params]:
        """The parameters that steps change, where they train the backbone, and the others."""
        trained = {name: p for name, p in params.items() if self.model.trains(name)}
        return trained, {name: p for name, p in params.items() if name not in trained}

    def _loss(self, params, rows, row_sums, batch: Batch, index, dropped, scored, frozen=None):
        """This micro-batch's part of the mean loss, of the cross-entropy alone, and of metrics.

        Args:
            frozen: parameters beside the others.
            row_sums: of other micro-batches, or None; see `Transformer`.
        """
        train = self.config.train
        model = self.model.bind(params | (frozen or {}))
        inputs = Inputs(batch.tokens, batch.positions, batch.segment_ids, index, dropped)
        outputs = model(inputs, rows, row_sums=row_sums)
        aux = outputs.aux / train.micro_batches
        weights = batch.loss_mask / jnp.maximum(scored, 1).astype(jnp.float32)
        loss, cross_entropy = head_loss(
            outputs.hidden,
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
        slots: dict[str, jax.Array] | None = None,
        sizes: ReadSizes | None = None,
    ):
        """Sum of the cross-entropy in nats and number of scored positions of a global batch."""
        tables = self.reads.tables(batch, sizes)
        rows, requests = self.reads.fetch(tables, state, batch, schedule, slots or {})
        index = _index(requests)

        def micro_batch(total, piece):
            loss = self._loss(state.params, rows, None, *piece, None, jnp.int32(1))
            _, (cross_entropy, _) = loss
            return total + cross_entropy, None

        total, _ = jax.lax.scan(micro_batch, jnp.float32(0), (batch, index))
        return total, jnp.sum(batch.loss_mask)


def _added(totals, fresh):
    return jax.tree.map(lambda total, new: total + new.astype(total.dtype), totals, fresh)


def _index(requests: dict[str, Requests]) -> dict[str, RowIndex]:
    """Where the rows of each micro-batch are in the row blocks."""
    return {name: RowIndex(found.inverse, found.order) for name, found in requests.items()}


def global_norm(tree) -> jax.Array:
    """Euclidean norm over all arrays of a tree, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))
