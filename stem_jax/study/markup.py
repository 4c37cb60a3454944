"""Pieces of a page: its style in light and dark, sections, tables that scroll in their own box."""

import html
from collections.abc import Sequence

from stem_jax.study.style import PAGE, PICTURE
from stem_jax.study.tables import Table

# Were anything to be fetched or run after all, the browser would refuse it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def escaped(value: object) -> str:
    """Text as HTML has it; all texts go through here once."""
    return html.escape(str(value), quote=True)


def document(title: str, sub: str, first: str, sections: Sequence[tuple[str, str]]) -> str:
    """The page.

    Args:
        first: HTML that stands before all, without a link.
        sections: (title, HTML) of each; those without HTML are left out.
    """
    kept = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#part{n}">{escaped(name)}</a>' for n, (name, _) in enumerate(kept))
    parts = "\n".join(
        f'<section id="part{n}"><h2>{escaped(name)}</h2>\n{body}</section>'
        for n, (name, body) in enumerate(kept)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<link rel="icon" href="data:,">
<style>{PAGE}</style>
</head>
<body>
<header>
<h1>{escaped(title)}</h1>
<p class="sub">{escaped(sub)}</p>
</header>
<main>
<section class="answer">{first}</section>
<nav aria-label="Parts of this page">{links}</nav>
{parts}
</main>
<footer><p>One file; it fetches nothing and runs nothing.</p></footer>
</body>
</html>
"""


def paragraph(text: str, kind: str = "") -> str:
    """kind: "" or "note"."""
    named = f' class="{kind}"' if kind else ""
    return f"<p{named}>{escaped(text)}</p>"


def table_html(table: Table) -> str:
    """A table in a box that scrolls by itself, also by keyboard; "" without rows.

    A cell that is one of the verdicts has its colour.
    """
    if not table.rows:
        return ""
    body = "".join(f"<tr>{_cells(row, table.wrapped)}</tr>" for row in table.rows)
    left = ' class="left"'
    heads = "".join(
        f'<th scope="col"{left if number in table.wrapped else ""}>{escaped(name)}</th>'
        for number, name in enumerate(table.columns)
    )
    title = escaped(table.title)
    # The title stays in sight when the box scrolls, which a caption would not.
    return (
        f'<p class="title">{title}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def standalone(figure: str) -> str:
    """The wide drawing of a figure as an SVG file with its colours, light and dark."""
    begin = figure.index("<svg")
    drawing = figure[begin : figure.index("</svg>") + len("</svg>")]
    head, _, body = drawing.partition(">")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{head}><style>{PICTURE}</style>{body}\n"


def _cells(row: Sequence[object], wrapped: Sequence[int]) -> str:
    cells = []
    for number, cell in enumerate(row):
        kinds = ["wrap"] if number in wrapped else []
        kinds += [str(cell)] if cell in ("confirmed", "refuted", "unresolved") else []
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        opened, closed = ('th scope="row"', "th") if number == 0 else ("td", "td")
        cells.append(f"<{opened}{kind}>{escaped(cell)}</{closed}>")
    return "".join(cells)
