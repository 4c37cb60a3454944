"""Preparing stores: a stable split, reuse of what was prepared, and the entry point."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.data.corpora import read_corpus
from stem_jax.data.documents import Document
from stem_jax.data.formats import Reading
from stem_jax.data.prepare import prepare_stores, write_stores
from stem_jax.data.sources import SourceSpec, open_sources, parse_sources, read_sources
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer, load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.prepare import main

BYTES = load_tokenizer("bytes")
TEXTS = [f"document {i} ä" * (i % 5 + 1) for i in range(700)]


def _prepare(texts, out, fraction=0.1, seed=0, name="n"):
    return prepare_stores(
        (Document(text, f"{i}") for i, text in enumerate(texts)),
        BYTES,
        out,
        name=name,
        validation_fraction=fraction,
        seed=seed,
        progress=False,
    )


def _texts(store):
    return [BYTES.decode(store.document_ids(i)) for i in range(store.num_documents)]


def test_every_document_is_in_one_split_in_order(tmp_path):
    stores = _prepare(TEXTS, tmp_path)
    train, validation = _texts(stores["train"]), _texts(stores["validation"])
    assert sorted(train + validation) == sorted(TEXTS)
    assert 40 < len(validation) < 100
    assert validation == [text for text in TEXTS if text in set(validation)]
    total = sum(len(text.encode()) for text in TEXTS)
    assert sum(store.num_bytes for store in stores.values()) == total
    assert stores["validation"].meta.split == "validation"
    assert stores["train"].meta.fingerprint == BYTES.fingerprint
    TokenStore.open(tmp_path / "train", verify=True)


def test_the_split_depends_on_seed_and_text_alone(tmp_path):
    def split(texts, **kwargs):
        return set(_texts(_prepare(texts, tmp_path, **kwargs)["validation"]))

    first = split(TEXTS)
    assert split(TEXTS[::-1]) == first
    assert split(TEXTS[:300]) == first & set(TEXTS[:300])
    assert split(TEXTS, seed=1) != first
    assert first <= split(TEXTS, fraction=0.2)
    assert split(TEXTS + TEXTS) == first  # copies stay together


@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=12),
    fraction=st.sampled_from([0.001, 0.3, 0.5, 0.999]),
    seed=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_few_documents_reach_both_splits(tmp_path_factory, texts, fraction, seed):
    stores = _prepare(texts, tmp_path_factory.mktemp("p"), fraction, seed)
    train, validation = _texts(stores["train"]), _texts(stores["validation"])
    assert train and validation
    assert sorted(train + validation) == sorted(texts)


def test_the_document_that_moves_is_the_nearest_in_any_order(tmp_path):
    halves = {split: _texts(store) for split, store in _prepare(TEXTS[:9], tmp_path, 0.5).items()}
    for fraction, small in ((1e-9, "validation"), (1 - 1e-9, "train")):
        moved = {
            tuple(_texts(_prepare(texts, tmp_path, fraction)[small]))
            for texts in (TEXTS[:9], TEXTS[8::-1], TEXTS[4:9] + TEXTS[:4])
        }
        assert len(moved) == 1
        (text,) = moved.pop()
        assert text in halves[small]


def test_no_validation_split_when_asked(tmp_path):
    _prepare(TEXTS[:20], tmp_path, fraction=0.5)
    assert set(_prepare(["only one"], tmp_path, fraction=0)) == {"train"}
    assert not (tmp_path / "validation").exists()  # the earlier one held what is now trained on


@pytest.mark.parametrize("texts, match", [([], "has no text"), (["", ""], "has no text")])
def test_an_empty_corpus_is_refused(tmp_path, texts, match):
    for fraction in (0, 0.1):
        with pytest.raises(InputError, match=f"'mine' {match}"):
            _prepare(texts, tmp_path / "out", fraction, name="mine")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_single_document_is_refused(tmp_path, fraction):
    with pytest.raises(InputError, match=r"single document, .* set validation_fraction to 0"):
        _prepare(["one"], tmp_path, fraction)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_a_fraction_out_of_range_is_refused(tmp_path, fraction):
    with pytest.raises(InputError, match=rf"validation_fraction {fraction} must lie in \[0, 1\)"):
        _prepare(TEXTS, tmp_path, fraction)


def test_a_failing_reader_leaves_nothing(tmp_path):
    def documents():
        yield from (Document(text, "x") for text in TEXTS)
        raise InputError("file is truncated")

    with pytest.raises(InputError, match="truncated"):
        prepare_stores(
            documents(), BYTES, tmp_path / "out", name="n",
            validation_fraction=0.1, seed=0, progress=True,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_parse_sources():
    assert parse_sources("pydoc") == (SourceSpec("pydoc", 1.0),)
    assert parse_sources("pydoc=0.7, data/*.jsonl=3e-1,stdlib") == (
        SourceSpec("pydoc", 0.7),
        SourceSpec("data/*.jsonl", 0.3),
        SourceSpec("stdlib", 1.0),
    )
    assert parse_sources("a=b.txt=2") == (SourceSpec("a=b.txt", 2.0),)


def test_what_is_no_number_after_an_equals_sign_is_part_of_the_path():
    sources = "data/dt=2024/*.txt,lang=en,data/dt=2024/*.txt.gz=0.5,a=1e2"
    assert [(spec.source, spec.weight) for spec in parse_sources(sources)] == [
        ("data/dt=2024/*.txt", 1.0),
        ("lang=en", 1.0),
        ("data/dt=2024/*.txt.gz", 0.5),
        ("a", 100.0),
    ]


@pytest.mark.parametrize("store", [False, True])
def test_a_path_that_ends_like_a_weight_is_asked_about_once(tmp_path, store):
    given = f"{tmp_path}/dt=2024"
    if store:
        documents = [Document(text, text) for text in ("one", "two", "three")]
        options = {"name": "s", "validation_fraction": 0.0, "seed": 0, "progress": False}
        prepare_stores(documents, BYTES, given, **options)
    else:
        Path(given).write_text("text")
        (tmp_path / "dt").write_text("other text")
    with pytest.raises(InputError, match=rf"item '{given}' of data.sources names .* {given}=1$"):
        open_sources(parse_sources(given), BYTES, tmp_path / "cache", progress=False)
    options = {"progress": False, "validation_fraction": 0.0}
    [meant] = open_sources(parse_sources(f"{given}=1"), BYTES, tmp_path / "cache", **options)
    assert (meant.source, meant.weight) == (given, 1.0)


def test_a_run_that_goes_on_takes_a_weight_for_one_whatever_is_there(tmp_path):
    (tmp_path / "dt").write_text("text")
    specs = parse_sources(f"{tmp_path}/dt=2024")
    options = {"progress": False, "validation_fraction": 0.0}
    [before] = open_sources(specs, BYTES, tmp_path / "cache", **options)
    (tmp_path / "dt").unlink()
    (tmp_path / "dt=2024").write_text("came later")
    [after] = open_sources(specs, BYTES, tmp_path / "cache", keep=True, **options)
    assert (after.weight, after.train.meta.checksum) == (2024, before.train.meta.checksum)


def test_the_home_of_the_user_is_found_in_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    options = {"progress": False, "validation_fraction": 0.0}
    [opened] = open_sources(parse_sources("~/*.txt"), BYTES, tmp_path / "cache", **options)
    assert opened.source == "~/*.txt" and opened.train.num_documents == 1


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "item '' of data.sources '' has no name"),
        ("pydoc,", "item '' of data.sources 'pydoc,' has no name"),
        ("pydoc,=2", "item '=2' .* has no name"),
        ("gs:/b/x", "data.sources=gs:/b/x is an address, which is written gs://b/x; give that"),
        ("pydoc,s3:x=0.5", "data.sources=s3:x is an address, which is written s3://x; give that"),
        ("pydoc=0", "weight '0'"),
        ("a=1,pydoc=-1", "item 'pydoc=-1'"),
        ("pydoc=nan", "weight 'nan'"),
        ("pydoc=inf", "weight 'inf'"),
        ("pydoc,pydoc=2", "item 'pydoc=2' .* is given twice"),
    ],
)
def test_parse_sources_names_the_bad_item(text, match):
    with pytest.raises(InputError, match=match):
        parse_sources(text)


@pytest.fixture
def count_prepared(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["name"])
        return write_stores(*args, **kwargs)

    monkeypatch.setattr("stem_jax.data.sources.write_stores", counted)
    return calls


def test_sources_are_prepared_once_and_again_when_anything_changes(tmp_path, count_prepared):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("more text")
    specs = parse_sources(f"facts=2,{tmp_path}/*.txt")

    def prepared(tokenizer=BYTES, **kwargs):
        count_prepared.clear()
        opened = open_sources(specs, tokenizer, tmp_path / "cache", progress=False, **kwargs)
        assert [source.weight for source in opened] == [2.0, 1.0]
        assert [source.train.meta.name for source in opened] == [s.source for s in specs]
        assert all(source.validation.num_documents > 0 for source in opened)
        return list(count_prepared)

    both = [spec.source for spec in specs]
    assert prepared() == both
    assert prepared() == []
    assert prepared(seed=1) == both
    assert prepared(seed=1, validation_fraction=0.3) == both
    (tmp_path / "b.txt").write_text("more text than before")
    assert prepared(seed=1, validation_fraction=0.3) == both[1:]
    # Each has its own folder: what another run made is still there.
    assert prepared() == both[1:]
    assert prepared(seed=1, validation_fraction=0.3) == []
    for record in (tmp_path / "cache").glob("facts-*/source.json"):
        record.unlink()
    assert prepared(seed=1, validation_fraction=0.3) == both[:1]


def test_a_folder_of_stores_is_a_source(tmp_path):
    _prepare(TEXTS, tmp_path / "stores", fraction=0)
    specs = parse_sources(str(tmp_path / "stores"))
    (opened,) = open_sources(specs, BYTES, tmp_path / "cache")
    assert opened.validation is None and opened.train.num_documents == len(TEXTS)
    assert not (tmp_path / "cache").exists()

    with pytest.raises(InputError, match="258 ids, the model only 256"):
        open_sources(specs, BYTES, tmp_path / "cache", vocab_size=256)
    _write_meta(tmp_path / "stores" / "train" / "meta.json", fingerprint="0" * 64)
    with pytest.raises(InputError, match="prepared with tokenizer 000000000000"):
        open_sources(specs, BYTES, tmp_path / "cache")
    with pytest.raises(InputError, match=r"is a folder without train/meta\.json"):
        open_sources([SourceSpec(str(tmp_path))], BYTES, tmp_path / "cache")
    with pytest.raises(InputError, match="matches no file"):
        open_sources([SourceSpec(str(tmp_path / "*.none"))], BYTES, tmp_path / "cache")


def _write_meta(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_read_sources_reads_corpora_and_patterns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert [d.text for d in read_sources([f"{tmp_path}/*"], Reading("body"))] == ["x"]
    assert next(read_sources(["facts"])).origin == "facts#0"


def test_entry_point_trains_a_tokenizer_and_reports(tmp_path, capsys):
    out = tmp_path / "out"
    main(
        [
            "--corpus=facts",
            "--vocab_size=900",
            f"--out={out}",
            "--validation-fraction=0.1",
            "--json",
        ]
    )
    summary = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer_folder(out / "tokenizer")
    train = TokenStore.open(out / "train", fingerprint=tokenizer.fingerprint, verify=True)
    validation = TokenStore.open(out / "validation", fingerprint=tokenizer.fingerprint)
    assert summary["documents"] == train.num_documents + validation.num_documents == 3657
    assert summary["validation_documents"] == validation.num_documents
    assert summary["tokens"] == train.num_tokens + validation.num_tokens
    assert summary["fingerprint"] == tokenizer.fingerprint
    assert summary["bytes_per_token"] == pytest.approx(summary["bytes"] / summary["tokens"], 1e-3)
    assert tokenizer.decode(train.document_ids(0)) in set(read_corpus("facts"))

    path = out / "tokenizer" / "tokenizer.model"
    main(["--corpus=facts", f"--tokenizer_path={path}", f"--out={tmp_path / 'again'}"])
    report = capsys.readouterr().out
    assert f"fingerprint           {tokenizer.fingerprint}" in report
    assert "text                  0.73 MB" in report


def _run(*flags):
    command = [sys.executable, "-m", "stem_jax.prepare", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_exit_codes(tmp_path):
    out = f"--out={tmp_path / 'out'}"
    code, _, stderr = _run(f"--input={tmp_path}/*.txt", "--tokenizer=bytes", out)
    assert code == 1
    assert stderr.startswith("error: input ") and stderr.count("\n") == 1
    assert _run("--help")[0] == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--tokenizer=bytes"],
        ["--corpus=facts"],
        ["--corpus=facts", "--tokenizer=hf"],
        ["--corpus=facts", "--tokenizer=hf", "--vocab-size=300"],
        ["--corpus=facts", "--tokenizer=bytes", "--vocab-size=300"],
        ["--corpus=facts", "--tokenizer-path=x", "--vocab-size=300"],
        ["--corpus=wiki", "--tokenizer=bytes"],
    ],
)
def test_wrong_flags_exit_with_two(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*flags, f"--out={tmp_path / 'out'}"])
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()
    assert "usage" in capsys.readouterr().err


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    documents = [Document(f"text {index}", "here") for index in range(4)]
    with pytest.raises(InputError, match="cannot be written"):
        prepare_stores(
            documents,
            load_tokenizer("bytes"),
            tmp_path / "file" / "store",
            name="x",
            validation_fraction=0.0,
            seed=0,
            progress=False,
        )
