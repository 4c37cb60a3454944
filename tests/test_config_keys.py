"""What a key's declaration says of it: roles, values before it existed, the key that it was."""

import dataclasses
import json
import types

import pytest

from stem_jax.checkpoints.origin import _check_shapes
from stem_jax.config import declared_keys, differing_keys, keys_of
from stem_jax.config_file import config_from_json
from stem_jax.config_keys import NOTHING, Role
from stem_jax.errors import InputError
from stem_jax.training.resume import check_continuable, check_resumable

# Of each role a key that a run could not do without it, and another value.
CHANGES = {
    Role.SHAPE: ("model.ffn_dim", 96),
    Role.FIXED: ("optimizer.beta2", 0.97),
    Role.CONTINUED: ("train.z_loss", 0.5),
    Role.SCHEDULE: ("optimizer.learning_rate", 5e-4),
    Role.START: ("train.init_from", "elsewhere"),
    Role.HARMLESS: ("train.log_every", 7),
}


def _changed(config, key: str, value):
    section, name = key.split(".")
    part = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: part})


def _accepts(check, *args) -> bool:
    try:
        check(*args)
    except InputError as error:
        assert str(error)
        return False
    return True


@pytest.mark.parametrize("role", CHANGES)
def test_roles_decide(tiny_config, tmp_path, role):
    key, value = CHANGES[role]
    config = tiny_config()
    other = _changed(config, key, value)
    assert differing_keys(config, other) == [key] and key in keys_of(role)
    free = role in (Role.START, Role.HARMLESS)
    # Without an update made, no learning rate is another.
    assert _accepts(check_resumable, config, other, 0) == (free or role is Role.SCHEDULE)
    # With some, they were.
    assert _accepts(check_resumable, config, other, 5) == free
    continues = free or role in (Role.SCHEDULE, Role.CONTINUED)
    assert _accepts(check_continuable, tmp_path, 0, config, other) == continues
    info = types.SimpleNamespace(config=config)
    origin = types.SimpleNamespace(
        key="train.init_from", folder=tmp_path, info=info, continues=False
    )
    taken = _accepts(_check_shapes, origin, other)
    assert taken == (role is not Role.SHAPE)


def test_texts_of_before_a_key(tiny_config):
    config = tiny_config()
    raw = json.loads(config.to_json())
    for name, key in declared_keys().items():
        section, field = name.split(".")
        if key.before is not NOTHING:
            del raw[section][field]
    earlier = config_from_json(json.dumps(raw))
    for name, key in declared_keys().items():
        expected = config.value_of(name) if key.before is NOTHING else key.before
        assert earlier.value_of(name) == expected, name


def test_the_key_that_it_was(tiny_config):
    config = tiny_config()
    raw = json.loads(config.to_json())
    raw["tables"]["param_dtype"] = raw["tables"].pop("row_format")
    assert config_from_json(json.dumps(raw)) == config
    raw["tables"]["param_dtype"] = "float64"
    with pytest.raises(InputError, match=r"tables\.row_format='float64' is unknown"):
        config_from_json(json.dumps(raw))
    # Both: the old one is what it is, a key that nobody declares.
    raw = json.loads(config.to_json())
    raw["tables"]["param_dtypes"] = "float32"
    with pytest.raises(InputError, match=r"unknown config key tables\.param_dtypes"):
        config_from_json(json.dumps(raw))


def test_former_keys_are_no_keys_of_today():
    keys = declared_keys()
    assert not [key.formerly for key in keys.values() if key.formerly in keys]
