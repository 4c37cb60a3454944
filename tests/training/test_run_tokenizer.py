"""Which tokenizer a run takes: that of its stores as it is, else the configured kind."""

import dataclasses

import pytest

from stem_jax import prepare
from stem_jax.errors import InputError
from stem_jax.training.run_data import open_run_data, run_tokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder that `prepare --tokenizer=bytes` wrote."""
    folder = tmp_path_factory.mktemp("text")
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"text {name} " * 40)
    out = folder / "store"
    prepare.main([f"--input={folder}/*.txt", "--tokenizer=bytes", f"--out={out}", "--json"])
    return out


def _config(tiny_config, **data):
    config = tiny_config(**{"model.vocab_size": 300})
    assert config.data.tokenizer == "sentencepiece"
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def test_a_store_brings_its_tokenizer(store, tiny_config, tmp_path):
    config = _config(tiny_config, sources=str(store))
    data = open_run_data(config, tmp_path)
    assert (data.tokenizer.kind, data.stores[0].num_tokens > 100) == ("bytes", True)
    # The same command goes on.
    assert open_run_data(config, tmp_path, prepared=True).tokenizer.kind == "bytes"


def test_text_that_is_prepared_here_takes_the_configured_kind(store, tiny_config, tmp_path):
    config = _config(tiny_config, sources=f"{store},{store.parent}/*.txt")
    with pytest.raises(InputError, match=r"data.tokenizer='sentencepiece', .*=bytes$"):
        run_tokenizer(config, tmp_path, prepared=False)


def test_a_store_of_another_tokenizer_than_asked_for_is_refused(store, tiny_config, tmp_path):
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"")
    config = _config(tiny_config, sources=str(store), tokenizer_path=str(model))
    with pytest.raises(InputError, match="is not a SentencePiece model"):
        run_tokenizer(config, tmp_path, prepared=False)


@pytest.mark.parametrize(
    ("folders", "why"),
    [
        ([".prepare/new", ".prepare/pieces"], "a prepare was stopped: the same prepare command go"),
        (["train"], "run prepare, or give a file pattern, such as .*/source/\\*.txt"),
        ([], "run prepare, or give a file pattern"),
    ],
)
def test_a_folder_without_stores_is_refused_before_a_tokenizer_is_trained(
    tiny_config, tmp_path, folders, why
):
    source = tmp_path / "source"
    for folder in ("", *folders):
        (source / folder).mkdir(parents=True)
    text = tmp_path / "a.txt"
    text.write_text("text")
    config = _config(tiny_config, sources=f"{text},{source}")
    with pytest.raises(InputError, match=rf"is a folder without train/meta\.json.*{why}"):
        open_run_data(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_one_split_names_the_one_above(store, tiny_config, tmp_path):
    config = _config(tiny_config, sources=str(store / "train"))
    with pytest.raises(InputError, match="a store of one split: give the folder that has train"):
        open_run_data(config, tmp_path / "run")
