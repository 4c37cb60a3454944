"""A server that answers as the Hugging Face Hub does, for one model."""

import hashlib
import http.server
import json
import threading

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The part of the hub's API that a download asks for.

    files: of the one model, org/model. refused: a status and the hub's name of the error.
    """

    def __init__(self, files):
        self.files, self.refused = files, None
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                path = self.path.partition("?")[0]
                headers, body, status = {}, b"", 200
                name = path.rpartition(f"/resolve/{COMMIT}/")[2]
                if hub.refused is not None:
                    status, code = hub.refused
                    headers = {"X-Error-Code": code, "X-Error-Message": code}
                elif path in ("/api/models/org/model", "/api/models/org/model/revision/main"):
                    siblings = [{"rfilename": file} for file in hub.files]
                    record = {"id": "org/model", "sha": COMMIT, "siblings": siblings}
                    body = json.dumps(record).encode()
                    headers = {"Content-Type": "application/json"}
                elif path == f"/api/models/org/model/tree/{COMMIT}":
                    tree = [
                        {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                        for file, content in hub.files.items()
                    ]
                    body = json.dumps(tree).encode()
                    headers = {"Content-Type": "application/json"}
                elif path.startswith("/org/model/resolve/") and name in hub.files:
                    body = hub.files[name]
                    digest = hashlib.sha256(body).hexdigest()
                    headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
                else:
                    status, headers = 404, {"X-Error-Code": "RepoNotFound"}
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Of it all are asked who ask the hub."""
    made = Hub({"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"x"})
    # The library reads its variables when it is imported.
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield made
    made.server.shutdown()
    made.server.server_close()
