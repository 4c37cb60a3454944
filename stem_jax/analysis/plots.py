"""The pictures of an analysis, each as a PNG of one panel that can be read on a phone."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stem_jax.analysis.capacity import Capacity
from stem_jax.analysis.geometry import HISTOGRAM_BINS, LayerGeometry, random_mean_abs_cosine
from stem_jax.analysis.stability import Stability

# Two colours that stay apart for every kind of colour vision (Okabe and Ito), and a grey.
ROWS, DENSE, GREY = "#0072B2", "#D55E00", "#6B7280"
# Of STEM's tables and other memories, one after the other.
MEMORIES = "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9CA3AF",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E7EB",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 10,
}
_WIDE, _SMALL = (6.0, 3.9), (4.6, 3.2)


def layer_cosines(rows: LayerGeometry | None, dense: LayerGeometry | None) -> bytes:
    """Histogram of the cosines of all pairs in one layer."""
    layer = next(geometry.layer for geometry in (rows, dense) if geometry is not None)
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)

    def draw(axes: Axes) -> None:
        for geometry, color, name in ((rows, ROWS, "rows"), (dense, DENSE, "dense up values")):
            if geometry is None or geometry.plain is None:
                continue
            percent = [100 * share for share in geometry.plain.histogram]
            label = f"{name}, mean |cos| {geometry.plain.mean_abs_cosine:.3f}"
            axes.stairs(percent, edges, fill=True, color=color, alpha=0.25)
            axes.stairs(percent, edges, color=color, lw=1.6, label=label)
        axes.set(xlim=(-1, 1), xlabel="cosine of a pair of tokens", ylabel="pairs (%)")
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.set_title(f"layer {layer}")
        # Above the bars, whatever their height.
        axes.set_ylim(top=1.32 * axes.get_ylim()[1])
        axes.legend(loc="upper left")

    return _png(draw, _SMALL)


def angular_spread(
    rows: Sequence[LayerGeometry], dense: Sequence[LayerGeometry], reached: int | None
) -> bytes:
    """Mean |cos| of each layer, plain and centred.

    Args:
        reached: directions that the dense up values lie in, D.
    """

    def draw(axes: Axes) -> None:
        for kind, style, fill in (("plain", "-", "full"), ("centred", "--", "none")):
            for found, color, name in ((rows, ROWS, "rows"), (dense, DENSE, "dense up values")):
                shown = [g for g in found if getattr(g, kind)]
                spreads = [getattr(g, kind) for g in shown]
                if not spreads:
                    continue
                axes.errorbar(
                    [g.layer for g in shown],
                    [spread.mean_abs_cosine for spread in spreads],
                    [2 * spread.standard_error for spread in spreads],
                    color=color,
                    ls=style,
                    marker="o",
                    fillstyle=fill,
                    capsize=3,
                    label=name if kind == "plain" else f"{name}, centred",
                )
        for width, color, name in (
            (rows[0].width if rows else None, ROWS, "F"),
            (reached, DENSE, "D"),
        ):
            if width is not None:
                label, chance = f"random in {name} {width}", random_mean_abs_cosine(width)
                axes.axhline(chance, color=color, ls=":", lw=1.2, label=label)
        axes.set(xlabel="layer", ylabel="mean |cos| of pairs")
        axes.set_ylim(bottom=0)
        _layers(axes)
        _legend_below(axes)

    return _png(draw, _WIDE)


def effective_ranks(rows: Sequence[LayerGeometry], dense: Sequence[LayerGeometry]) -> bytes:
    """Effective rank of each layer, plain and centred."""

    def draw(axes: Axes) -> None:
        most = 0
        for kind, style, fill in (("plain", "-", "full"), ("centred", "--", "none")):
            for found, color, name in ((rows, ROWS, "rows"), (dense, DENSE, "dense up values")):
                points = [
                    (g.layer, getattr(g, kind).effective_rank) for g in found if getattr(g, kind)
                ]
                if not points:
                    continue
                label = name if kind == "plain" else f"{name}, centred"
                axes.plot(
                    *zip(*points), color=color, ls=style, marker="o", fillstyle=fill, label=label
                )
                most = max(most, *(min(g.plain.vectors, g.width) for g in found if g.plain))
        axes.axhline(most, color=GREY, ls=":", label=f"the most there can be, {most}")
        axes.set(xlabel="layer", ylabel="effective rank (directions)")
        axes.set_ylim(bottom=0)
        _layers(axes)
        _legend_below(axes)

    return _png(draw, _WIDE)


def norms_by_frequency(found: Sequence[LayerGeometry], what: str) -> bytes:
    """Length of vectors by how often their token was seen, a line for each layer."""

    def draw(axes: Axes) -> None:
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(found)))
        for geometry, color in zip(found, shades):
            # Bin 0, tokens never seen, stands left of 1 on the logarithmic axis.
            x = [math.sqrt(bin["first"] * bin["last"]) or 0.35 for bin in geometry.norms]
            mean = np.asarray([bin["mean"] for bin in geometry.norms])
            low, high = ([bin[key] for bin in geometry.norms] for key in ("low", "high"))
            axes.plot(x, mean, marker="o", color=color, label=f"layer {geometry.layer}")
            axes.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
        axes.set_xscale("log", base=2)
        last = max(int(bin["last"]) for geometry in found for bin in geometry.norms)
        ticks = [0.35] if any(g.norms and g.norms[0]["first"] == 0 for g in found) else []
        powers = [1 << n for n in range(0, last.bit_length(), 2 if last < 4096 else 4)]
        axes.set_xticks([*ticks, *powers], ["never"] * len(ticks) + [f"{p:,}" for p in powers])
        axes.minorticks_off()
        axes.set(xlabel="times the token was seen in the text", ylabel=f"norm of {what}")
        axes.set_ylim(bottom=0)
        _legend_below(axes)

    return _png(draw, _WIDE)


def context_capacity(capacity: Capacity) -> bytes:
    """Table parameters that a context touches, beside what a dense model has instead."""

    def draw(axes: Axes) -> None:
        lengths = [c.length for c in capacity.lengths]
        low, high = ([getattr(c, key) for c in capacity.lengths] for key in ("low", "high"))
        axes.fill_between(lengths, low, high, color=ROWS, alpha=0.18, lw=0)
        touched = [c.parameters for c in capacity.lengths]
        axes.plot(lengths, touched, "o-", ms=4, color=ROWS, label="rows touched (mean, range)")
        axes.axhline(
            capacity.replaced, color=DENSE, ls="--", label="dense: up projections of these layers"
        )
        axes.axhline(capacity.table, color=GREY, ls=":", label="all rows of the tables")
        axes.axvline(capacity.context, color=GREY, lw=1, label=f"context, {capacity.context:,}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = lengths[:: 1 + len(lengths) // 8]
        axes.set_xticks(ticks, [_short(n) for n in ticks])
        axes.minorticks_off()
        axes.set(xlabel="context length (tokens)", ylabel="distinct parameters")
        _legend_below(axes)

    return _png(draw, _WIDE)


def cost_by_stem_layers(records: Sequence[dict]) -> bytes:
    """FLOPs and bytes a token as shares of the dense model's, by the number of STEM layers."""
    kinds = {
        "training_flops": ("training FLOPs", ROWS),
        "prefill_flops": ("prefill FLOPs", "#56B4E9"),
        "decode_flops": ("decode FLOPs", "#009E73"),
        "read_bytes": ("bytes read, decode", DENSE),
    }

    def draw(axes: Axes) -> None:
        x = np.arange(len(records))
        for index, (key, (label, color)) in enumerate(kinds.items()):
            percent = [100 * record[key] / records[0][key] for record in records]
            axes.bar(x + 0.2 * (index - 1.5), percent, 0.19, color=color, label=label)
        names = [f"{r['pattern'].replace('_', ' ')}\n{len(r['stem_layers'])}" for r in records]
        axes.set_xticks(x, names)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="STEM layers", ylabel="a token, % of dense", ylim=(0, 108))
        _legend_below(axes)

    return _png(draw, _WIDE)


