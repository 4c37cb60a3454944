"""Where a model to import is: a folder of this machine, of a bucket, or on the Hugging Face Hub.

Both kinds of remote models are copied to this machine first: of buckets as `staging` says, of the
hub as `hub` does.
"""

from pathlib import Path

from stem_jax.hub import hub_folder, is_of_hub
from stem_jax.staging import staged
from stem_jax.storage import Place, is_remote, place

# All that an import reads; weights of other frameworks stay there.
_READ = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def model_source(text: str, flag: str) -> str | Place:
    """What a flag names, for `model_folder`: the name of a model of the hub stays a text.

    Raises:
        InputError: see `place`; what is no name of the hub.
    """
    return text if is_of_hub(text, flag) else place(text, flag)


def model_folder(source: str | Place, flag: str) -> Path:
    """The folder of a model on this machine, which is copied if it is elsewhere.

    Raises:
        InputError: see `staged` and `hub_folder`.
    """
    if isinstance(source, str) and is_of_hub(source, flag):
        return hub_folder(source, flag, _READ)
    if is_remote(source):
        return staged(place(source, flag), flag, asked=("config.json",))
    return Path(source)
