"""A variant of a study's model: a file that changes a few keys of the base configuration.

    \"\"\"STEM in every other layer.\"\"\"

    def vary(config):
        config.model.stem_layers = "half"

Sizes that follow from others are computed from the configuration given, so that a variant is one at
every size of a study.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stem_jax.config import Config
from stem_jax.config_file import build
from stem_jax.config_program import found_program, run_program
from stem_jax.errors import InputError

_FOLDER = "study/variants"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant.

    name: of its file. says: what it is, the first paragraph of its docstring; the name without one.
    vary: changes a ConfigDict of the base's form.
    """

    name: str
    says: str
    vary: Callable[[Any], None]

    def config_of(self, base: Any) -> Config:
        """The configuration of this variant; the base's ConfigDict stays as it is.

        Raises:
            InputError: an unknown key, or a value that is refused.
        """
        changed = copy.deepcopy(base)
        try:
            self.vary(changed)
            return build(changed.to_dict())
        # It may be the user's program.
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            raise InputError(f"variant {self.name}: {message}") from error


def load_variant(path_or_name: str | Path) -> Variant:
    """A variant of a file, or one of those shipped by its name, such as `stem_half`.

    Raises:
        InputError: no such file or name, a program that fails, or one without `vary`.
    """
    path = found_program(Path(path_or_name), "variant", "--variant=", _FOLDER)
    return run_program(path, "variant", lambda module: _variant(path, module))


def _variant(path: Path, module: Any) -> Variant:
    vary = getattr(module, "vary", None)
    if not callable(vary):
        raise InputError("it has no function vary(config); add one, as configs/study/variants have")
    said = (module.__doc__ or path.stem).strip().split("\n\n")[0]
    return Variant(path.stem, " ".join(said.split()), vary)
