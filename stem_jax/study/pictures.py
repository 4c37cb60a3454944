"""Pictures of a study as SVG in the page: intervals by variant, and lines.

Each is drawn twice, for wide and for narrow windows: letters have one size, whatever the window.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from stem_jax.study.markup import escaped
from stem_jax.study.numbers import spoken

_WIDE, _NARROW = 800, 340
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
# Places of a colour, a dash and a mark, so that lines differ without colours too.
_COLOURS, _MARKS = 8, 3


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row: a value with its interval, points of the seeds, and what stands beside it.

    low, high: None without an interval. said: the figures. points: of the seeds.
    beyond: "low", "high" or both, of ends that are bounds and get an arrow.
    """

    label: str
    value: float
    low: float | None
    high: float | None
    said: str
    points: Sequence[float] = ()
    beyond: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Line:
    """points: (x, y) in order. place: of its colour, dash and mark, one for each variant."""

    label: str
    points: Sequence[tuple[float, float]]
    place: int


def bars(
    title: str,
    rows: Sequence[Bar],
    origin: float,
    ends: tuple[str, str],
    unit: str,
    caption: str,
    *,
    less_is_better: bool | None,
    margin: float = 0.0,
) -> str:
    """Intervals by variant beside a line at `origin`; "" without rows.

    Args:
        ends: what it means to be left and right of the origin.
        less_is_better: for colours; None: they say nothing.
        margin: around the origin, inside which a difference is called none.
    """
    if not rows:
        return ""
    reach = [origin - margin, origin + margin]
    for row in rows:
        reach += [row.value, *row.points, *(x for x in (row.low, row.high) if x is not None)]
    low, high = _padded(min(reach), max(reach))
    beside = 30 + 7 * max(len(row.said) for row in rows)

    def draw(width: int) -> tuple[str, int]:
        narrow = width == _NARROW
        left, right = (10, width - 10) if narrow else (150, width - beside)
        step, top = (50, 40) if narrow else (32, 40)
        bottom = top + step * len(rows)

        def x_of(value: float) -> float:
            return left + (right - left) * (value - low) / (high - low)

        parts = [_ticks(low, high, x_of, top - 8, bottom, 4 if narrow else 7)]
        if margin:
            begin, end = x_of(origin - margin), x_of(origin + margin)
            parts.insert(
                0,
                f'<rect class="margin" x="{begin:.1f}" y="{top - 8}" width="{end - begin:.1f}" '
                f'height="{bottom - top + 8}"/>',
            )
        middle = x_of(origin)
        parts.append(_line("axis", middle, top - 8, middle, bottom))
        for side, said, anchor in ((-1, ends[0], "start"), (1, ends[1], "end")):
            x = left if side < 0 else right
            arrow = f"← {said}" if side < 0 else f"{said} →"
            parts.append(_label(x, 14, arrow, anchor, "soft"))
        for number, row in enumerate(rows):
            y = top + step * number + (34 if narrow else 16)
            if narrow:
                parts.append(_label(left, y - 14, spoken(row.label), "start", "strong"))
                parts.append(_label(right, y - 14, row.said, "end", ""))
            else:
                parts.append(_label(0, y + 4, spoken(row.label), "start", "strong"))
                parts.append(_label(right + 16, y + 4, row.said, "start", ""))
            parts.append(_bar(row, x_of, y, _kind(row, origin, less_is_better)))
        middle = width / 2 if narrow else (left + right) / 2
        parts.append(_label(middle, bottom + 36, unit, "middle", "soft"))
        return "".join(parts), bottom + 44

    spoken_rows = "; ".join(f"{spoken(row.label)}: {row.said}" for row in rows)
    return _figure(title, f"{title}. {unit}. {spoken_rows}.", draw, caption)


