"""What a campaign will do: a pure function of its seed."""

import dataclasses
import random
from collections.abc import Sequence

# A fault comes so many steps after the first one of a start.
_FIRST, _LAST = 1, 15


@dataclasses.dataclass(frozen=True)
class Round:
    """A fault to come.

    after: steps since the start before. moment: within what the fault interrupts, from 0 to 1.
    seed: of whatever else it draws, such as the process and the file.
    """

    number: int
    kind: str
    after: int
    moment: float
    seed: int

    def rng(self) -> random.Random:
        """Draws of this round."""
        return random.Random(self.seed)

    def __str__(self) -> str:
        return f"{self.number:4d}  {self.kind}, {self.after} steps on, at {self.moment:.3f}"


def planned(seed: int, rounds: int, kinds: Sequence[str]) -> list[Round]:
    """The rounds: each kind once in an order, then in another. More rounds begin as fewer do."""
    plan: list[Round] = []
    for number in range(rounds):
        cycle, place = divmod(number, len(kinds))
        order = random.Random(f"{seed} order {cycle}").sample(list(kinds), len(kinds))
        rng = random.Random(f"{seed} round {number}")
        after, moment = rng.randrange(_FIRST, _LAST), rng.random()
        plan.append(Round(number, order[place], after, round(moment, 6), rng.randrange(2**32)))
    return plan
