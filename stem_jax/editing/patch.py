"""Patches on the rows of a run: how they are made, what they fit, and in which order they apply.

A patch of an edit says what a row is, one of a training what was added to it: an edit writes its
rows, and a training moves those that it finds by what it moved the checkpoint's. So both stack in
either order; see `PatchStack.apply`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.checkpoints.saved_model import SavedModel
from stem_jax.config import Config
from stem_jax.editing.array_file import check_rows
from stem_jax.editing.patch_file import Patch
from stem_jax.editing.swaps import RowRecipe
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import memories, table_specs
from stem_jax.memory.memory import STEM
from stem_jax.memory.token_memory import TokenMemory
from stem_jax.tables.overlaid_rows import OverlaidRows
from stem_jax.tables.row_source import RowSource, ServedRows
from stem_jax.tables.spec import logical

# Rows that are read at a time.
_PIECE = 256


class PatchStack:
    """Patches in the order in which they apply, on the rows of one memory of a checkpoint."""

    def __init__(
        self,
        patches: Sequence[Patch],
        runs: Sequence[str],
        tokenizer: str,
        memory: TokenMemory,
    ):
        """Args:
        runs, tokenizer: fingerprints of the checkpoint, which may have several.
        memory: whose rows all of them write.

        Raises:
            InputError: a patch of another checkpoint or tokenizer, of tokens that it has not, of
                layers without tables, or of another width.
        """
        self._patches = list(patches)
        self._places = {layer: place for place, layer in enumerate(memory.layers)}
        for patch in patches:
            if patch.tokenizer != tokenizer:
                raise InputError(
                    f"patch {patch.name} was made with tokenizer {patch.tokenizer[:12]}, the run "
                    f"has {tokenizer[:12]}: its token ids mean other words; make it again"
                )
            if patch.run not in runs:
                raise InputError(
                    f"patch {patch.name} was made for checkpoint {patch.run[:12]}, this is "
                    f"{runs[0][:12]}; give the --step it was made from, or make it again"
                )
            if patch.ids.max() >= memory.num_keys:
                raise InputError(
                    f"patch {patch.name} writes the rows of token {patch.ids.max()}, the model has "
                    f"{memory.num_keys} tokens; make it again"
                )
            missing = [layer for layer in patch.layers.tolist() if layer not in self._places]
            if missing or patch.after.shape[2] != memory.width:
                of = "" if memory.name == STEM else f"{memory.name} "
                raise InputError(
                    f"patch {patch.name} writes {of}rows of width {patch.after.shape[2]} in layers "
                    f"{patch.layers.tolist()}; the model has {of}tables of width {memory.width} in "
                    f"layers {list(memory.layers)}"
                )

    @property
    def token_ids(self) -> np.ndarray:
        """[E] int32, every token that some patch writes, in ascending order."""
        ids = [patch.ids for patch in self._patches]
        return np.unique(np.concatenate(ids)).astype(np.int32) if ids else np.zeros(0, np.int32)

    def apply(
        self, ids_n: np.ndarray, rows_nxSxC: np.ndarray, columns: slice = slice(None)
    ) -> np.ndarray:
        """The rows of these tokens after all patches, as a copy.

        A row that an edit writes is what it says, if it was made from what it finds, or from what
        is there without the trainings. A training adds to each of its rows what it changed of the
        checkpoint's.

        Args:
            rows_nxSxC: of the checkpoint.
            columns: those of the F that are given.

        Raises:
            InputError: an edit was made from other rows than it finds. If an earlier edit wrote
                them, the two conflict.
        """
        own_nxSxC = np.asarray(rows_nxSxC, np.float32)
        rows_nxSxC, untrained_nxSxC = own_nxSxC.copy(), own_nxSxC.copy()
        writers: dict[tuple[int, int], str] = {}
        place_of = {int(token): place for place, token in enumerate(ids_n)}
        for patch in self._patches:
            if patch.before is None:
                self._add(patch, ids_n, rows_nxSxC, own_nxSxC, columns)
                continue
            for number, token in enumerate(patch.ids.tolist()):
                if token not in place_of:
                    continue
                for column, layer in enumerate(patch.layers.tolist()):
                    place = (place_of[token], self._places[layer])
                    before = patch.before[number, column, columns]
                    # Rows that catch up in pieces of another size are rounded differently.
                    if not any(
                        np.allclose(rows[place], before, rtol=1e-5, atol=1e-7)
                        for rows in (rows_nxSxC, untrained_nxSxC)
                    ):
                        raise InputError(_mismatch(patch, token, layer, writers.get(place)))
                    rows_nxSxC[place] = patch.after[number, column, columns]
                    untrained_nxSxC[place] = rows_nxSxC[place]
                    writers[place] = patch.name
        return rows_nxSxC

    def _add(self, patch: Patch, ids_n, rows_nxSxC, own_nxSxC, columns: slice) -> None:
        """Adds what a training changed, in place; what nobody wrote becomes its own, exactly."""
        _, of_patch, of_rows = np.intersect1d(
            patch.ids, ids_n, assume_unique=True, return_indices=True
        )
        for column, layer in enumerate(patch.layers.tolist()):
            place = self._places[layer]
            after, own = patch.after[of_patch, column, columns], own_nxSxC[of_rows, place]
            found = rows_nxSxC[of_rows, place]
            rows_nxSxC[of_rows, place] = np.where(found == own, after, found + (after - own))


def make_patch(
    run: LoadedRun,
    recipes: Sequence[RowRecipe],
    *,
    layers: Sequence[int] | None = None,
    scale: float = 1.0,
    name: str = "edit",
    description: str = "",
    base: Sequence[Patch] = (),
    memory: str = STEM,
) -> Patch:
    """The patch that some recipes make.

    Args:
        memory: whose rows are written.
        layers: of the model, in which rows are written; None: all with tables.
        scale: times the rows that are written.
        base: patches that apply before, from whose rows this one is made.

    Raises:
        InputError: a model without this memory, one whose keys are no tokens, layers without
            tables, a given row of another shape, or rows that are not finite.
    """
    of_tokens = token_memory(run.config, memory)
    having = of_tokens.layers
    chosen = tuple(having if layers is None else layers)
    unknown = [layer for layer in chosen if layer not in having]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        raise InputError(
            f"--layers={','.join(map(str, chosen))}: the layers with tables are "
            f"{','.join(map(str, having))}; name some of them, each once"
        )
    stack = stack_of(run, base, memory)
    written = [recipe.token_id for recipe in recipes]
    read = sorted({*written, *(token for recipe in recipes for _, token in recipe.parts)})
    rows_nxSxF = stack.apply(np.array(read), read_rows(run, np.array(read, np.int32), memory))
    place_of = {token: place for place, token in enumerate(read)}
    columns = [having.index(layer) for layer in chosen]
    S, F = rows_nxSxF.shape[1:]
    after = np.zeros((len(recipes), len(chosen), F), np.float32)
    for number, recipe in enumerate(recipes):
        if recipe.given is not None:
            if recipe.given.shape not in ((S, F), (F,)):
                raise InputError(
                    f"a row to inject is {recipe.given.shape}; the model's are {(S, F)} over all "
                    f"layers with tables, {(F,)} in each"
                )
            after[number] += scale * np.broadcast_to(recipe.given, (S, F))[columns]
        for weight, token in recipe.parts:
            after[number] += np.float32(weight * scale) * rows_nxSxF[place_of[token]][columns]
    check_rows(
        after,
        f"the edit {description or name} with --scale={scale} writes",
        "give finite weights and a finite scale",
    )
    # In C order, as the file has them.
    before = np.ascontiguousarray(rows_nxSxF[[place_of[token] for token in written]][:, columns])
    return Patch(
        name=name,
        ids=np.array(written, np.int32),
        layers=np.array(chosen, np.int32),
        before=before,
        after=after,
        run=run.fingerprint,
        tokenizer=run.tokenizer.fingerprint,
        description=description,
        memory=memory,
    )


def token_memory(config: Config, name: str) -> TokenMemory:
    """A memory whose rows are tokens', which edits write.

    Raises:
        InputError: the model has no such memory, or keys that are no tokens.
    """
    found = memories(config)
    if not found:
        raise InputError("the model is dense and has no rows to edit; give a run with some")
    memory = found.get(name)
    if isinstance(memory, TokenMemory):
        return memory
    of_tokens = [other for other, of in found.items() if isinstance(of, TokenMemory)]
    what = f"no {name} rows" if memory is None else f"{name} rows, but by hashes of several tokens"
    remedy = " or ".join(f"--memory={other}" for other in of_tokens)
    raise InputError(
        f"the model has {what}; edits write rows of tokens, of which it has "
        + (f"those of {', '.join(of_tokens)}: give {remedy}" if of_tokens else "none")
    )


def stack_of(run: LoadedRun, patches: Sequence[Patch], memory: str = STEM) -> PatchStack:
    """Those of the patches that write a memory; raises InputError if one was made for another."""
    own = [patch for patch in patches if patch.memory == memory]
    of_tokens = token_memory(run.config, memory)
    return PatchStack(own, run.fingerprints, run.tokenizer.fingerprint, of_tokens)


def edited_model(saved: SavedModel, patches: Sequence[Patch]) -> SavedModel:
    """The checkpoint with patched rows, for an export; raises as `edited_run`."""
    stacks = {}
    for name in dict.fromkeys(patch.memory for patch in patches):
        own = [patch for patch in patches if patch.memory == name]
        of_tokens = token_memory(saved.config, name)
        fingerprints = saved.fingerprints, saved.tokenizer.fingerprint
        stacks[name] = PatchStack(own, *fingerprints, of_tokens)
    return dataclasses.replace(saved, edits=stacks)


def edited_run(run: LoadedRun, patches: Sequence[Patch], beside: Sequence[Patch] = ()) -> LoadedRun:
    """The run with patched rows; the rows of the given one are not touched.

    Args:
        beside: patches that do not apply here but to another version of this run: the rows that
            they write are laid over the table as they are, so that one program reads both versions.

    Raises:
        InputError: a patch for another checkpoint, or patches that conflict.
    """
    for name in dict.fromkeys(patch.memory for patch in (*patches, *beside)):
        stack = stack_of(run, patches, name)
        ids = stack_of(run, [*patches, *beside], name).token_ids
        rows = stack.apply(ids, read_rows(run, ids, name))
        laid = OverlaidRows(run.rows[name], run.config.model.vocab_size, rows, ids)
        run = run.with_rows(name, laid)
    return run


def read_rows(run: LoadedRun, ids_n: np.ndarray, memory: str = STEM) -> np.ndarray:
    """Rows [n, S, F] float32 of token ids, read in pieces: an offloaded table has few slots."""
    size = min(_PIECE, table_specs(run.config)[memory].num_slots)
    pieces = [
        _read_piece(run.rows[memory], ids_n[at : at + size]) for at in range(0, len(ids_n), size)
    ]
    return np.concatenate(pieces)


def _read_piece(source: RowSource, ids_n: np.ndarray) -> np.ndarray:
    # A power of two, so that few programs are compiled; a token asked for twice is one row.
    size = 1 << (len(ids_n) - 1).bit_length()
    keys_1xn = jnp.asarray(np.pad(ids_n, (0, size - len(ids_n)), "edge"), jnp.int32)[None]
    return np.asarray(_rows_of(source.serve(keys_1xn), keys_1xn))[: len(ids_n)]


@jax.jit
def _rows_of(block: ServedRows, keys_1xn: jax.Array) -> jax.Array:
    rows_SxUxF, inverse_1xn = block.block(keys_1xn, jnp.float32)
    return logical(rows_SxUxF[:, inverse_1xn[0]])


def _mismatch(patch: Patch, token: int, layer: int, writer: str | None) -> str:
    where = f"the row of token {token} in layer {layer}"
    if writer is None:
        return (
            f"patch {patch.name} was made from another value of {where} than the checkpoint has; "
            "give the patches that it was made on before it"
        )
    return (
        f"patches {writer} and {patch.name} conflict: both write {where}, and the second was not "
        f"made on top of the first; leave one out, or make the second again with --edits={writer}"
    )
