"""What an export says of itself to hubs, and of its licence above all."""

import dataclasses

import huggingface_hub
import pytest

from stem_jax.errors import InputError
from stem_jax.interop.model_card import check_licence, model_card


def _card(config, licence):
    return huggingface_hub.ModelCard(model_card(config, 240, licence))


def test_fields_that_hubs_read(tiny_config):
    card = _card(tiny_config(), "apache-2.0")
    fields = card.data.to_dict()
    assert fields == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["stem", "custom_code"],
    }
    assert "Licence: apache-2.0, as said" in card.text
    assert "step 240" in card.text


def test_no_licence_is_said_to_be_none(tiny_config):
    card = _card(tiny_config(), None)
    assert "license" not in card.data.to_dict()
    assert "No licence was said at the export" in card.text


def test_a_dense_model_needs_no_code(tiny_config):
    config = tiny_config()
    model = dataclasses.replace(config.model, stem_layers=())
    card = _card(dataclasses.replace(config, model=model), None)
    assert "trust_remote_code" not in card.text
    assert "tags" not in card.data.to_dict()


@pytest.mark.parametrize("licence", ["Apache 2.0", "", "mit\nother: x"])
def test_what_is_no_licence(licence):
    with pytest.raises(InputError, match=r"is no identifier; give one of the hub's"):
        check_licence(licence)
