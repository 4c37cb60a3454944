"""Needles in a haystack: names that are told once among other sentences, and asked for at the end.

    The sky is blue. The agent Alice Heron is here. The grass is green. [...]
    Who is Alice? The agent Alice Heron.

Whoever looks back can answer, and nobody else: names are drawn anew for every document. After the
single-key and multi-key tasks of RULER (arXiv 2404.06654) with its haystack of repeated noise.
"""

import random
from collections.abc import Iterator, Sequence

KEYS = tuple(
    """Alice Arthur Bella Boris Clara Conrad Daisy Daniel Edith Elmer Flora Felix Grace George
    Hanna Henry Iris Isaac Julia Jasper Karla Kevin Laura Linus Maria Martin Nora Noel Olga Oscar
    Paula Peter Queenie Quentin Rosa Robert Sarah Simon Tessa Thomas Ulla Ulrich Vera Victor Wanda
    Walter Yvonne Zachary""".split()
)
VALUES = tuple(
    """Adler Badger Beaver Bison Cobra Condor Coyote Crane Dingo Eagle Falcon Ferret Finch Gecko
    Gibbon Grouse Hare Hawk Heron Hyena Ibis Iguana Jackal Jaguar Kestrel Koala Lark Lemur Lynx
    Magpie Marten Mink Mole Moose Newt Ocelot Otter Owl Panda Parrot Pigeon Puffin Puma Quail
    Rabbit Raven Robin Salmon Seal Shrew Sloth Sparrow Stork Swan Tapir Tiger Toad Trout Turtle
    Viper Walrus Weasel Wolf Wren""".split()
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
    "Birds sing in the trees.",
    "A river runs to the sea.",
    "Snow falls on the hills.",
)

_HAYSTACKS = 12_000
_NAME_PAIRS = 120_000
_ROLL_CALLS = 40_000
_MOST_KEYS = 8
_MOST_FILLER = 64
_SEED = 20260110


def needle(key: str, value: str) -> str:
    """The sentence that tells a name."""
    return f"The agent {key} {value} is here."


def question(key: str) -> str:
    """What asks for the second half of a name; it and a full stop complete it."""
    return f"Who is {key}? The agent {key}"


def draw_needles(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """That many (key, value), all keys and all values different."""
    return list(zip(rng.sample(KEYS, count), rng.sample(VALUES, count)))


def filler(count: int, first: int) -> list[str]:
    """That many sentences of FILLER in turn, from number `first` on."""
    return [FILLER[(first + index) % len(FILLER)] for index in range(count)]


def haystack(sentences: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The sentences with needles among them, as one line.

    needles: (depth, sentence); depth 0 is before the first sentence, 1 after the last.
    """
    places = [(round(depth * len(sentences)), text) for depth, text in needles]
    parts = []
    for index in range(len(sentences) + 1):
        parts += [text for place, text in places if place == index]
        parts += sentences[index : index + 1]
    return " ".join(parts)


def read_needles() -> Iterator[str]:
    """Yields haystacks of one to eight needles in little or much filler, all of them asked for."""
    rng = random.Random(_SEED)
    for _ in range(_HAYSTACKS):
        yield _asked(rng, draw_needles(rng, rng.randint(1, _MOST_KEYS)))


def read_name_pairs() -> Iterator[str]:
    """Yields documents of two names, told twice in any order.

    From so few tokens looking back is learned within two million of them: even a model that looks
    everywhere alike gets half of them right, and a look in the right direction pays at once.
    """
    rng = random.Random(_SEED + 1)
    for _ in range(_NAME_PAIRS):
        yield _told_twice(rng, 2)


def read_roll_calls() -> Iterator[str]:
    """Yields documents of two to eight names, told twice in any order."""
    rng = random.Random(_SEED + 2)
    for _ in range(_ROLL_CALLS):
        yield _told_twice(rng, rng.randint(2, _MOST_KEYS))


def _told_twice(rng: random.Random, count: int) -> str:
    facts = draw_needles(rng, count)
    told = rng.sample(facts, count) + rng.sample(facts, count)
    return " ".join(f"{key} {value}." for key, value in told)


def _asked(rng: random.Random, facts: list[tuple[str, str]]) -> str:
    # A third has no filler, and as many have a little as have much: the easy ones come first.
    count = int(_MOST_FILLER ** (1.5 * rng.random() - 0.5))
    sentences = filler(count, rng.randrange(len(FILLER)))
    text = haystack(sentences, [(rng.random(), needle(*fact)) for fact in facts])
    asked = rng.sample(facts, len(facts))
    answers = " ".join(f"{question(key)} {value}." for key, value in asked)
    return f"{text}\n{answers}\n"
