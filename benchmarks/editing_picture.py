"""The picture of benchmarks.editing."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_PARTS = {"new": "#2a7f62", "other": "#d9b44a", "old": "#b5bdc6"}
_LABELS = {"new": "the donor's", "other": "another", "old": "its own, as before"}
_RUNS = {
    "facts": "all",
    "facts_all_but_first": "all but\nfirst,\ndropout",
    "without_dropout": "all but\nfirst, no\ndropout",
    "half": "half:\n1, 3",
    "third": "third:\n1",
}
_LAYERS = {
    "layers 0": "0",
    "layers 0,1": "0, 1",
    "layers 0,1,2": "0 to 2",
    "rows": "all 4",
    "layers 3": "3",
}
_NAMES = {
    "rows": "one\nfor one",
    "copy": "more:\ncopy",
    "pad_left": "more:\npad left",
    "pad_right": "more:\npad right",
    "average of fewer": "more:\naverage",
    "subset": "fewer:\nsubset",
    "average of more": "fewer:\naverage",
}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Writes a PNG: answers after edits by placement, by layers edited, by kind of name.

    results: figures by run and trial, as `benchmarks.editing` keeps them; what is missing is left
    out.
    """
    # A figure of its own, not pyplot's: pyplot keeps global state and may look for a display.
    figure = Figure(figsize=(14, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[1.6, 1, 1.15])
    bars = []
    for name, label in _RUNS.items():
        for trial, what in (("rows", "rows"), ("embedding", "emb.")):
            found = [r[trial] for run, r in results.items() if _is(run, name) and trial in r]
            if found:
                bars.append((f"{label}\n{what}" if what == "rows" else what, found))
    _stack(axes[0], bars, "layers with tables; rows swapped, or token embeddings")
    first = results.get("facts_seed_0", {})
    bars = [(label, [first[trial]]) for trial, label in _LAYERS.items() if trial in first]
    _stack(axes[1], bars, "tables in all layers: layers whose rows are swapped")
    bars = [(label, [first[trial]]) for trial, label in _NAMES.items() if trial in first]
    _stack(axes[2], bars, "names of more or fewer tokens than the donor's")
    axes[0].set_ylabel("edits, percent")
    axes[0].set_ylim(0, 104)
    handles, labels = axes[1].get_legend_handles_labels()
    title = "Which answer is given after the edit. Numbers: the donor's, mean of seeds (dots)."
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=3)
    figure.savefig(path)


def _is(run: str, name: str) -> bool:
    return run.rpartition("_seed_")[0] == name


def _stack(axes: Axes, bars: list[tuple[str, list[dict[str, Any]]]], title: str) -> None:
    """Bars of shares; means over seeds, whose own values of "new" are dots."""
    bottom = np.zeros(len(bars))
    for part, colour in _PARTS.items():
        heights = [np.mean([x["rows"][-1][part] for x in found]) for _, found in bars]
        axes.bar(range(len(bars)), heights, 0.72, bottom, color=colour, label=_LABELS[part])
        bottom += heights
    for place, (_, found) in enumerate(bars):
        values = [x["rows"][-1]["new"] for x in found]
        axes.annotate(
            f"{np.mean(values):.0f}", (place, 101), ha="center", fontsize=8, color=_PARTS["new"]
        )
        if len(values) > 1:
            spread = np.linspace(-0.15, 0.15, len(values))
            axes.scatter(place + spread, values, s=12, color="black", zorder=3)
    axes.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
