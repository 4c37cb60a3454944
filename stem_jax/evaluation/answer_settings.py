"""How a task of the harness wants its answers generated (lm-eval 0.4.13)."""

import dataclasses
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from stem_jax.errors import InputError
from stem_jax.generation.sampling import Sampling

# What a task may say about sampling; anything else would be ignored without a word.
_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """sampling: how tokens are drawn. room: new tokens at most. until: texts that end an answer."""

    sampling: Sampling
    room: int
    until: tuple[str, ...]

    @classmethod
    def from_task(
        cls, task: str, kwargs: dict[str, Any], default_room: int, context: int
    ) -> "AnswerSettings":
        """What the generation_kwargs of a task say.

        Args:
            default_room: new tokens where the task does not say how many.
            context: tokens that prompt and answer have together.

        Raises:
            InputError: a key that we have not, a value out of range, or an answer that leaves no
                room for its prompt; names task, key and remedy.
        """
        where = f"task {task!r} sets generation_kwargs"
        try:
            given: dict[str, Any] = normalize_gen_kwargs(kwargs, default_room)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}={kwargs}, which is no setting ({error})") from error
        unknown = sorted(set(given) - _KEYS)
        if unknown:
            raise InputError(
                f"{where}.{unknown[0]}={given[unknown[0]]!r}, which is not supported; use "
                f"{', '.join(sorted(_KEYS))}, or leave the task out"
            )
        room, until = given["max_gen_toks"], tuple(given["until"])
        if not 0 < room < context:
            raise InputError(
                f"task {task!r} asks for max_gen_toks={room} new tokens, the context of "
                f"train.seq_len={context} takes 1 to {context - 1}; set it in the task's "
                "generation_kwargs, or give --max-gen-toks where the task does not"
            )
        if not given["do_sample"]:
            return cls(Sampling(temperature=0.0, top_k=0, top_p=1.0), room, until)
        values = given.get("temperature", 1.0), given.get("top_k", 0), given.get("top_p", 1.0)
        try:
            sampling = Sampling(float(values[0]), int(values[1]), float(values[2]))
        except (InputError, TypeError, ValueError) as error:
            raise InputError(f"{where} that cannot be used: {error}; change the task") from error
        return cls(sampling, room, until)
