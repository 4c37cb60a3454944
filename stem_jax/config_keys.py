"""What a configuration key is to the rest of the code: its role stands beside its declaration."""

import dataclasses
import enum
from typing import Any


class Role(enum.Enum):
    """What becomes of a run, or of its checkpoints, where a key's value changes."""

    # The arrays of a checkpoint are shaped by it: nothing with another value takes them.
    SHAPE = "shape"
    # What is computed, and what moments and rows that lag behind are meant for.
    FIXED = "fixed"
    # What is computed; a run that continues another (`train.continue_from`) may change it.
    CONTINUED = "continued"
    # As before, as long as the updates made so far had the same learning rates.
    SCHEDULE = "schedule"
    # What a run begins with; one that goes on does not read it.
    START = "start"
    # Where and how the same is computed, or what is reported of it.
    HARMLESS = "harmless"


NOTHING = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A declared key.

    Attributes:
        role: what changing it means.
        written: type of its value in a config file, where that is another than in the dataclass.
        before: what held before it existed, for texts that lack it; NOTHING: no text does.
        formerly: the key, "section.name", whose value it takes in texts that have that one.
        path: whether it names a file or a folder of this machine.
        hub: whether that may also be on the Hugging Face Hub, by `hf://ORG/NAME`.
        run: whether it names the folder of a run, which may be in a bucket.
        kind: the kind of layer whose layers it lists.
        of_kind: the kind of layer without which it does nothing.
        layers: whether it lists layers, by a pattern or by indices.
    """

    role: Role
    written: Any = NOTHING
    before: Any = NOTHING
    formerly: str | None = None
    path: bool = False
    hub: bool = False
    run: bool = False
    kind: str | None = None
    of_kind: str | None = None
    layers: bool = False


def key(role: Role, **more: Any) -> Any:
    """A field of a section; see `Key` for the arguments."""
    return dataclasses.field(metadata={"key": Key(role, **more)})
