"""Saves of a table that hold the rows that changed: each builds on the save before.

With `checkpoint.full_every` = 3, of a table in host memory or on devices:

    step        100     200      300      400     500
    its items   whole   changes  changes  whole   changes
    builds on   -       100      200      -       400

A row changed if an update after that of the save before had it: its `last_step` says so. What a
kept save builds on is kept; it is told by the list of its files, in case another has its step.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers

from stem_jax.bucket import is_folder
from stem_jax.checkpoints.file_list import LIST, difference, read_list
from stem_jax.checkpoints.items import plain_item, table_items
from stem_jax.config import MEMORY_SECTIONS
from stem_jax.memory.memory import STEM, prefix
from stem_jax.storage import Place


@dataclasses.dataclass(frozen=True)
class Base:
    """What a save of changes of a table builds on.

    step: of the checkpoint. number: of the changes, counted from the whole save: 1, 2, ... mark: of
    the table's files in that checkpoint.
    """

    step: int
    number: int
    mark: int


def mark_of(checkpoint: Place, name: str) -> int | None:
    """Tells the files of a memory's table in a checkpoint from others: no names are equal.

    None where the list of its files is not readable.
    """
    listed = read_list(checkpoint)
    if listed is None:
        return None
    facts = {file: found for file, found in listed.items() if _is_of(file, name)}
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def bases_record(bases: Mapping[str, Base]) -> dict[str, Any]:
    """In the record of a checkpoint: what its tables build on."""
    return {f"{prefix(name)}_base": dataclasses.asdict(base) for name, base in bases.items()}


def bases_of(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Base]:
    """The reverse, of those of these memories whose changes alone are there."""
    found = {name: record.get(f"{prefix(name)}_base") for name in names}
    return {name: Base(**base) for name, base in found.items() if base is not None}


def saved_bases(checkpoint: Place) -> dict[str, Base]:
    """Those of a checkpoint, read without Orbax; none where its record is not readable."""
    return bases_of(plain_item(checkpoint, "layout") or {}, (STEM, *MEMORY_SECTIONS))


def base_damage(checkpoint: Place, *, verify: bool, share: tuple[int, int]) -> str | None:
    """What is wrong with the checkpoints that the tables of one build on, as far as it needs them.

    Args:
        verify, share: see `files.damage`.
    """
    for name in saved_bases(checkpoint):
        above = checkpoint
        while (base := saved_bases(above).get(name)) is not None:
            folder = checkpoint.parent / str(base.step)
            if base.step >= int(above.name):
                return f"it builds on checkpoint {base.step}, which is no earlier one"
            reason = _table_damage(folder, name, base, verify=verify, share=share)
            if reason is not None:
                return f"it builds on checkpoint {base.step}, where {reason}"
            above = folder
    return None


class KeptWithBases:
    """A policy of Orbax: keeps what another one keeps, and all that builds on.

    Where that is more than one, but all on one whole save, the newest that builds on another stays,
    too: damage to one file leaves a checkpoint.
    """

    def __init__(self, policy: checkpoint_managers.PreservationPolicy, checkpoints: Place):
        self._policy, self._checkpoints = policy, checkpoints
        self._bases: dict[int, set[int]] = {}

    def will_build(self, step: int, bases: Iterable[Base]) -> None:
        """A checkpoint that is not there yet is going to build on these."""
        self._bases[step] = {base.step for base in bases}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """See Orbax."""
        kept = self._policy.should_preserve(checkpoints, context=context)
        needed = {c.step: self._chain(c.step) for c in checkpoints}
        chosen = {c.step for c, keep in zip(checkpoints, kept, strict=True) if keep}
        roots = {min(needed[step]) for step in chosen}
        others = [step for step in needed if min(needed[step]) not in roots]
        if len(chosen) > 1 and len(roots) == 1 and others:
            chosen.add(max(others))
        stay = set().union(*(needed[step] for step in chosen))
        return [checkpoint.step in stay for checkpoint in checkpoints]

    def _chain(self, step: int) -> set[int]:
        """The step of a checkpoint, and those of all that it builds on."""
        return {step}.union(*map(self._chain, self._of(step)))

    def _of(self, step: int) -> set[int]:
        if step not in self._bases:
            bases = saved_bases(self._checkpoints / str(step))
            self._bases[step] = {base.step for base in bases.values()}
        return self._bases[step]


def _is_of(file: str, name: str) -> bool:
    return file.partition("/")[0] in table_items(name)


def _table_damage(
    checkpoint: Place, name: str, base: Base, *, verify: bool, share: tuple[int, int]
) -> str | None:
    if not is_folder(checkpoint):
        return "nothing is"
    mark = mark_of(checkpoint, name)
    if mark is None:
        return f"{LIST} is not readable"
    if mark != base.mark:
        return f"{table_items(name)[0]} is another save's"

    def wanted(file: str) -> bool:
        return _is_of(file, name) or file.startswith("layout/")

    return difference(checkpoint, wanted, verify=verify, share=share)
