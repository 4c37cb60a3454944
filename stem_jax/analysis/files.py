"""An analysis on the disk: the page, its pictures as files, and every figure as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

from stem_jax.analysis.analysis import Analysis
from stem_jax.analysis.page import Section, render
from stem_jax.analysis.sections import FOOT, header
from stem_jax.result_folder import write_files

PAGE, FIGURES = "index.html", "analysis.json"


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
    return write_files(out, files)
