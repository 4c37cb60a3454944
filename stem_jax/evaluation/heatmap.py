"""Retrieval over lengths and depths as a picture."""

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stem_jax.evaluation.results import write_result
from stem_jax.processes.agreement import is_first


def draw_retrieval(result: dict[str, Any], path: str | Path) -> None:
    """Writes a PNG with one heatmap for each table of `niah.retrieval`, in process 0.

    Raises:
        InputError: the file cannot be written.
    """
    if not is_first():
        return
    tables = result["tables"]
    # A figure of its own, not pyplot's: pyplot keeps global state and may look for a display.
    figure = Figure(figsize=(1 + 4.2 * len(tables), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for number, table in enumerate(tables, start=1):
        axes = figure.add_subplot(1, len(tables), number)
        percent_DxN = [[100 * share for share in row] for row in zip(*table["accuracy"])]
        image = axes.imshow(percent_DxN, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(table["lengths"])), [str(n) for n in table["lengths"]])
        axes.set_yticks(range(len(table["depths"])), [f"{d:.0%}" for d in table["depths"]])
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel("depth of the needle")
        keys = table["keys"]
        axes.set_title(f"{keys} key{'s' if keys > 1 else ''}: {table['mean']:.1%} found")
        for row, shares in enumerate(percent_DxN):
            for column, share in enumerate(shares):
                # The ends of the scale are dark.
                colour = "white" if abs(share - 50) > 38 else "black"
                axes.text(column, row, f"{share:.0f}", color=colour, ha="center", va="center")
        figure.colorbar(image, ax=axes, label="found (%)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_result(path, buffer.getvalue())
