"""Geometry in words, pictures and tables."""

import numpy as np

from stem_jax.analysis import plots
from stem_jax.analysis.analysis import Analysis
from stem_jax.analysis.geometry import (
    FREQUENT,
    LayerGeometry,
    SpreadVerdict,
    random_mean_abs_cosine,
)
from stem_jax.analysis.page import Beside, Block, Picture, Row, Section, Table

# More small pictures than these say no more.
_SHOWN_LAYERS = 6
_TITLE = "Geometry"
# Mean |cos| over that of random directions, below which rows count as hardly moved.
_LIKE_RANDOM = 1.1


def geometry_section(found: Analysis) -> Section:
    """Angles, effective ranks and norms, with the verdict on the angular spread."""
    by_layer = {g.layer: g for g in found.rows}, {g.layer: g for g in found.means}
    layers = sorted(by_layer[0] or by_layer[1])
    shown = [layers[i] for i in _spaced(len(layers), _SHOWN_LAYERS)]
    cosines = [
        Picture(
            f"cosines_layer_{layer:02}",
            plots.layer_cosines(*(by.get(layer) for by in by_layer)),
            f"Histogram of the cosines of pairs of tokens in layer {layer}.",
        )
        for layer in shown
    ]
    blocks: list[Block] = [
        *_verdicts(found),
        Row(
            cosines,
            f"Cosines of all pairs of {found.sample.seen:,} tokens; the more a histogram gathers "
            "at zero, the nearer the vectors are to right angles.",
        ),
        Beside(
            Picture(
                "angular_spread",
                plots.angular_spread(found.rows, found.means, _reached(found)),
                "Lower is wider: mean |cos| of each layer with two standard errors, beside "
                "directions drawn at random.",
            ),
            _cosine_table(found),
        ),
        Beside(
            Picture(
                "effective_rank",
                plots.effective_ranks(found.rows, found.means),
                "Directions that the vectors of a layer fill evenly; higher is more.",
            ),
            _rank_table(found),
        ),
        *_norms(found),
    ]
    return Section(_TITLE, _lead(found), blocks)


def _lead(found: Analysis) -> str:
    if not found.rows:
        mean = np.mean([g.plain.mean_abs_cosine for g in found.means if g.plain])
        return (
            "This model has no rows. Its up projections, averaged over the places of each token, "
            f"have a mean |cos| of {mean:.3f}."
        )
    verdict, centred = found.verdict("plain"), found.verdict("centred")
    if verdict is None or centred is None:
        mean = np.mean([g.plain.mean_abs_cosine for g in found.rows if g.plain])
        return (
            f"Rows have a mean |cos| of {mean:.3f}. Whether that is wider than a dense model's up "
            "values takes a dense twin (--dense-workdir)."
        )
    chance = random_mean_abs_cosine(found.rows[0].width)
    lead = (
        f"Wider angular spread of rows than of the dense twin's up values: {verdict.word}. Mean "
        f"|cos| {verdict.rows:.3f} against {verdict.dense:.3f}; with the mean vector taken away, "
        f"{centred.word}: {centred.rows:.3f} against {centred.dense:.3f}."
    )
    if verdict.rows < _LIKE_RANDOM * chance:
        lead += (
            f" Rows are hardly told from directions drawn at random ({chance:.3f}), as they begin: "
            "this says little of what training made of them."
        )
    return lead


def _verdicts(found: Analysis) -> list[Block]:
    verdicts = {
        "as they are": found.verdict("plain"),
        "mean vector taken away": found.verdict("centred"),
        f"as they are, tokens seen {FREQUENT} times or more": found.verdict("frequent"),
    }
    rows = [_verdict_row(name, v) for name, v in verdicts.items() if v is not None]
    reached = _reached(found)
    if not rows or reached is None:
        return []
    note = (
        "Confirmed: the mean |cos| of rows is lower than the twin's by more than two standard "
        "errors in every layer that both have. Rows are random before training and keep wide "
        "angles where it moved them little, so frequent tokens are the stricter comparison. What "
        "a projection gives lies in at most D directions, which alone narrows the twin's angles: "
        f"drawn at random in D {reached}, mean |cos| is "
        f"{random_mean_abs_cosine(reached):.4f}, in F {found.rows[0].width} it is "
        f"{random_mean_abs_cosine(found.rows[0].width):.4f}."
    )
    columns = ["vectors", "verdict", "rows", "dense", "layers wider", "layers narrower"]
    return [Table(columns, rows, title="Wider angular spread, mean |cos| over layers", note=note)]


def _verdict_row(name: str, verdict: SpreadVerdict) -> list[str]:
    of = f" of {verdict.layers}"
    figures = [f"{verdict.rows:.4f}", f"{verdict.dense:.4f}"]
    return [name, verdict.word, *figures, f"{verdict.wider}{of}", f"{verdict.narrower}{of}"]


