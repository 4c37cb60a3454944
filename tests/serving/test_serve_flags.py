"""The flags of a server: what is wrong is said before anything is loaded."""

import pytest

from stem_jax.errors import InputError
from stem_jax.serving.flags import KEY_VARIABLE, open_to_all, parse


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--port=65536", "--port=65536 must be from 0 to 65535"),
        ("--port=-1", "--port=-1 must be"),
        ("--write-timeout=0", "--write-timeout=0.0 must be more than 0 seconds"),
        ("--drain-timeout=nan", "--drain-timeout=nan must be more"),
        ("--drain-timeout=inf", "--drain-timeout=inf must be more"),
        ("--model-name=", "--model-name= is empty"),
    ],
)
def test_wrong_usage(flag, message, capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--workdir=x", flag], None)
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_the_key_comes_by_flag_or_environment(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert parse(["--workdir=x"], None).api_key is None
    monkeypatch.setenv(KEY_VARIABLE, "of the environment")
    assert parse(["--workdir=x"], None).api_key == "of the environment"
    assert parse(["--workdir=x", "--api-key=k"], None).api_key == "k"
    monkeypatch.setenv(KEY_VARIABLE, "of a file\n")
    assert parse(["--workdir=x"], None).api_key == "of a file"
    monkeypatch.setenv(KEY_VARIABLE, " ")
    with pytest.raises(InputError, match=f"{KEY_VARIABLE} is empty"):
        parse(["--workdir=x"], None)


@pytest.mark.parametrize(
    ("host", "key", "is_open"),
    [
        ("127.0.0.1", None, False),
        ("localhost", None, False),
        ("::1", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.168.0.5", None, True),
        ("a.host", None, True),
        ("0.0.0.0", "k", False),
    ],
)
def test_who_may_use_it(host, key, is_open):
    assert open_to_all(host, key) == is_open


def test_it_listens_to_this_machine_alone_unless_told():
    assert parse(["--workdir=x"], None).host == "127.0.0.1"
