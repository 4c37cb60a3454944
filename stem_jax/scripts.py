"""The programs as console scripts: `stem-train` is `python -m stem_jax.train`, and so on."""

import importlib
from collections.abc import Callable

from stem_jax import cli


def _script(program: str) -> Callable[[], None]:
    """Imports the program only when it is called: each has its own flags."""

    def start() -> None:
        cli.run(importlib.import_module(f"stem_jax.{program}").main)

    return start


train = _script("train")
prepare = _script("prepare")
plan = _script("plan")
generate = _script("generate")
evaluate = _script("evaluate")
edit = _script("edit")
analyze = _script("analyze")
serve = _script("serve")
export = _script("export")
import_torch = _script("import_torch")
status = _script("status")
study = _script("study.__main__")
