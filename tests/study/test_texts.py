"""A text of the study: by package, without duplicates, the same bytes, whole or refused."""

import dataclasses
import json
import shutil

import pytest

from stem_jax.data.facts import read_facts
from stem_jax.data.prepare import open_stores
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.study import prepare_texts, texts
from stem_jax.study.texts import FACTS_VOCAB_SIZE, load_recipes, open_text, prepare_text
from tests.study.archives import archive, prose, recipe

VOCAB = 300


def _near(text: str) -> str:
    return text.replace("river", "brook", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(recipe, cache, prepared text). Training has a copy of a test document and one like dev's."""
    root = tmp_path_factory.mktemp("texts")
    cache = root / "cache"
    packages = [
        archive(cache, "train", "alpha", {f"docs/{n}.rst": prose(n) for n in (1, 2, 3, 10, 20)}),
        archive(cache, "test", "beta", {f"docs/{n}.rst": prose(n) for n in (10, 11)}),
        archive(cache, "train", "gamma", {"docs/x.rst": _near(prose(21)), "docs/y.rst": prose(4)}),
        archive(cache, "dev", "delta", {f"docs/{n}.rst": prose(n) for n in (20, 21)}),
    ]
    # Half of a test document, twice as long, in training.
    half = prose(11)[:-2] + " " + prose(50, 700)
    packages.append(archive(cache, "train", "omega", {"docs/half.rst": half}))
    given = recipe(*packages)
    text = prepare_text("mine", root / "text", VOCAB, recipe=given, cache=cache, processes=1)
    return given, cache, text


def _documents(text) -> dict:
    return json.loads(text.documents.read_text())


def _texts(text, split: str) -> list[str]:
    tokenizer = load_tokenizer_folder(text.store / "tokenizer")
    folder = text.documents.parent / {"dev": "store/validation", "test": "test/train"}.get(
        split, "store/train"
    )
    store = TokenStore.open(folder, verify=True)
    ids = (store.document_ids(index).tolist()[1:-1] for index in range(store.num_documents))
    return [tokenizer.decode(i) for i in ids]


def test_splits_are_of_packages_and_training_loses_what_they_share(made):
    _, _, text = made
    listed = _documents(text)
    places = {s: [(d["package"], d["path"]) for d in found] for s, found in listed.items()}
    assert places == {
        "train": [
            *(("alpha", f"docs/{n}.rst") for n in (1, 2, 3)),
            ("gamma", "docs/y.rst"),
            ("omega", "docs/half.rst"),
        ],
        "dev": [("delta", "docs/20.rst"), ("delta", "docs/21.rst")],
        "test": [("beta", "docs/10.rst"), ("beta", "docs/11.rst")],
    }
    assert _texts(text, "test") == [prose(10), prose(11)]
    assert _texts(text, "dev") == [prose(20), prose(21)]
    assert _texts(text, "train")[:4] == [prose(n) for n in (1, 2, 3, 4)]
    counted = {p["name"]: (p["documents"], p["exact"], p["near"]) for p in text.record["packages"]}
    assert counted["alpha"] == (3, 2, 0) and counted["gamma"] == (1, 0, 1)


def test_the_list_tells_bytes_and_overlap_in_store_order(made):
    _, _, text = made
    listed = _documents(text)
    stores = open_stores(text.store, load_tokenizer_folder(text.store / "tokenizer"))
    assert [d["bytes"] for d in listed["train"]] == stores["train"].document_bytes.tolist()
    assert [d["bytes"] for d in listed["dev"]] == stores["validation"].document_bytes.tolist()
    assert all("overlap" not in d for d in listed["train"])
    assert [d["overlap"] for d in listed["test"]] == [0.0, 1.0]
    assert text.record["overlap"] == {"test": 0.5, "dev": 0.0}


def test_a_store_of_a_split_is_what_evaluate_reads(made):
    _, _, text = made
    stores = open_stores(text.test, load_tokenizer_folder(text.store / "tokenizer"))
    assert list(stores) == ["train"] and stores["train"].meta.split == "test"
    assert stores["train"].num_documents == text.record["counts"]["test"]["documents"] == 2


def test_the_tokenizer_is_that_of_the_training_split(made, tmp_path):
    _, _, text = made
    train_sentencepiece(_texts(text, "train"), tmp_path / "tokenizer.model", VOCAB)
    there = text.store / "tokenizer/tokenizer.model"
    assert there.read_bytes() == (tmp_path / "tokenizer.model").read_bytes()


def test_the_same_bytes_again_and_for_any_number_of_processes(made, tmp_path, monkeypatch):
    given, cache, text = made
    # Pieces of a document each, so that there is something to share.
    monkeypatch.setattr("stem_jax.data.piece_encoder.PIECE_CHARS", 1)
    again = prepare_text("mine", tmp_path / "text", VOCAB, recipe=given, cache=cache, processes=2)
    first, second = text.documents.parent, tmp_path / "text"
    files = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    assert [f for f in files if (first / f).read_bytes() != (second / f).read_bytes()] == []
    assert again.checksum == text.checksum


def test_a_whole_text_is_not_prepared_again(made, monkeypatch):
    given, cache, text = made
    monkeypatch.setattr(texts, "_documents", None)
    assert prepare_text("mine", text.documents.parent, VOCAB, recipe=given, cache=cache) == text


def test_another_text_in_the_folder_is_refused(made):
    given, cache, text = made
    folder = text.documents.parent
    other = dataclasses.replace(given, packages=given.packages[::-1])
    for name, size, asked in (("mine", 301, given), ("its", VOCAB, given), ("mine", VOCAB, other)):
        with pytest.raises(InputError, match="holds text mine of vocabulary 300, another than"):
            prepare_text(name, folder, size, recipe=asked, cache=cache)


@pytest.mark.parametrize(
    "file",
    [
        "documents.json",
        "store/train/tokens.bin",
        "store/validation/bytes.bin",
        "test/train/documents.bin",
        "store/tokenizer/tokenizer.model",
    ],
)
@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_text_is_refused(made, tmp_path, file, gone):
    _, _, text = made
    folder = shutil.copytree(text.documents.parent, tmp_path / "text")
    open_text(folder)
    if gone:
        (folder / file).unlink()
    else:
        raw = bytearray((folder / file).read_bytes())
        raw[-2] ^= 1
        (folder / file).write_bytes(raw)
    with pytest.raises(InputError) as refused:
        open_text(folder)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_a_folder_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no text\.json, so it is no prepared text"):
        prepare_text("facts", tmp_path, 300)


def test_what_fails_leaves_no_folder(made, tmp_path):
    given, cache, _ = made
    with pytest.raises(InputError, match="vocab_size 100000 is too large"):
        prepare_text("mine", tmp_path / "text", 100_000, recipe=given, cache=cache)
    assert list(tmp_path.iterdir()) == []


def test_a_package_in_two_splits_is_refused(made):
    given, _, _ = made
    twice = dataclasses.replace(given.packages[0], split="test", name="ALPHA")
    for packages, said in (
        ((*given.packages, twice), "is in two splits"),
        ((dataclasses.replace(twice, split="validation"),), "has split 'validation'"),
        (given.packages[:1], "has no package for test"),
    ):
        with pytest.raises(InputError, match=said):
            recipe(*packages).check("mine")


def test_an_unknown_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="text 'poems' is unknown: use one of prose, code, facts"):
        prepare_text("poems", tmp_path / "text", 300)


