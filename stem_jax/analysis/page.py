"""A page of sections as one HTML file: pictures are inside it, and nothing is fetched or run."""

import base64
import dataclasses
import html
from collections.abc import Sequence

_CSS = """
:root { --ink: #1f2933; --soft: #52606d; --line: #d9dee4; --paper: #ffffff; --accent: #0072b2; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #f4f6f8; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.4rem; margin: 0 0 8px; }
h3 { font-size: 1.05rem; margin: 28px 0 8px; }
p { margin: 0 0 12px; max-width: 72ch; }
.sub { color: var(--soft); overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr));
  gap: 14px 24px; margin: 20px 0; padding: 18px 24px; background: var(--paper);
  border: 1px solid var(--line); border-radius: 8px; }
.facts dt { color: var(--soft); font-size: .8rem; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
nav { margin: 0 0 20px; display: flex; flex-wrap: wrap; gap: 6px 18px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 24px; margin: 0 0 24px; }
.lead { border-left: 4px solid var(--accent); padding: 2px 0 2px 14px; font-size: 1.06rem; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 28px;
  align-items: start; margin: 20px 0; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 16px;
  margin: 20px 0; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
figcaption, .note { color: var(--soft); font-size: .9rem; margin: 8px 0 0; max-width: 72ch; }
.scroll { overflow-x: auto; margin: 16px 0 0; }
.pair .scroll { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 6px; }
th, td { padding: 4px 8px; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
table.text th, table.text td { text-align: left; vertical-align: top; white-space: normal; }
footer { color: var(--soft); font-size: .85rem; padding-bottom: 40px; }
@media (max-width: 760px) {
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  section { padding: 16px; }
  h1 { font-size: 1.5rem; }
  td:first-child { white-space: normal; min-width: 7em; }
  .pair { grid-template-columns: minmax(0, 1fr); gap: 16px; }
  .facts { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); padding: 14px 16px; }
}
"""
# Were anything to be fetched or run after all, the browser would refuse it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class Picture:
    """name: of its file, without a suffix. caption: one sentence that says what one sees."""

    name: str
    png: bytes
    caption: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as they are shown. text: columns are texts and not numbers. note: stands below."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    text: bool = False


@dataclasses.dataclass(frozen=True)
class Beside:
    """Two blocks, next to each other where there is room."""

    left: Picture | Table
    right: Picture | Table


@dataclasses.dataclass(frozen=True)
class Row:
    """Small pictures in as many columns as there is room for. caption: one for them all."""

    pictures: Sequence[Picture]
    caption: str


Block = Picture | Table | Beside | Row | str


@dataclasses.dataclass(frozen=True)
class Section:
    """lead: what the section found, in a few sentences. A block that is a string is a paragraph."""

    title: str
    lead: str
    blocks: Sequence[Block]

    def pictures(self) -> list[Picture]:
        """All of them, in order."""
        found: list[Picture] = []
        for block in self.blocks:
            parts: Sequence[object] = [block]
            if isinstance(block, Beside):
                parts = [block.left, block.right]
            elif isinstance(block, Row):
                parts = block.pictures
            found += [part for part in parts if isinstance(part, Picture)]
        return found


def render(
    title: str, sub: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], foot: str
) -> str:
    """The page as HTML. All texts are escaped here and nowhere before."""
    links = "".join(
        f'<a href="#part{number}">{_text(section.title)}</a>'
        for number, section in enumerate(sections)
    )
    items = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts)
    body = "\n".join(_section(number, section) for number, section in enumerate(sections))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<link rel="icon" href="data:,">
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p class="sub">{_text(sub)}</p>
<dl class="facts">{items}</dl>
<nav>{links}</nav>
</header>
<main>
{body}
</main>
<footer><p>{_text(foot)}</p></footer>
</body>
</html>
"""


def _section(number: int, section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return (
        f'<section id="part{number}"><h2>{_text(section.title)}</h2>\n'
        f'<p class="lead">{_text(section.lead)}</p>\n{blocks}</section>'
    )


def _block(block: Block) -> str:
    match block:
        case str():
            return f"<p>{_text(block)}</p>"
        case Beside():
            return (
                f'<div class="pair"><div>{_block(block.left)}</div>'
                f"<div>{_block(block.right)}</div></div>"
            )
        case Row():
            figures = "".join(_picture(picture, "") for picture in block.pictures)
            return f'<div class="row">{figures}</div><p class="note">{_text(block.caption)}</p>'
        case Picture():
            return _picture(block, block.caption)
        case Table():
            return _table(block)


def _picture(picture: Picture, caption: str) -> str:
    data = base64.b64encode(picture.png).decode()
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{_text(picture.caption)}" src="data:image/png;base64,{data}">'
        f"{below}</figure>"
    )


def _table(table: Table) -> str:
    heads = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    caption = f"<caption>{_text(table.title)}</caption>" if table.title else ""
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    kind = ' class="text"' if table.text else ""
    return (
        f'<div class="scroll"><table{kind}>{caption}<thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
