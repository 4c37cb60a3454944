"""Who may ask a server: with its key, or on its own machine."""

import contextlib

import pytest

from stem_jax.serving.app import make_app
from tests.serving.fake_engine import FakeEngine
from tests.serving.served import CHAT, COMPLETIONS, NAME, ask, ask_app, service_of
from tests.serving.test_app import ASKED, said


@pytest.fixture
def service():
    with contextlib.closing(FakeEngine()) as engine:
        yield service_of(engine)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/models", f"/v1/models/{NAME}"])
def test_a_key_is_asked_for(service, path):
    body = None if "models" in path else ASKED
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic s3cret"},
        {"authorization": b"Bearer \xff"},
    ):
        answer = ask(service, path, body, "s3cret", headers=headers)
        assert said(answer)[0] == 401 and answer.headers["www-authenticate"] == "Bearer"
    answer = ask(service, path, body, "s3cret", headers={"authorization": "Bearer s3cret"})
    assert answer.status_code == (200 if path != CHAT else 400)
    assert ask(service, "/health", key="s3cret").status_code == 200


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "a.localhost"])
def test_a_server_of_its_machine_is_asked_by_its_name(service, host):
    app = make_app(service, None, local=True)
    assert ask_app(app, COMPLETIONS, ASKED, {"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [*"evil.example evil.example:8000 127.0.0.1.evil.example evil.example:".split(), "x@localhost"],
)
def test_names_that_others_lead_to_this_machine_are_refused(service, host):
    app = make_app(service, None, local=True)
    status, _, message = said(ask_app(app, COMPLETIONS, ASKED, {"host": host}))
    assert status == 421 and host.partition(":")[0] in message and "localhost" in message
    assert not service.engine.tickets
    # Whoever has the key is no page of another site; and one server for all has many names.
    headers = {"host": host, "authorization": "Bearer k"}
    assert ask_app(make_app(service, "k", local=True), COMPLETIONS, ASKED, headers).is_success
    assert ask_app(make_app(service, None), COMPLETIONS, ASKED, {"host": host}).is_success


def test_a_key_may_have_any_letters(service):
    headers = {"authorization": "Bearer schlüssel".encode()}
    assert ask(service, "/v1/models", key="schlüssel", headers=headers).status_code == 200
