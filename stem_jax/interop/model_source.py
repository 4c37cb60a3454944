"""Where a model to import is: a folder of this machine, of a bucket, or on the Hugging Face Hub.

`hf://ORG/NAME` is a model of the hub, `hf://ORG/NAME@REVISION` one version of it. Both kinds of
remote models are copied to this machine first: of buckets as `staging` says, of the hub into its
own cache, by its own library, which knows `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`.
"""

import os
import re
from pathlib import Path
from typing import Any

from stem_jax.errors import InputError
from stem_jax.staging import staged
from stem_jax.storage import Place, is_remote, place

_HUB = "hf://"
_ID = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# All that an import reads; weights of other frameworks stay there.
_READ = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def model_source(text: str, flag: str) -> str | Place:
    """What a flag names, for `model_folder`: the name of a model of the hub stays a text.

    Raises:
        InputError: see `place`; what is no name of the hub.
    """
    if not text.startswith(_HUB):
        return place(text, flag)
    if _ID.fullmatch(text) is None:
        raise InputError(f"{flag}={text} is no name of a model; give hf://ORG/NAME")
    return text


def model_folder(source: str | Place, flag: str) -> Path:
    """The folder of a model on this machine, which is copied if it is elsewhere.

    Raises:
        InputError: see `staged`; no such model, one that needs permission, no network.
    """
    if isinstance(source, str) and source.startswith(_HUB):
        return _of_hub(source, flag)
    if is_remote(source):
        return staged(place(source, flag), flag, asked=("config.json",))
    return Path(source)


def _of_hub(source: str, flag: str) -> Path:
    match = _ID.fullmatch(source)
    assert match is not None, source
    name, revision = match.groups()
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise InputError(
            f"{flag}={source} needs huggingface_hub; pip install huggingface_hub, or copy the "
            "model to this machine and give its folder"
        ) from error
    # The network's errors are those of its client, which is another one from version to version.
    client_error: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        where = os.environ.get("HF_ENDPOINT") or None
        options: dict[str, Any] = {
            "revision": revision,
            "allow_patterns": _READ,
            "endpoint": where,
        }
        return Path(snapshot_download(name, **options))
    except errors.GatedRepoError as error:
        reason = "asks for its licence to be accepted; do so on its page, and set HF_TOKEN"
        raise InputError(f"{flag}={source} {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{flag}={source}: there is no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{flag}={source}: the hub knows no such model, or HF_TOKEN may not see it; correct "
            "the name, or set HF_TOKEN to a token that may"
        ) from error
    except (OSError, client_error) as error:
        # Without an answer, and with some, the library says that nothing is in its cache.
        response = getattr(error.__cause__ or error, "response", None)
        status = getattr(response, "status_code", None)
        said = " ".join(str(error.__cause__ or error).split())[:160]
        if status in (401, 403):
            reason = "the hub refuses HF_TOKEN, or asks for one; set one that may read the model"
        elif status is not None:
            reason = f"the hub answers {status}; try again later"
        else:
            reason = (
                f"the hub cannot be reached ({said}); look at the network and HF_ENDPOINT, or copy "
                "the model to this machine and give its folder"
            )
        raise InputError(f"{flag}={source}: {reason}") from error