def loss_curves(runs: Sequence[tuple[str, str, Stability]]) -> bytes:
    """Training and held-out loss over steps; spikes are marked.

    Args:
        runs: (name, colour, what was recorded) of each.
    """

    def draw(axes: Axes) -> None:
        for name, color, found in runs:
            axes.plot(found.steps, found.losses, color=color, lw=0.7, alpha=0.35)
            steps, smooth = _smoothed(found.steps, found.losses)
            axes.plot(steps, smooth, color=color, lw=1.8, label=f"{name}, training")
            if found.held_out:
                held_out = zip(*found.held_out)
                axes.plot(*held_out, "o--", ms=4, lw=1, color=color, label=f"{name}, held out")
            at = dict(zip(found.steps, found.losses))
            marked = [(step, at[step]) for step in found.spikes if math.isfinite(at[step])]
            if marked:
                axes.plot(*zip(*marked), "x", color=color, ms=8, mew=2, label=f"{name}, spikes")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        _legend_below(axes)

    return _png(draw, _WIDE)


def gradient_norms(series: Sequence[tuple[str, str, Sequence[int], Sequence[float]]]) -> bytes:
    """Gradient norms before clipping.

    Args:
        series: (name, colour, steps, norms) of each.
    """

    def draw(axes: Axes) -> None:
        for name, color, steps, norms in series:
            axes.plot(steps, norms, color=color, lw=0.6, alpha=0.3)
            axes.plot(*_smoothed(steps, norms), color=color, lw=1.8, label=name)
        axes.set_yscale("log")
        axes.set(xlabel="step", ylabel="gradient norm before clipping")
        _legend_below(axes)

    return _png(draw, _WIDE)


def _smoothed(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Running median over a fortieth of the length: spikes do not bend it."""
    width = max(1, len(values) // 40)
    if len(values) <= width:
        return np.asarray(steps), np.asarray(values)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(values, float), width)
    # Windows of non-finite losses alone have no median.
    kept = np.isfinite(windows).any(axis=1)
    return np.asarray(steps)[width // 2 :][: len(windows)][kept], np.nanmedian(windows[kept], 1)


def _layers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08)


def _legend_below(axes: Axes) -> None:
    axes.figure.legend(loc="outside lower center", ncols=2)


def _short(number: int) -> str:
    for size, unit in ((1 << 20, " Mi"), (1 << 10, " Ki")):
        if number >= size:
            return f"{number // size}{unit}"
    return str(number)


def _png(draw: Callable[[Axes], None], size: tuple[float, float]) -> bytes:
    with matplotlib.rc_context(_STYLE):
        # A figure of its own, not pyplot's: pyplot keeps global state and may look for a display.
        figure = Figure(figsize=size, dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
