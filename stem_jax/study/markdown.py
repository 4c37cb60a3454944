"""Results as Markdown tables and pictures in files of their own, for a report in a repository."""

from collections.abc import Mapping, Sequence

from stem_jax.study import sections
from stem_jax.study.markup import standalone
from stem_jax.study.tables import (
    COUNTS,
    Results,
    Table,
    claims_table,
    correlation_table,
    headline_table,
    lengths_table,
    low_overlap_table,
    measures_table,
    missing_table,
    multiplier_table,
    rates_table,
    resampling_table,
    same_rate_table,
    signs_table,
    sized_against,
    sizes_table,
)


def markdown_of(results: Results) -> str:
    """All tables, each under its title; those without rows are left out."""
    panels = results["panels"]
    tables: Sequence[Table] = [
        claims_table(results),
        *(headline_table(panel, results["headline"]) for panel in panels),
        signs_table(results),
        low_overlap_table(results),
        multiplier_table(results),
        lengths_table(results),
        *(sizes_table(p, label) for p in panels[:1] for label in sized_against(p)),
        *(measures_table(panel) for panel in panels),
        resampling_table(results),
        *(correlation_table(panel) for panel in panels[:1]),
        rates_table(results),
        same_rate_table(results),
        missing_table(results),
    ]
    return "\n".join(_markdown(table) for table in tables if table.rows)


def picture_files(results: Results) -> Mapping[str, str]:
    """SVG files by name; what the study has nothing to draw of is left out."""
    drawn = {f"multiplier_{name}": sections.multiplier_picture(results, name) for name in COUNTS}
    drawn["curves"] = sections.curves(results)
    for panel in results["panels"]:
        name = f"differences_{panel['text']}_{panel['tokens']}"
        drawn[name] = sections.difference_picture(panel, results["headline"])
    for panel in results["panels"][:1]:
        drawn["gap"] = sections.gap_picture(panel)
        for kind in ("input", "target"):
            drawn[f"frequency_{kind}"] = sections.frequency_picture(panel, kind)
    return {f"{name}.svg": standalone(figure) for name, figure in drawn.items() if figure}


def _markdown(table: Table) -> str:
    lines = [f"**{table.title}**", "", _row(table.columns)]
    sides = [":--" if n == 0 or n in table.wrapped else "--:" for n in range(len(table.columns))]
    lines += [_row(sides), *(_row(row) for row in table.rows)]
    return "\n".join([*lines, ""])


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
