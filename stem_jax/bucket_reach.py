"""Whether the store of a bucket is there at all, before its clients ask it for the first time.

They try again for most of a minute, whatever happened. That is for a store that has answered: one
whose name does not resolve, or that takes no connection, is told of within seconds.
"""

import socket
import time
import urllib.parse
import urllib.request

from stem_jax.errors import InputError
from stem_jax.storage import Place, bucket_of

# A machine that has just started may have no network yet.
_SECONDS, _AGAIN_SECONDS = 5.0, 1.0
_CONNECT_SECONDS = 5.0
_VARIABLES = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}

# By scheme the store that has taken a connection.
_reached: dict[str, str] = {}


def check_reached(url: str, where: Place) -> None:
    """Connects to a store, once in a process; one behind a proxy is not asked.

    Args:
        url: of the store. where: what is read or written there.

    Raises:
        InputError: there is no connection.
    """
    scheme, _, _ = bucket_of(where)
    if url == _reached.get(scheme):
        return
    parts = urllib.parse.urlsplit(url)
    if parts.hostname is None or _by_proxy(parts.scheme, parts.hostname):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    give_up = time.monotonic() + _SECONDS
    while True:
        try:
            socket.create_connection((parts.hostname, port), timeout=_CONNECT_SECONDS).close()
            break
        except OSError as error:
            if time.monotonic() + _AGAIN_SECONDS > give_up:
                raise InputError(f"{where}: {_said(error, url, where)}") from error
        time.sleep(_AGAIN_SECONDS)
    _reached[scheme] = url


def store_of(where: Place) -> str:
    """ "the store" of a bucket for messages, with its address where that is known."""
    url = _reached.get(bucket_of(where)[0])
    return f"the store {url}" if url else "the store"


def _said(error: OSError, url: str, where: Place) -> str:
    scheme, bucket, _ = bucket_of(where)
    reason = error.strerror or "no answer"
    unknown = isinstance(error, socket.gaierror)
    what, failed = ("the name of the store", "resolved") if unknown else ("the store", "reached")
    return (
        f"{what} {url} of the bucket {bucket} cannot be {failed} ({reason}); look at the network, "
        f"and at {_VARIABLES[scheme]} if it is set"
    )


def _by_proxy(scheme: str, host: str) -> bool:
    proxies = urllib.request.getproxies()
    return bool({scheme, "all"} & proxies.keys()) and not urllib.request.proxy_bypass(host)
