"""Results in a folder: asked for before the work, each file there whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

from stem_jax.checkpoints.files import check_outside
from stem_jax.errors import InputError
from stem_jax.files import check_writable, write_whole


def check_folder(out: str | Path) -> Path:
    """Asks before the work whether results can be written to a folder, and leaves nothing there.

    Raises:
        InputError: it cannot be made, or no file in it.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is not a folder; choose another")
    check_outside(out / "x", "--out")
    check_writable(out / "x", "--out")
    return out


def write_files(out: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Writes files into a folder, which is made; returns their paths, in order.

    Raises:
        InputError: one cannot be written.
    """
    for name, content in files.items():
        write_whole(out / name, content, "--out")
    return [out / name for name in files]
