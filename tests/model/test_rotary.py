"""Rotary frequencies against transformers', and what scaling promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stem_jax.errors import InputError
from stem_jax.model.rotary import attention_scale, frequencies

HEAD_DIM, TRAINED = 64, 8192


@pytest.fixture
def model(tiny_config):
    def make(**keys):
        named = {f"model.{name}": value for name, value in keys.items()}
        return tiny_config(**{"model.head_dim": HEAD_DIM, **named}).model

    return make


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0])
@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_scaled_frequencies_are_those_of_transformers(model, scaling, factor, theta):
    parameters = {
        "rope_type": scaling,
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": TRAINED,
    }
    if scaling == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=int(TRAINED * factor),
        rope_parameters=parameters,
    )
    expected, scale = ROPE_INIT_FUNCTIONS[scaling](theirs, "cpu")
    ours = model(
        rope_theta=theta, rope_scaling=scaling, rope_factor=factor, rope_original_len=TRAINED
    )
    np.testing.assert_allclose(frequencies(ours), expected.numpy(), rtol=2e-6)
    assert attention_scale(ours) == pytest.approx(scale, rel=1e-6)


@given(
    scaling=st.sampled_from(["llama3", "yarn"]),
    factor=st.floats(1, 64),
    trained=st.integers(256, 10**5),
    theta=st.floats(1e3, 1e6),
)
def test_scaling_stretches_slow_pairs_and_keeps_fast_ones(
    tiny_config, scaling, factor, trained, theta
):
    keys = {"head_dim": HEAD_DIM, "rope_theta": theta}
    config = {f"model.{name}": value for name, value in keys.items()}
    plain = frequencies(tiny_config(**config).model)
    scaled = frequencies(
        tiny_config(
            **config,
            **{"model.rope_scaling": scaling, "model.rope_factor": factor},
            **{"model.rope_original_len": trained},
        ).model
    )
    assert np.all(scaled <= plain * (1 + 1e-6)) and np.all(scaled >= plain / factor * (1 - 1e-6))
    assert np.all(np.diff(scaled) < 0)
    turns = trained * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40], rtol=1e-6)


def test_refusals_name_the_key(model):
    with pytest.raises(InputError, match=r"rope_scaling=yarn needs model.rope_original_len"):
        model(rope_scaling="yarn", rope_factor=2.0)
    with pytest.raises(InputError, match=r"rope_factor=2.0 does nothing with .*=none"):
        model(rope_factor=2.0)
    with pytest.raises(InputError, match=r"rope_factor=0.5 must be at least 1"):
        model(rope_scaling="yarn", rope_factor=0.5, rope_original_len=128)
