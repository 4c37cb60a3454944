"""What a bucket is refused for, as the clients and TensorStore meet it: one line and a remedy."""

import os
import subprocess
import sys

import pytest
import tensorstore as ts
from botocore.exceptions import InvalidRegionError
from etils import epath

from stem_jax import bucket as objects
from stem_jax.bucket_errors import bucket_errors, explain
from stem_jax.errors import InputError
from tests.buckets import Answer
from tests.children import ROOT

pytestmark = pytest.mark.little_effort

_DENIED = {
    "s3": Answer(
        403, b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>no</Message></Error>'
    ),
    "gs": Answer(403, b'{"error": {"code": 403, "message": "no storage.objects.get access"}}'),
}
_WAYS = {
    "reading": lambda path: objects.read_object(path / "x"),
    "listing": lambda path: objects.list_objects(path),
    "writing": lambda path: objects.put(path / "x", b"1"),
    "taking": lambda path: objects.put_if_absent(path / "x", b"1"),
    "asking": lambda path: _asked(path),
}


def _asked(path):
    with bucket_errors(path, "--workdir"):
        return (path / "x").read_bytes()


@pytest.mark.parametrize("way", _WAYS)
def test_no_permission(bucket, way):
    bucket.proxy.answers = [_DENIED[bucket.scheme]]
    with pytest.raises(InputError) as refused:
        _WAYS[way](bucket.path)
    message = str(refused.value)
    assert f"no permission for the bucket {bucket.name}; let these" in message, message
    assert "\n" not in message


def test_a_bucket_of_another_region(s3_bucket):
    body = b'<?xml version="1.0"?><Error><Code>PermanentRedirect</Code><Message>x</Message></Error>'
    s3_bucket.proxy.answers = [Answer(301, body, {"x-amz-bucket-region": "eu-west-3"})]
    with pytest.raises(InputError, match=r"is in the region eu-west-3; set AWS_REGION=eu-west-3$"):
        objects.put(s3_bucket.path / "x", b"1")


def test_connections_that_are_lost(bucket):
    bucket.proxy.answers = [Answer(0, times=2)]
    objects.put(bucket.path / "x", b"1")
    assert bucket.proxy.answers[0].times == 0
    assert objects.read_file(bucket.path / "x") == b"1"


# The clients wait between their attempts.
@pytest.mark.long
def test_a_store_that_fails_for_long(bucket):
    bucket.proxy.answers = [Answer(503)]
    expected = (
        f"the bucket {bucket.name} still failed after all retries .* when the store http://12"
    )
    with pytest.raises(InputError, match=expected):
        objects.put(bucket.path / "x", b"1")


def test_an_object_that_is_missing_is_no_refusal(bucket):
    with pytest.raises(FileNotFoundError), bucket_errors(bucket.path):
        (bucket.path / "missing").read_bytes()


def test_errors_of_files_are_left_alone(tmp_path):
    with pytest.raises(PermissionError), bucket_errors(tmp_path):
        raise PermissionError("no")


def test_an_error_that_is_no_store_s_is_left_alone(bucket):
    with pytest.raises(ZeroDivisionError), bucket_errors(bucket.path):
        print(1 / 0)


def test_what_tensorstore_says(gs_bucket):
    gs_bucket.proxy.answers = [_DENIED["gs"]]
    where = gs_bucket.path / "arrays"
    denied = f"no permission for the bucket {gs_bucket.name}"
    with pytest.raises(InputError, match=denied), bucket_errors(where):
        ts.KvStore.open(f"{where}/").result().write("k", b"1").result()
    said = ValueError('NOT_FOUND: Error writing "s3://x/k": The specified bucket does not exist')
    assert "there is no bucket x" in (explain(said, epath.Path("s3://x/k")) or "")
    said = ValueError("UNAUTHENTICATED: HTTP response code: 401")
    assert "credentials for the bucket x are not" in (explain(said, epath.Path("gs://x/k")) or "")


_WITHOUT = """
import sys
from stem_jax.bucket import put
from stem_jax.errors import InputError
from stem_jax.storage import place
try:
    put(place(sys.argv[1], "--out") / "x", b"1")
except InputError as error:
    print(error)
"""


def _said(address: str, **environment: str | None) -> str:
    own = {**os.environ, **environment}
    kept = {name: value for name, value in own.items() if value is not None}
    command = [sys.executable, "-c", _WITHOUT, address]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=kept, timeout=300)
    assert not done.stderr, done.stderr
    return done.stdout.strip()


def test_no_credentials(s3_bucket):
    without = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    said = _said(str(s3_bucket.path), **without)
    assert "\n" not in said
    assert f"no credentials for the bucket {s3_bucket.name} were found; set AWS_ACCESS" in said


def test_variables_of_another_form(s3_bucket):
    said = _said(str(s3_bucket.path), AWS_ENDPOINT_URL="127.0.0.1:9")
    assert said.startswith(f"{s3_bucket.path}/x: ") and "\n" not in said
    assert "set AWS_ENDPOINT_URL to an address that begins with http:// or https://" in said
    region = explain(InvalidRegionError(region_name="us east"), s3_bucket.path) or ""
    assert "'us east'" in region and "set AWS_REGION to the name of the bucket's region" in region


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["s3", "gs"])
@pytest.mark.parametrize("host", ["no-such-host.invalid", "127.0.0.1"])
def test_a_store_that_is_not_there(bucket_servers, scheme, host):
    # Nobody listens at the discard port.
    nowhere = f"http://{host}:9"
    said = _said(f"{scheme}://b", AWS_ENDPOINT_URL=nowhere, STORAGE_EMULATOR_HOST=nowhere)
    assert "\n" not in said
    what = "cannot be reached" if host == "127.0.0.1" else "cannot be resolved"
    assert said.startswith(f"{scheme}://b/x: ") and f" {nowhere} of the bucket b {what}" in said


def test_a_client_that_is_not_installed(monkeypatch):
    error = ImportError("Install s3fs to access S3")
    assert "pip install s3fs, or stem_jax[s3]" in (explain(error, epath.Path("s3://b/x")) or "")
