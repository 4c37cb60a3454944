"""A store that is not there is told of soon; one that has answered is not asked again."""

import contextlib
import socket
import threading
import time

import pytest
from etils import epath

from stem_jax import bucket_reach
from stem_jax.bucket_reach import check_reached
from stem_jax.errors import InputError
from tests.children import free_port

WHERE = epath.Path("s3://b/x")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(bucket_reach, "_reached", {})
    monkeypatch.setattr(bucket_reach, "_AGAIN_SECONDS", 0.1)


@pytest.mark.parametrize(
    ("host", "what"), [("127.0.0.1", "reached"), ("no-such-host.invalid", "resolved")]
)
def test_it_is_refused_in_a_line(monkeypatch, host, what):
    monkeypatch.setattr(bucket_reach, "_SECONDS", 0.3)
    url = f"http://{host}:{free_port()}"
    with pytest.raises(InputError) as refused:
        check_reached(url, WHERE)
    said = str(refused.value)
    assert said.startswith("s3://b/x: the ")
    assert f" {url} of the bucket b cannot be {what} (" in said
    assert said.endswith("; look at the network, and at AWS_ENDPOINT_URL if it is set")


def test_one_that_comes_late_is_waited_for():
    port = free_port()

    def listen() -> None:
        time.sleep(0.3)
        server.bind(("127.0.0.1", port))
        server.listen()

    with contextlib.closing(socket.socket()) as server:
        thread = threading.Thread(target=listen)
        thread.start()
        check_reached(f"http://127.0.0.1:{port}", WHERE)
        thread.join()
    # It has answered: what follows is for the clients, which try again.
    check_reached(f"http://127.0.0.1:{port}", WHERE)


def test_one_behind_a_proxy_is_for_its_clients(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:1")
    check_reached("https://no-such-host.invalid", WHERE)
