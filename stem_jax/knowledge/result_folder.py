"""Results in a folder: asked for before the work, each file there whole or not at all."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from stem_jax.errors import InputError


def check_folder(out: str | Path) -> Path:
    """Asks before the work whether results can be written to a folder, and leaves nothing there.

    Raises:
        InputError: it cannot be made, or no file in it.
    """
    out = Path(out)
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    probe = out / f".probe-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out={out}: {error.strerror}; choose another folder") from error
    finally:
        for folder in missing:
            # Somebody else's file in it keeps it.
            with contextlib.suppress(OSError):
                folder.rmdir()
    return out


def write_files(out: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Writes files into a folder, which is made; returns their paths, in order.

    Raises:
        InputError: one cannot be written.
    """
    for name, content in files.items():
        path, temporary = out / name, out / f".{name}.tmp-{os.getpid()}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"{path}: {error.strerror}; choose another --out") from error
    return [out / name for name in files]