def test_the_shipped_recipes_name_whole_archives():
    recipes = load_recipes()
    assert list(recipes) == ["prose", "code"]
    for text in recipes.values():
        assert len({p.file for p in text.packages}) == len(text.packages)
        for package in text.packages:
            assert len(bytes.fromhex(package.sha256)) == 32 and package.licence
            assert package.file.endswith(f"-{package.version}.tar.gz")
    # What is tested on in one text is trained on in neither.
    held_out = {p.name for r in recipes.values() for p in r.packages if p.split != "train"}
    assert not held_out & {
        p.name for r in recipes.values() for p in r.packages if p.split == "train"
    }


def test_two_in_five_countries_are_one_token_of_facts(tmp_path, capsys):
    argv = ["--text=facts", f"--vocab-size={FACTS_VOCAB_SIZE}", f"--out={tmp_path / 'facts'}"]
    prepare_texts.main([*argv, "--processes=1"])
    assert "train       3,657" in capsys.readouterr().out
    text = open_text(tmp_path / "facts")
    assert text.test is None and list(_documents(text)) == ["train"]
    tokenizer = load_tokenizer_folder(text.store / "tokenizer")
    assert list(open_stores(text.store, tokenizer)) == ["train"]
    whole = [len(tokenizer.encode_behind(f" {fact.country}")) == 1 for fact in read_facts()]
    assert sum(whole) == 78 and len(whole) == 195
