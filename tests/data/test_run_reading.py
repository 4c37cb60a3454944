"""What a run reads: data.text_field and data.format reach training, tokenizer and conversions."""

import json

import pytest

from stem_jax.config_file import config_from_json
from stem_jax.data.sources import read_sources
from stem_jax.errors import InputError
from stem_jax.interop.calibration_text import _documents
from stem_jax.training.resume import check_resumable
from stem_jax.training.run_data import open_run_data, reading_of

TEXTS = [f"the words of document {i}" for i in range(60)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "shard.json"
    path.write_text("".join(json.dumps({"body": t, "text": "other"}) + "\n" for t in TEXTS))
    return str(path)


def _config(tiny_config, source, **keys):
    keys = {f"data.{key}": value for key, value in keys.items()}
    return tiny_config(**{"data.sources": source, "model.vocab_size": 300, **keys})


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_a_run_reads_the_field_it_is_told(tiny_config, tmp_path, source, tokenizer):
    config = _config(tiny_config, source, text_field="body", tokenizer=tokenizer)
    data = open_run_data(config, tmp_path / "run")
    (store,) = data.stores
    assert data.tokenizer.decode(store.document_ids(0)) in TEXTS
    held_out = 60 - store.num_documents
    again = open_run_data(config, tmp_path / "run", prepared=True)
    assert again.stores[0].meta == store.meta and 0 < held_out < 10


def test_a_format_is_taken_at_its_word(tiny_config, tmp_path, source):
    config = _config(tiny_config, source, format="json", tokenizer="bytes")
    with pytest.raises(InputError, match=r"shard\.json is no JSON array: set --format"):
        open_run_data(config, tmp_path / "run")


def test_a_conversion_reads_as_the_configuration_says(tiny_config, source):
    config = _config(tiny_config, source, text_field="body")
    assert [document.text for document in _documents(source, config)] == TEXTS
    own = read_sources([source], reading_of(config.data, text_field="text"))
    assert {document.text for document in own} == {"other"}


def test_configurations_of_earlier_runs_read_as_they_did(tiny_config, source):
    raw = json.loads(_config(tiny_config, source).to_json())
    del raw["data"]["text_field"], raw["data"]["format"]
    saved = config_from_json(json.dumps(raw))
    assert (saved.data.text_field, saved.data.format) == ("text", "auto")
    check_resumable(saved, _config(tiny_config, source), 0)
    with pytest.raises(InputError, match=r"data\.text_field: 'text' -> 'body'"):
        check_resumable(saved, _config(tiny_config, source, text_field="body"), 0)