def lines(
    title: str,
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    caption: str,
    *,
    x_names: Sequence[str] = (),
    origin: bool = False,
) -> str:
    """Lines with marks and a legend; "" without any.

    Args:
        x_names: of x 0, 1, ...; without them x is a number.
        origin: draw y = 0.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    xs, ys = zip(*points)
    x_low, x_high = (-0.3, len(x_names) - 0.7) if x_names else (min(0.0, *xs), max(xs))
    y_low, y_high = _padded(min([*ys, *([0.0] if origin else [])]), max(ys))

    def draw(width: int) -> tuple[str, int]:
        narrow = width == _NARROW
        left, right, top, bottom = 58, width - 12, 26, 250 if narrow else 330

        def x_of(value: float) -> float:
            return left + (right - left) * (value - x_low) / ((x_high - x_low) or 1)

        def y_of(value: float) -> float:
            return bottom - (bottom - top) * (value - y_low) / (y_high - y_low)

        parts = []
        for tick, said in _nice(y_low, y_high, 5):
            parts.append(_line("grid", left, y_of(tick), right, y_of(tick)))
            parts.append(_label(left - 6, y_of(tick) + 4, said, "end", "soft"))
        named = [(float(n), name) for n, name in enumerate(x_names)]
        for tick, said in named or _nice(x_low, x_high, 4 if narrow else 7, short=True):
            parts.append(_label(x_of(tick), bottom + 18, said, "middle", "soft"))
        parts.append(_line("axis", left, bottom, right, bottom))
        if origin:
            parts.append(_line("axis", left, y_of(0), right, y_of(0)))
        for one in series:
            at = [(x_of(x), y_of(y)) for x, y in one.points]
            parts.append(f'<g class="c{one.place % _COLOURS}">{_stroke(one.place, at)}</g>')
        parts.append(_label(0, 12, y_label, "start", "soft"))
        parts.append(_label(width / 2, bottom + 38, x_label, "middle", "soft"))
        return "".join(parts), bottom + 46

    said = f"{title}. {x_label}; {y_label}. Lines: {', '.join(spoken(s.label) for s in series)}."
    return _figure(title, said, draw, caption, _legend(series))


def _figure(
    title: str,
    said: str,
    draw: Callable[[int], tuple[str, int]],
    caption: str,
    legend: str = "",
) -> str:
    drawn = []
    for kind, width in (("wide", _WIDE), ("narrow", _NARROW)):
        body, height = draw(width)
        drawn.append(
            f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escaped(said)}"><title>{escaped(title)}</title>{body}</svg>'
        )
    return (
        f'<figure><p class="title">{escaped(title)}</p>{"".join(drawn)}{legend}'
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
    )


def _legend(series: Sequence[Line]) -> str:
    items = "".join(
        f'<li class="c{one.place % _COLOURS}"><svg viewBox="0 0 34 14" aria-hidden="true">'
        f"{_stroke(one.place, [(2, 7), (17, 7), (32, 7)])}</svg> {escaped(spoken(one.label))}</li>"
        for one in series
    )
    return f'<ul class="legend">{items}</ul>'


def _stroke(number: int, at: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dash = f' stroke-dasharray="{_DASHES[number % len(_DASHES)]}"' if number % len(_DASHES) else ""
    # Of many points, a few carry a mark.
    every = max(1, len(at) // 12)
    marks = "".join(_mark(number, x, y) for x, y in at[::every])
    return (
        f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="2"{dash}/>'
        f"{marks}"
    )


def _mark(number: int, x: float, y: float) -> str:
    match number % _MARKS:
        case 0:
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="currentColor"/>'
        case 1:
            return (
                f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" fill="currentColor"/>'
            )
        case _:
            place = f"{x:.1f},{y - 4.5:.1f} {x - 4:.1f},{y + 3:.1f} {x + 4:.1f},{y + 3:.1f}"
            return f'<polygon points="{place}" fill="currentColor"/>'


def _bar(row: Bar, x_of: Callable[[float], float], y: float, kind: str) -> str:
    parts = [
        f'<circle class="{kind}" cx="{x_of(point):.1f}" cy="{y + 8}" r="2" opacity=".55"/>'
        for point in row.points
    ]
    if row.low is not None and row.high is not None:
        begin, end = x_of(row.low), x_of(row.high)
        parts.append(f'<g class="{kind}" stroke-width="2.5">{_line("", begin, y, end, y)}</g>')
        for x, side, name in ((begin, -1, "low"), (end, 1, "high")):
            if name in row.beyond:
                tip = (
                    f"{x - 5 * side:.1f},{y - 5} {x + 3 * side:.1f},{y} {x - 5 * side:.1f},{y + 5}"
                )
                parts.append(f'<polyline class="{kind} open" stroke-width="2" points="{tip}"/>')
            else:
                parts.append(f'<g class="{kind}">{_line("", x, y - 4, x, y + 4)}</g>')
    parts.append(f'<circle class="{kind}" cx="{x_of(row.value):.1f}" cy="{y}" r="4.5"/>')
    return "".join(parts)


def _kind(row: Bar, origin: float, less_is_better: bool | None) -> str:
    """The colour of an interval that leaves out the origin."""
    if less_is_better is None or row.low is None or row.high is None:
        return "none"
    if row.low <= origin <= row.high:
        return "none"
    return "better" if (row.high < origin) == less_is_better else "worse"


def _ticks(
    low: float, high: float, x_of: Callable[[float], float], top: float, bottom: float, most: int
) -> str:
    return "".join(
        _line("grid", x_of(tick), top, x_of(tick), bottom)
        + _label(x_of(tick), bottom + 18, said, "middle", "soft")
        for tick, said in _nice(low, high, most)
    )


def _nice(low: float, high: float, most: int, short: bool = False) -> list[tuple[float, str]]:
    """Round numbers between two, at most so many, with their text."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.9999)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    found = []
    for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        tick = number * step
        text = f"{tick / 1e6:g} M" if short and high >= 1e6 else f"{tick:.{places}f}"
        found.append((tick, text.replace("-", "\N{MINUS SIGN}")))
    return found


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.01
    return low - room, high + room


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    named = f'class="{kind}" ' if kind else ""
    return f'<line {named}x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _label(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'
