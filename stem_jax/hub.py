"""Names on the Hugging Face Hub: `hf://ORG/NAME`, or `hf://ORG/NAME@REVISION` for one version.

What is asked for is copied into the hub's own cache by its own library, which knows `HF_ENDPOINT`,
`HF_TOKEN`, `HF_HOME`, `HF_HUB_OFFLINE`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stem_jax.errors import InputError

_HUB = "hf://"
_ID = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_of_hub(text: str, flag: str) -> bool:
    """Whether it names something on the hub. Raises InputError for a name in another form."""
    if not text.startswith(_HUB):
        return False
    if _ID.fullmatch(text) is None:
        raise InputError(f"{flag}={text} is no name of a model; give hf://ORG/NAME")
    return True


def hub_folder(source: str, flag: str, wanted: Sequence[str]) -> Path:
    """The copy on this machine of a model's files, those that are wanted.

    Args:
        source: a name, see `is_of_hub`.
        flag: that it was given by, for messages.
        wanted: patterns of names.

    Raises:
        InputError: no such model, one that needs permission, no network, no library.
    """
    match = _ID.fullmatch(source)
    assert match is not None, source
    name, revision = match.groups()
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise InputError(
            f"{flag}={source} needs huggingface_hub; pip install huggingface_hub, or copy the "
            "files to this machine and give their path"
        ) from error
    # The network's errors are those of its client, which is another one from version to version.
    client_error: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        where = os.environ.get("HF_ENDPOINT") or None
        options: dict[str, Any] = {
            "revision": revision,
            "allow_patterns": [*wanted],
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
                "the files to this machine and give their path"
            )
        raise InputError(f"{flag}={source}: {reason}") from error
