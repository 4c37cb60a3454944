"""Updates that were made under other learning rates than a run's configuration gives."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from stem_jax.config import Config
from stem_jax.config_file import config_from_json


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run that another one continues, as it was then.

    step: batches consumed. updates: made since the first stage began. config: of this stage.
    """

    step: int
    updates: int
    config: Config


@dataclasses.dataclass(frozen=True)
class PastUpdates:
    """What the first updates of a run followed, beside its configuration.

    endless: so many of the first were made before schedules had an end, and have the rates that
    the formulas give. stages: runs that were continued, the oldest first; their updates count.
    """

    endless: int = 0
    stages: tuple[Stage, ...] = ()

    @property
    def first_step(self) -> int:
        """Batches that the stages consumed; the run's own text begins after them."""
        return self.stages[-1].step if self.stages else 0

    def configs(self, config: Config, updates: int) -> Iterator[tuple[range, Config]]:
        """Which of the first `updates` updates, from 0, are made under which configuration.

        Args:
            config: of the run.
        """
        first = 0
        for end, of_stage in [*((s.updates, s.config) for s in self.stages), (updates, config)]:
            end = max(first, min(end, updates))
            yield range(first, end), of_stage
            first = end

    def and_stage(self, step: int, updates: int, config: Config) -> "PastUpdates":
        """The past of a run that continues one with this past, from a checkpoint of it."""
        return PastUpdates(self.endless, (*self.stages, Stage(step, updates, config)))

    def record(self) -> dict[str, Any]:
        """For JSON; `taken_from` reads it."""
        stages = [
            {"step": s.step, "updates": s.updates, "config": json.loads(s.config.to_json())}
            for s in self.stages
        ]
        return {"endless_updates": self.endless, **({"continued": stages} if stages else {})}

    @classmethod
    def taken_from(cls, data: dict[str, Any]) -> "PastUpdates":
        """The past in a checkpoint's record, whose entries are taken out."""
        # Those that do not say were made when no schedule had an end, and none was continued.
        endless = data.pop("endless_updates", data["updates"])
        stages = (
            Stage(s["step"], s["updates"], config_from_json(json.dumps(s["config"])))
            for s in data.pop("continued", ())
        )
        return cls(endless, tuple(stages))


NO_PAST = PastUpdates()
