"""A config file, overrides and a stored text as a checked `Config`.

A config file is a Python file with `get_config()`, run with the `configs` package beside it. A key
that the file has and the dataclasses have not, or the other way round, is an error.
"""

import ast
import difflib
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stem_jax.config import Config, declared_keys, layer_keys
from stem_jax.config_checks import validate
from stem_jax.config_keys import NOTHING
from stem_jax.config_program import read_config_file
from stem_jax.errors import InputError
from stem_jax.hub import is_of_hub
from stem_jax.layer_patterns import layer_indices
from stem_jax.storage import local_path, place


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> Config:
    """Reads a config file, applies overrides and validates.

    Args:
        path: the file, or the name of a shipped one, as in `--config=tiny`.
        overrides: {"section.key": text}, as in `--config.train.steps=5`.

    Raises:
        InputError: missing file, unknown key, wrong type, or sizes that do not fit together.
    """
    raw = read_config_file(Path(path))
    for name, text in (overrides or {}).items():
        section, _, field = name.partition(".")
        if section not in raw or field not in raw[section]:
            raise InputError(_unknown_key(name, [f"{s}.{k}" for s in raw for k in raw[s]]))
        raw[section][field] = _parse_override(text, _written_types().get(name))
    config = build(raw)
    for name, key in declared_keys().items():
        if (value := config.value_of(name)) is None:
            continue
        if key.path and not (key.hub and is_of_hub(value, name)):
            local_path(value, name)
        if key.run:
            place(value, name)
    return config


def config_from_json(text: str) -> Config:
    """A configuration of `Config.to_json`'s text, also of earlier versions.

    Raises:
        InputError: an unknown key, or a value that is refused.
    """
    return build(with_later_keys(json.loads(text)))


def with_later_keys(raw: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Plain values as this version has them, of an earlier one: with what held before a key was."""
    raw = {section: dict(values) for section, values in raw.items()}
    for name, key in declared_keys().items():
        section, _, field = name.partition(".")
        values = raw.setdefault(section, {})
        if key.formerly is not None:
            old_section, _, old = key.formerly.partition(".")
            if old in raw.get(old_section, {}):
                values.setdefault(field, raw[old_section].pop(old))
        if key.before is not NOTHING:
            values.setdefault(field, _as_written(key))
    return raw


def _as_written(key) -> Any:
    """What held before a key was."""
    if key.layers:
        return "none"
    return list(key.before) if isinstance(key.before, tuple) else key.before


def build(raw: dict[str, dict[str, Any]]) -> Config:
    """Builds and validates the dataclasses from nested plain values, as they are written."""
    sections = typing.get_type_hints(Config)
    _same_keys(raw, list(sections), prefix="")
    written = {name: value for section in sections for name, value in _values(section, raw)}
    _resolve(written)
    built = {
        section: cls(
            **{field: written[f"{section}.{field}"] for field in typing.get_type_hints(cls)}
        )
        for section, cls in sections.items()
    }
    config = Config(**built)
    validate(config)
    return config


def _values(section: str, raw: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The keys of a section, whole, and their values, of the types that may be written."""
    types_ = {n: t for n, t in _written_types().items() if n.partition(".")[0] == section}
    _same_keys(raw[section], [name.partition(".")[2] for name in types_], prefix=f"{section}.")
    for name, hint in types_.items():
        yield name, _coerce(name, raw[section][name.partition(".")[2]], hint)


def _resolve(written: dict[str, Any]) -> None:
    """Puts what they stand for in the place of values that follow from others."""
    for key in layer_keys():
        layers, count = written[key], written["model.num_layers"]
        chosen = layer_indices(key, layers, count)
        if layers != "none" and not chosen and count > 0:
            raise InputError(f'{key} is empty; write "none" for no layers')
        written[key] = chosen
    width, heads = written["model.embed_dim"], written["model.num_heads"]
    if written["model.head_dim"] is None:
        if heads > 0 and width % heads:
            raise InputError(
                f"model.embed_dim={width} does not divide by model.num_heads={heads}; set "
                "model.head_dim, or make it divide"
            )
        written["model.head_dim"] = width // max(heads, 1)


def _written_types() -> dict[str, Any]:
    """Of each key, "section.name", the type of its value in a config file."""
    sections = typing.get_type_hints(Config)
    resolved = {
        f"{section}.{field}": hint
        for section, cls in sections.items()
        for field, hint in typing.get_type_hints(cls).items()
    }
    given = {name: key.written for name, key in declared_keys().items()}
    return {name: resolved[name] if hint is NOTHING else hint for name, hint in given.items()}


def _unknown_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "configs/base.py lists every key"
    return f"unknown config key {key}; {hint}"


def _same_keys(raw: dict, declared: list[str], prefix: str) -> None:
    for key in raw:
        if key not in declared:
            raise InputError(_unknown_key(prefix + key, [prefix + name for name in declared]))
    for key in declared:
        if key not in raw:
            raise InputError(f"config key {prefix}{key} is missing; configs/base.py declares it")


def _parse_override(text: str, hint: Any) -> Any:
    """The value that a text on the command line stands for, as `_coerce` takes it."""
    # 2026_11 is the name of a folder and 1.10 a prompt, where a text is wanted.
    if hint == str | None and text.lower() == "none":
        return None
    if hint in (str, str | None):
        return text
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words and text != "none":
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Returns `value` as the declared type, or raises InputError naming the key and the type."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    for option in options:
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            if isinstance(value, str) and str not in options:
                value = tuple(part.strip() for part in value.strip("()[]").split(",") if part)
            if isinstance(value, int) and item is int and not isinstance(value, bool):
                value = (value,)
            if isinstance(value, list | tuple) and all(type(v) is item for v in value):
                return tuple(value)
        elif option is float and type(value) in (int, float):
            return float(value)
        elif type(value) is option:
            return value
        elif (
            option is str
            and type(value) in (int, float)
            and not any(typing.get_origin(other) is tuple for other in options)
        ):
            # An override such as --config.train.sample_prompt=42 is a text all the same.
            return str(value)
    names = " or ".join(getattr(o, "__name__", str(o)).replace("NoneType", "none") for o in options)
    raise InputError(f"{key}={value!r} is a {type(value).__name__}; it must be {names}")
