"""An analysis on the disk: the page, its pictures as files, and every figure as JSON."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from stem_jax.errors import InputError
from stem_jax.knowledge.analysis import Analysis
from stem_jax.knowledge.page import Section, render
from stem_jax.knowledge.sections import FOOT, header

PAGE, FIGURES = "index.html", "analysis.json"


def check_folder(out: str | Path) -> Path:
    """Asks before the work whether results can be written to a folder, which is made.

    Raises:
        InputError: it cannot be made, or no file in it.
    """
    out = Path(out)
    probe = out / f".probe-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out={out}: {error.strerror}; choose another folder") from error
    return out


def write_analysis(out: Path, analysis: Analysis, sections: Sequence[Section]) -> list[Path]:
    """Writes `index.html`, `analysis.json` and the PNGs; returns their paths, the page first.

    Args:
        sections: of the page, with the pictures.

    Raises:
        InputError: a file cannot be written.
    """
    title, sub, facts = header(analysis)
    files = {
        PAGE: render(title, sub, facts, sections, FOOT).encode(),
        FIGURES: (json.dumps(analysis.record(), indent=2, allow_nan=False) + "\n").encode(),
    }
    files |= {f"{p.name}.png": p.png for section in sections for p in section.pictures()}
    for name, content in files.items():
        path, temporary = out / name, out / f".{name}.tmp-{os.getpid()}"
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"{path}: {error.strerror}; choose another --out") from error
    return [out / name for name in files]
