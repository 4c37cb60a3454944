"""What goes wrong with a bucket, in one line with its name and a remedy, whichever client says it.

Small files travel by s3fs and gcsfs, arrays by TensorStore; each has exceptions of its own, and
TensorStore has one for everything, whose text begins with a code.
"""

import asyncio
import contextlib
import errno
import re
import socket
from collections.abc import Iterator

from stem_jax.bucket_reach import store_of
from stem_jax.errors import InputError
from stem_jax.storage import Place, bucket_of, is_remote

_SETUP = {
    "s3": (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run aws configure; AWS_ENDPOINT_URL "
        "for a store of another maker"
    ),
    "gs": (
        "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to a key "
        "file"
    ),
}
_EXTRA = {"s3": "s3fs", "gs": "gcsfs"}
# Names of exceptions, so that no client is imported to look at what another one raised.
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "RefreshError",
}
_UNREACHABLE = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "HTTPClientError",
    "ClientConnectorError",
    "ClientConnectorDNSError",
    "ServerDisconnectedError",
    "ClientOSError",
    "ClientPayloadError",
    "ServerTimeoutError",
    "ProxyConnectionError",
    "NewConnectionError",
    "MaxRetryError",
}
# Codes of S3, in its answers and as s3fs has them.
_REGION = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "Redirect",
    "301",
    "307",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"}
_BAD_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401"}
_BUSY = {"SlowDown", "ServiceUnavailable", "InternalError", "500", "502", "503", "504", "429"}
# How a message of TensorStore begins.
_STATUS = re.compile(
    r"\b(PERMISSION_DENIED|UNAUTHENTICATED|NOT_FOUND|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|"
    r"RESOURCE_EXHAUSTED|INTERNAL|FAILED_PRECONDITION|UNKNOWN|INVALID_ARGUMENT)\b"
)
_NO_BUCKET = ("nosuchbucket", "bucket does not exist")


@contextlib.contextmanager
def bucket_errors(where: Place, flag: str = "") -> Iterator[None]:
    """Makes of what a client raises about a bucket an InputError of one line.

    A file of this machine, and an object that is not there in a bucket that is, raise what they
    always did.

    Args:
        where: what is read or written; of a path of this machine nothing is changed.
        flag: where its name came from, for messages.

    Raises:
        InputError: no client, no credentials, no permission, no such bucket, a bucket of another
            region, a store that cannot be reached, or one that still fails after all retries.
    """
    if not is_remote(where):
        yield
        return
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = explain(error, where)
        if reason is None:
            raise
        name = f"{flag}={where}" if flag else str(where)
        raise InputError(f"{name}: {reason}") from error


def explain(error: BaseException, where: Place) -> str | None:
    """What an error says about a bucket, with a remedy; None if it says nothing of one."""
    scheme, bucket, _ = bucket_of(where)
    chain = list(_chain(error))
    said = " ".join(str(chain[0]).split())[:200]
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    codes = {code for one in chain for code in _codes(one)}
    texts = " ".join(str(one) for one in chain).lower()
    packages = {one.name for one in chain if isinstance(one, ModuleNotFoundError)}
    if packages & {"s3fs", "gcsfs", "aiobotocore", "botocore"} or "install s3fs" in texts:
        package = _EXTRA[scheme]
        return f"{package} is not installed; pip install {package}, or stem_jax[{scheme}]"
    if "InvalidRegionError" in names:
        return f"{said}; set AWS_REGION to the name of the bucket's region, such as us-east-1"
    if "invalid endpoint: " in texts:
        return f"{said}; set AWS_ENDPOINT_URL to an address that begins with http:// or https://"
    if names & _NO_CREDENTIALS or "could not find the credentials" in texts:
        return f"no credentials for the bucket {bucket} were found; {_SETUP[scheme]}"
    if codes & _BAD_KEYS or "UNAUTHENTICATED" in codes:
        return f"the credentials for the bucket {bucket} are not valid ({said}); {_SETUP[scheme]}"
    if codes & _REGION or "unexpected response to x-amz-bucket-region" in texts:
        region = _region(chain)
        where_it_is = f"in the region {region}" if region else "in another region"
        given = f"set AWS_REGION={region}" if region else "set AWS_REGION to it"
        return f"the bucket {bucket} is {where_it_is}; {given}"
    if any(words in texts for words in _NO_BUCKET) or "NoSuchBucket" in codes:
        return f"there is no bucket {bucket}; create it, or correct the name"
    denied = codes & (_DENIED | {"PERMISSION_DENIED"}) or "forbidden: " in texts
    if denied or any(type(one) is PermissionError for one in chain):
        return (
            f"no permission for the bucket {bucket}; let these credentials list, read, write and "
            f"delete objects there, or use others: {_SETUP[scheme]}"
        )
    if names & {"gaierror"} or any(isinstance(one, socket.gaierror) for one in chain):
        return f"the name of the store cannot be resolved ({said}); look at the network and DNS"
    if codes & (_BUSY | {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL"}) or _errno(chain) & {
        errno.EBUSY,
        errno.EREMOTEIO,
    }:
        return (
            f"the bucket {bucket} still failed after all retries ({said}); try again when "
            f"{store_of(where)} answers"
        )
    unreachable = names & _UNREACHABLE or codes & {"DEADLINE_EXCEEDED", "ABORTED"}
    if unreachable or any(isinstance(one, ConnectionError | TimeoutError) for one in chain):
        store = store_of(where)
        return f"{store} of the bucket {bucket} cannot be reached ({said}); look at the network"
    if isinstance(chain[0], asyncio.TimeoutError):
        return f"{store_of(where)} of the bucket {bucket} does not answer; look at the network"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        following = following.__cause__ or following.__context__


def _codes(error: BaseException) -> Iterator[str]:
    """What the store answered: its own code and that of HTTP, or the status of TensorStore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        yield str(response.get("Error", {}).get("Code", ""))
        yield str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    code = getattr(error, "code", None)
    if isinstance(code, int | str):
        yield str(code)
    if isinstance(error, ValueError | RuntimeError) or type(error) is Exception:
        yield from _STATUS.findall(str(error))
        yield from re.findall(r"HTTP response code: (\d{3})", str(error))


def _region(chain: list[BaseException]) -> str:
    for error in chain:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            region = headers.get("x-amz-bucket-region") or response.get("Error", {}).get("Region")
            if region:
                return str(region)
    return ""


def _errno(chain: list[BaseException]) -> set[int | None]:
    return {one.errno for one in chain if isinstance(one, OSError)}
