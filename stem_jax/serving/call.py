"""What a request asks for, by whichever of the two APIs it came."""

import dataclasses

from stem_jax.generation.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Prompt:
    """ids: what every prompt begins with included. text: as it is echoed."""

    ids: tuple[int, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class Call:
    """What a request asks for.

    choices: completions of each prompt. max_tokens: of each; None: up to the end of the context.
    seed: of the request, as `generate --seed` takes it; None: any. stops: texts before which a
    completion ends. logprobs: how many of the likeliest tokens to show; None: no probabilities.
    echo: give the prompt back before the completion. usage: streams end with the counts of tokens.
    """

    prompts: tuple[Prompt, ...]
    choices: int
    max_tokens: int | None
    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    logprobs: int | None
    echo: bool
    stream: bool
    usage: bool