def _cosine_table(found: Analysis) -> Table:
    kinds = ("plain", "centred", "frequent")
    columns = ["layer"]
    columns += [f"{who} {kind}" for kind in kinds for who in _who(found)]

    def cell(geometry: LayerGeometry | None, kind: str) -> str:
        spread = geometry and getattr(geometry, kind)
        return f"{spread.mean_abs_cosine:.4f}" if spread else "-"

    rows = [
        [str(layer), *(cell(geometry, kind) for kind in kinds for geometry in geometries)]
        for layer, geometries in _layers(found)
    ]
    note = f"frequent: plain, of tokens seen {FREQUENT} times or more in the text."
    return Table(columns, rows, title="Mean |cos|", note=note)


def _rank_table(found: Analysis) -> Table:
    columns = ["layer"]
    columns += [f"{who} {kind}" for kind in ("plain", "centred") for who in _who(found)]
    columns += [f"{who} common part" for who in _who(found)]

    def rank(geometry: LayerGeometry | None, kind: str) -> str:
        spread = geometry and getattr(geometry, kind)
        return f"{spread.effective_rank:.1f}" if spread else "-"

    rows = [
        [
            str(layer),
            *(rank(geometry, kind) for kind in ("plain", "centred") for geometry in geometries),
            *(f"{g.common:.3f}" if g else "-" for g in geometries),
        ]
        for layer, geometries in _layers(found)
    ]
    note = (
        "exp of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007). "
        "Common part: length of the mean vector over the mean length."
    )
    return Table(columns, rows, title="Effective rank", note=note)


def _norms(found: Analysis) -> list[Block]:
    kinds = [(found.rows, "row_norms", "rows"), (found.means, "up_norms", "mean up values")]
    pictures = []
    for geometries, name, what in kinds:
        shown = [geometries[i] for i in _spaced(len(geometries), _SHOWN_LAYERS)]
        if shown:
            png = plots.norms_by_frequency(shown, what)
            pictures.append(Picture(name, png, _norm_caption(shown, what)))
    table = _norm_table(found.rows or found.means)
    if len(pictures) == 2:
        return [Beside(*pictures), table]
    return [Beside(pictures[0], table)]


def _norm_caption(shown: list[LayerGeometry], what: str) -> str:
    caption = "Mean norm of each layer with 10th to 90th percentile"
    trends = [trend for g in shown if (trend := _trend(g)) is not None]
    if not trends:
        return f"{caption}."
    longer, layers = sum(trend > 1 for trend in trends), len(trends)
    return (
        f"{caption}: {what} of tokens seen {FREQUENT} times or more are {np.mean(trends):.2f} "
        f"times as long as those of rarer ones, longer in {longer} of {layers} layers."
    )


def _trend(geometry: LayerGeometry) -> float | None:
    """Mean norm of frequent tokens over that of rarer ones; None if one of them is missing."""
    groups = [
        [b for b in geometry.norms if b["first"] > 0 and (b["first"] >= FREQUENT) == frequent]
        for frequent in (True, False)
    ]
    if not all(groups):
        return None
    frequent, rare = (
        np.average([b["mean"] for b in group], weights=[b["tokens"] for b in group])
        for group in groups
    )
    return float(frequent / rare)


def _norm_table(geometries: list[LayerGeometry]) -> Table:
    """Mean norms over the layers, by how often a token was seen."""
    rows = []
    for index, bin in enumerate(geometries[0].norms):
        first, last = int(bin["first"]), int(bin["last"])
        seen = "never" if last == 0 else f"{first:,}" if first == last else f"{first:,} to {last:,}"
        means = [g.norms[index]["mean"] for g in geometries]
        spread = f"{min(means):.3f} to {max(means):.3f}"
        rows.append([seen, f"{bin['tokens']:,}", f"{np.mean(means):.3f}", spread])
    return Table(["times seen", "tokens", "mean norm", "over layers"], rows, title="Norms")


def _reached(found: Analysis) -> int | None:
    """Directions that up values of the dense run lie in; None without such a run."""
    if not found.means:
        return None
    config = (found.dense or found.own).run.config.model
    return min(config.embed_dim, config.ffn_dim)


def _who(found: Analysis) -> list[str]:
    return [name for name, list_ in (("rows", found.rows), ("dense", found.means)) if list_]


def _layers(found: Analysis) -> list[tuple[int, list[LayerGeometry | None]]]:
    """(layer, its geometry in each of `_who`)."""
    tables = [{g.layer: g for g in list_} for list_ in (found.rows, found.means) if list_]
    return [(layer, [table.get(layer) for table in tables]) for layer in sorted(tables[0])]


def _spaced(number: int, most: int) -> list[int]:
    """At most so many indices below `number`, evenly spaced."""
    return sorted({round(i) for i in np.linspace(0, number - 1, min(number, most)).tolist()})
