"""A checkpoint read piece by piece: the model is never in memory whole.

`loading.load_run` puts the parameters and the table with its moments onto a device. Here one
parameter, or a few MiB of rows, are read at a time, straight from the arrays of the checkpoint.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.items import table_items
from stem_jax.checkpoints.loading import checkpoint_fingerprints, open_checkpoint
from stem_jax.checkpoints.older_formats import current_array
from stem_jax.checkpoints.orbax_buckets import kept_store
from stem_jax.checkpoints.tables import first_rows
from stem_jax.config import Config, ModelConfig
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import table_specs
from stem_jax.memory.memory import STEM
from stem_jax.model.lora import adapters, factors, is_output_first
from stem_jax.tables.host_block import HostBlock
from stem_jax.tables.row_optimizer import RowOptimizer
from stem_jax.tables.saved_disk import SavedTier
from stem_jax.tables.spec import TableSpec, TableState, logical, stored
from stem_jax.tables.store_snapshot import NUMBERS
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.schedule import make_schedule

# Of rows that are read at a time; with both moments there are three arrays of this size.
_PIECE_BYTES = 2**24
# Of rows that catch up at a time, which takes some ten arrays of this size.
_SLICE_BYTES = 2**20


class RowEdits(Protocol):
    """What is changed of rows on their way out."""

    def apply(self, ids_n: np.ndarray, rows_nxSxC: np.ndarray, columns: slice) -> np.ndarray:
        """These columns of the rows of some token ids, as edited."""


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """One checkpoint.

    folder: of the step. info: its plain part. tokenizer: that of its rows. edits: of the rows of
    memories, by name. bases: steps that the tables of memories build on, oldest first.
    """

    folder: Path
    info: CheckpointInfo
    tokenizer: Tokenizer
    edits: Mapping[str, RowEdits] = dataclasses.field(default_factory=dict)
    bases: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> Config:
        """As trained."""
        return self.info.config

    @property
    def model(self) -> ModelConfig:
        """The model section of the configuration."""
        return self.config.model

    @property
    def fingerprint(self) -> str:
        """What edits of these rows name."""
        return self.fingerprints[0]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """See `loading.checkpoint_fingerprints`."""
        norm = self.param("norm.scale")
        return checkpoint_fingerprints(self.config, self.info.step, self.tokenizer, norm)

    def param(self, name: str) -> np.ndarray:
        """A parameter of the backbone, as the model reads it: in `model.param_dtype`.

        Of a projection with what an adapter adds to it.
        """
        value = self.trained_param(name)
        projection, _, kind = name.rpartition(".")
        if kind == "kernel" and projection in self.adapters:
            down_IxR, up_RxO = map(self.trained_param, factors(projection))
            added = self.config.lora.scale * (down_IxR @ up_RxO)
            # A projection back into the stream is [out, in].
            value = value + (added.T if is_output_first(projection) else added)
        return value.astype(jnp.dtype(self.model.param_dtype))

    @functools.cached_property
    def adapters(self) -> list[str]:
        """The projections that have one."""
        return adapters(ModelDef(self.config).shapes()) if self.config.lora.rank else []

    def trained_param(self, name: str) -> np.ndarray:
        """The same as training has it, in float32."""
        return current_array(name, self._read("params", name, ...), self.info.format, self.model)

    def table_pieces(
        self, name: str = STEM, only: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, slice, np.ndarray]]:
        """Token ids [n], columns, and these columns of their rows [n, S, columns].

        Together they are the rows of all ids below the vocabulary size, each once, in float32, as
        the next training step would see them: rows of `deferred_adamw` that lag behind catch up
        here.

        Args:
            name: of a memory whose keys are tokens.
            only: token ids, whose rows alone are read; None: all.
        """
        spec = table_specs(self.config)[name]
        if name in self.info.first_rows and name not in self.info.disk:
            raise InputError(
                f"checkpoint {self.folder} has the rows of {_called(name)}'s table alone that were "
                "written while others lay on disk; let the run save another one with "
                f"{spec.resident_key} unset, or with tables.disk and {spec.section}.host_rows"
            )
        lagging = spec.optimizer == "deferred_adamw" and self.info.updates > 0
        catch_up = self._catch_up(name, spec) if lagging else None
        num_rows, num_columns = self._piece_sizes(name, spec)
        for first in range(0, spec.num_rows, num_rows):
            part = slice(first, min(first + num_rows, spec.num_rows))
            keys = spec.layout.key_numbers(np.arange(part.start, part.stop))
            real = keys < spec.layout.num_keys
            if only is not None:
                real &= np.isin(keys, only)
                if not real.any():
                    continue
            for left in range(0, spec.width, num_columns):
                columns = slice(left, min(left + num_columns, spec.width))
                for places, rows in self._rows(name, spec, part, columns, catch_up):
                    ids, rows = keys[places][real[places]], rows[real[places]]
                    if name in self.edits:
                        rows = self.edits[name].apply(ids, rows, columns)
                    yield ids, columns, rows

    def updated_ids(self, name: str = STEM) -> np.ndarray:
        """Token ids whose rows some update of the run had, int32, ascending."""
        spec, found = table_specs(self.config)[name], []
        size = max(1, _PIECE_BYTES // (spec.row_bytes() if name in self.info.disk else 4))
        for first in range(0, spec.num_rows, size):
            part = slice(first, min(first + size, spec.num_rows))
            if name in self.info.disk:
                last_step = self._rows_on_disk(name, spec, part)["last_step"]
            else:
                last_step = self._read_rows(name, "last_step", (part,))
            found.append(spec.layout.key_numbers(first + np.flatnonzero(last_step > 0)))
        return np.sort(np.concatenate(found)).astype(np.int32)

    def _rows(
        self,
        name: str,
        spec: TableSpec,
        part: slice,
        columns: slice,
        catch_up: Callable[[dict], jax.Array] | None,
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Places in the part, from 0, and their rows."""
        if name in self.info.disk:
            fields = self._rows_on_disk(name, spec, part)
        else:
            wanted = (part, slice(None), columns)
            fields = {"rows": self._read_rows(name, "rows", wanted)}
            for field in spec.fields[1:] if catch_up else ():
                own = wanted[: len(field.axes)]
                fields[field.name] = self._read_rows(name, field.name, own)
        rows = fields["rows"]
        if catch_up is None:
            yield slice(0, len(rows)), rows.astype(np.float32)
            return
        size = max(1, _SLICE_BYTES // rows[0].nbytes)
        for first in range(0, len(rows), size):
            places = slice(first, first + size)
            piece = {name: field[places] for name, field in fields.items()}
            yield places, np.asarray(catch_up(piece))

    def _rows_on_disk(self, name: str, spec: TableSpec, part: slice) -> dict[str, np.ndarray]:
        """Rows of all columns, by field, where they lie on disk or are still to be made."""
        arrays = {
            field.name: np.zeros(spec.shape(field.name, 0), field.dtype) for field in spec.fields
        }
        whole = range(spec.num_rows), range(spec.width)
        block = HostBlock(0, 0, *whole, (), frozenset(), False, arrays)
        first = first_rows(self.info, name, spec)

        def zeros(count: int) -> dict[str, np.ndarray]:
            return {
                n: np.zeros((count, *array.shape[1:]), array.dtype) for n, array in arrays.items()
            }

        rows = np.arange(part.start, part.stop)
        found = zeros(len(rows))
        with contextlib.closing(SavedTier(spec, self.info.disk[name], block)) as tier:
            tier.gather(rows, found, lambda new: zeros(len(new)) | {"rows": first.made(spec, new)})
        return found

    def _catch_up(self, name: str, spec: TableSpec) -> Callable[[dict], jax.Array]:
        """Rows as the next step would see them, of a table's fields for some of them."""
        updates, optimizer = self.info.updates, RowOptimizer(spec)
        history = make_schedule(self.config, updates + 1, past=self.info.past).tables[name]

        @jax.jit
        def catch_up(piece: dict) -> jax.Array:
            state = TableState(**{name: stored(field) for name, field in piece.items()})
            places = jnp.arange(state.rows.shape[1])
            return logical(optimizer.read(state, places, updates, history).rows)

        return catch_up

    def _piece_sizes(self, name: str, spec: TableSpec) -> tuple[int, int]:
        """Rows and columns of a piece: those of whole chunks, which are decompressed at once."""
        if name in self.info.disk:
            return max(1, _PIECE_BYTES // spec.row_bytes("rows")), spec.width
        whole = self._table_folders(name)[0]
        shape = self._open(table_items(name)[0], "rows", whole).chunk_layout.read_chunk.shape
        rows, _, columns = (int(size) for size in shape or () if size is not None)
        row_bytes = spec.row_bytes("rows") * columns // spec.width
        return rows * max(1, _PIECE_BYTES // (rows * row_bytes)), columns

    def _table_folders(self, name: str) -> list[Path]:
        """The checkpoints that have a memory's table: the first all rows, others what changed."""
        steps = self.bases.get(name, ())
        return [*(self.folder.parent / str(step) for step in steps), self.folder]

    def _read_rows(self, name: str, field: str, wanted: tuple[slice, ...]) -> np.ndarray:
        """A part of a field of a memory's table."""
        item = table_items(name)[field != "rows"]
        whole, *changes = self._table_folders(name)
        found = self._read(item, field, wanted, whole)
        rows, *columns = wanted
        for folder in changes:
            numbers = self._numbers(name, folder)
            places = np.flatnonzero((numbers >= rows.start) & (numbers < rows.stop))
            if len(places):
                # They ascend within each shard, so that little else lies between.
                span = slice(int(places[0]), int(places[-1]) + 1)
                changed = self._read(item, field, (span, *columns), folder)
                found[numbers[places] - rows.start] = changed[places - span.start]
        return found

    def _numbers(self, name: str, folder: Path) -> np.ndarray:
        """[n] int64, the rows whose changes a checkpoint has, by their places; -1: none."""
        key = name, folder
        if key not in self._numbers_read:
            found = self._read(table_items(name)[0], NUMBERS, ..., folder)
            self._numbers_read[key] = found.astype(np.int64) - 1
        return self._numbers_read[key]

    @functools.cached_property
    def _numbers_read(self) -> dict[tuple[str, Path], np.ndarray]:
        return {}

    def _open(self, item: str, name: str, folder: Path) -> ts.TensorStore:
        store = {"driver": "ocdbt", "base": kept_store(folder / item), "path": f"{name}/"}
        # Without a cache: every chunk is read once.
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        spec = {"driver": "zarr", "kvstore": store}
        try:
            return ts.open(spec, open=True, read=True, context=context).result()
        except ValueError as error:
            raise self._damaged(item, name, error) from error

    def _read(self, item: str, name: str, part, folder: Path | None = None) -> np.ndarray:
        source = self._open(item, name, folder or self.folder)
        try:
            return source[part].read().result()
        except ValueError as error:
            raise self._damaged(item, name, error) from error

    def _damaged(self, item: str, name: str, error: ValueError) -> InputError:
        reason = " ".join(str(error).split())[:200]
        return InputError(
            f"checkpoint {self.folder} is incomplete or damaged ({item}/{name}: {reason}); give "
            "another --step"
        )


def open_saved_model(workdir: str | Path, step: int | None = None) -> SavedModel:
    """Opens a checkpoint of a run; see `loading.open_checkpoint`, as for what is raised."""
    with open_checkpoint(workdir, step) as found:
        folder = found.checkpoints.folder / str(found.step)
        bases = found.checkpoints.bases(found.info)
        of_memory = {
            name: tuple(step for step, names in bases.items() if name in names)
            for name in found.info.bases
        }
        return SavedModel(folder, found.info, found.tokenizer, bases=of_memory)


def _called(name: str) -> str:
    return "STEM" if name == STEM else name
