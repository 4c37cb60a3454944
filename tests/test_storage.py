"""What a path is: `~` is a home, a colon alone is no address; and addresses of buckets."""

import pathlib

import pytest

from stem_jax import prepare
from stem_jax.config_file import load_config
from stem_jax.errors import InputError
from stem_jax.interop.import_flags import parse
from stem_jax.storage import bucket_of, is_remote, local_path, place

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("gs://bucket/run", None),
        ("s3://bucket", None),
        ("hdfs://host:9000/run", None),
        ("never-heard-of://x", None),
        ("gs:/bucket/run", "gs://bucket/run"),
        ("s3:bucket", "s3://bucket"),
        ("GS://bucket", "gs://bucket"),
        ("gs:", "gs://"),
        ("s3:///bucket", "s3://bucket"),
    ],
)
def test_addresses_are_refused(text, form):
    with pytest.raises(InputError) as refused:
        local_path(text, "--out")
    message = str(refused.value)
    assert message.startswith(f"--out={text} ") and "object storage is not read" in message
    assert f"./{text}" in message
    assert (f"written {form})" in message) if form else ("written" not in message.split(",")[0])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("gs://bucket/runs/tiny", ("gs", "bucket", "runs/tiny")),
        ("s3://bucket/run/", ("s3", "bucket", "run")),
        ("s3://bucket", ("s3", "bucket", "")),
        ("gs://my.bucket/a b/c:d", ("gs", "my.bucket", "a b/c:d")),
    ],
)
def test_an_address_of_a_bucket_is_a_place(text, parts):
    found = place(text, "--workdir")
    assert is_remote(found) and bucket_of(found) == parts
    assert str(found / "x") == f"{text.rstrip('/')}/x" and is_remote((found / "x").parent)
    assert place(found, "--workdir") is found


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("gs:/bucket/run", "gs://bucket/run"),
        ("s3:bucket/run", "s3://bucket/run"),
        ("s3:x", "s3://x"),
        ("S3://bucket", "s3://bucket"),
        ("gcs://bucket/run", "gs://bucket/run"),
        ("s3a://bucket/run", "s3://bucket/run"),
        ("gs:///bucket/run", "gs://bucket/run"),
        ("gs:", "gs://BUCKET/FOLDER"),
    ],
)
def test_an_address_in_another_form_is_told_the_right_one(text, form):
    with pytest.raises(InputError) as refused:
        place(text, "--workdir")
    expected = f"--workdir={text} is an address, which is written {form}; give that, or ./{text} "
    assert str(refused.value).startswith(expected)


@pytest.mark.parametrize("text", ["hdfs://host/run", "az://x/y", "", "~no-such-user-here/x"])
def test_a_place_is_refused_as_a_path_is(text):
    with pytest.raises(InputError) as of_path:
        local_path(text, "--out")
    with pytest.raises(InputError) as of_place:
        place(text, "--out")
    assert str(of_place.value) == str(of_path.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [("s3://", "names no bucket"), ("gs:///", "gs://BUCKET/"), ("gs://b/../c", "has `..`")],
)
def test_an_address_of_nothing_is_refused(text, why):
    with pytest.raises(InputError) as refused:
        place(text, "--out")
    assert why in str(refused.value)


@pytest.mark.parametrize("text", ["runs/tiny", "a/b:c", "./gs://x", "C:/runs"])
def test_a_place_of_this_machine_is_a_path(text):
    assert place(text, "--out") == pathlib.Path(text) and not is_remote(place(text, "--out"))


def test_an_address_of_a_file_is_told_its_path():
    with pytest.raises(InputError, match=r"--path=file:///a/b is an address; .*: /a/b$"):
        local_path("file:///a/b", "--path")


@pytest.mark.parametrize(
    "text", ["runs/tiny", "a/b:c", "a/b://c", "./gs://x", "x:y", "C:\\runs", "C:/runs", "2024:05"]
)
def test_other_names_stay_paths(text):
    assert local_path(text, "--out") == pathlib.Path(text)


def test_a_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    assert local_path("~/runs", "--workdir") == pathlib.Path("/home/of/me/runs")
    assert local_path("~", "--workdir") == pathlib.Path("/home/of/me")
    assert local_path("./~/runs", "--workdir") == pathlib.Path("~/runs")


def test_a_home_of_nobody_is_refused():
    with pytest.raises(InputError, match="--workdir=~no-such-user-here/x names the home"):
        local_path("~no-such-user-here/x", "--workdir")


def test_a_path_is_taken_as_it_is():
    assert local_path(pathlib.Path("~/runs"), "--workdir") == pathlib.Path("~/runs")


def _generate(argv):
    from stem_jax.generate import main

    main(["--prompt=a", *argv])


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (prepare.main, ["--corpus=facts", "--tokenizer=bytes", "--out="]),
        (prepare.main, ["--verify", "--out="]),
        (prepare.main, ["--tokenizer=bytes", "--out=o", "--input="]),
        (prepare.main, ["--corpus=facts", "--out=o", "--tokenizer-path="]),
        (_generate, ["--workdir="]),
        (_generate, ["--workdir", ""]),
    ],
)
def test_an_empty_path_is_not_this_folder(tmp_path, monkeypatch, main, flags):
    monkeypatch.chdir(tmp_path)
    flag = (flags[-1] or flags[-2]).rstrip("=")
    with pytest.raises(InputError, match=f"^{flag}= is empty: give a path; . for this folder$"):
        main(flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key",
    [
        "data.folder",
        "data.tokenizer_path",
        "train.init_from",
        "train.continue_from",
        "train.compilation_cache",
    ],
)
def test_an_empty_key_is_no_path(key):
    with pytest.raises(InputError, match=f"^{key}= is empty: give a path"):
        load_config(ROOT / "configs" / "tiny.py", {key: ""})


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("gs://bucket/text", "^--calibration-text=gs://bucket/text is an address"),
        ("", "^item '' of --calibration-text '' has no name"),
        ("facts,facts", "^item 'facts' of --calibration-text 'facts,facts' is given twice"),
    ],
)
def test_text_is_refused_by_the_name_of_its_flag(text, refusal):
    flags = ["--from=llama", "--path=p", "--workdir=w", "--stem-layers=1"]
    with pytest.raises(InputError, match=refusal):
        parse([*flags, f"--calibration-text={text}"], "")
