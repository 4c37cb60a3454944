"""What a study file may hold, checked before anything is made of it."""

import dataclasses
from typing import Any

from ml_collections import config_dict

from stem_jax.errors import InputError
from stem_jax.study.panels import BASELINE
from stem_jax.study.runs import Phase

_KEYS = (
    *("name", "base", "tokens", "texts", "phases"),
    *("baseline", "claims", "tokens_per_second", "minutes"),
)
_TEXT_KEYS = {"vocab_size": True, "keys": False}
# Of a phase, what is given in a tuple.
_LISTS = ("variants", "seeds", "shares", "rates")


def read_study(module: Any) -> dict[str, Any]:
    """What the file's `get_study()` returns.

    Args:
        module: of the file, as it was run.

    Raises:
        InputError: no such function; a key that is missing or unknown; a value of another kind.
    """
    if not callable(getattr(module, "get_study", None)):
        raise InputError("it has no function get_study(); add one, as configs/study/core.py has")
    raw = module.get_study()
    _check_keys("get_study()", raw, dict.fromkeys(_KEYS, True))
    if not isinstance(raw["base"], config_dict.ConfigDict):
        raise InputError(f"base is {raw['base']!r:.80}; give what a config's get_config() returns")
    for key in ("tokens", "tokens_per_second", "minutes"):
        if not _is_positive(raw[key]) and (key != "minutes" or raw[key] is not None):
            raise InputError(f"{key} is {raw[key]!r}; give a number over 0")
    for key in ("texts", "phases"):
        if not raw[key] or not isinstance(raw[key], (dict,) if key == "texts" else (list, tuple)):
            kind = "dict by name" if key == "texts" else "list"
            raise InputError(f"{key} is {raw[key]!r}; give a {kind} of at least one")
    for name, text in raw["texts"].items():
        _check_keys(f"text {name!r}", text, _TEXT_KEYS)
    for phase in raw["phases"]:
        _check_phase(phase, raw["texts"])
    if raw["baseline"] != BASELINE or not any(BASELINE in p["variants"] for p in raw["phases"]):
        raise InputError(
            f"baseline is {raw['baseline']!r}; results compare with {BASELINE!r}, so name that, "
            "and have it among the variants of a phase"
        )
    return raw


def _check_phase(phase: Any, texts: dict[str, Any]) -> None:
    required = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(Phase)}
    _check_keys("a phase", phase, required)
    where = f"phase {phase['purpose']!r}"
    for key in _LISTS:
        values = phase.get(key)
        if key not in phase or (key == "rates" and values is None):
            continue
        if not isinstance(values, tuple | list) or not values:
            raise InputError(f"{where}: {key} is {values!r}; give a tuple of at least one")
    text = phase.get("text", Phase.text)
    if text not in texts:
        raise InputError(f"{where} reads text {text!r}; known: {', '.join(texts)}")


def _check_keys(where: str, values: Any, required: dict[str, bool]) -> None:
    """required: of each known key, whether it must be there."""
    if not isinstance(values, dict):
        raise InputError(f"{where} is {values!r}; give a dict of {', '.join(required)}")
    if unknown := [key for key in values if key not in required]:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(required)}")
    if missing := [key for key, needed in required.items() if needed and key not in values]:
        raise InputError(f"{where}: key {missing[0]!r} is missing; add it")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
