"""How the page looks: colours in light and dark, and one column that fits a phone."""

# Colours that stay apart for every kind of colour vision (Okabe and Ito), lighter on dark ground.
_PALETTE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #52606d; --line: #d9dee4;
  --paper: #ffffff; --ground: #f4f6f8; --better: #00704f; --worse: #b3470a; --none: #5b6570;
  --c0: #0072b2; --c1: #b3470a; --c2: #00805c; --c3: #a83f84; --c4: #8a6100; --c5: #0b7f8f;
  --c6: #5b4bc4; --c7: #59636e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --soft: #a9b4bf; --line: #37414b; --paper: #1b2229; --ground: #12171c;
    --better: #4cc79d; --worse: #f0935a; --none: #9aa5b1;
    --c0: #5db3e8; --c1: #f0935a; --c2: #4cc79d; --c3: #e29ac8; --c4: #e0b040; --c5: #58c6d6;
    --c6: #a99cf5; --c7: #b4bec8; }
}
"""
_SVG_CSS = """
body, svg {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
svg text { fill: var(--ink); font-size: 13px; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; }
svg text.soft { fill: var(--soft); }
svg text.strong { font-weight: 600; }
svg .axis { stroke: var(--soft); } svg .grid { stroke: var(--line); }
svg .margin { fill: var(--line); opacity: .55; }
svg .better { stroke: var(--better); fill: var(--better); }
svg .worse { stroke: var(--worse); fill: var(--worse); }
svg .none { stroke: var(--none); fill: var(--none); }
svg .open { fill: none; }
"""
_CSS = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font-size: 16px; line-height: 1.55; }
header, main, footer { max-width: 1040px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 0 0 8px; }
h3 { font-size: 1.05rem; margin: 28px 0 4px; }
p { margin: 0 0 12px; max-width: 72ch; overflow-wrap: anywhere; }
a { color: var(--c0); }
.sub, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .9rem; margin: 8px 0 0; max-width: 76ch; }
nav { margin: 0 0 24px; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .92rem; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 24px; margin: 0 0 24px; }
.answer { border-left: 5px solid var(--c0); }
.answer p:not(.note) { font-size: 1.06rem; }
dl.verdicts { margin: 0; }
dl.verdicts dt { font-weight: 700; margin: 12px 0 2px; }
dl.verdicts dd { margin: 0 0 6px; padding-left: 1.1em; text-indent: -1.1em; max-width: 76ch; }
dl.verdicts dd::before { content: "\\2013\\00a0\\00a0"; }
.confirmed { color: var(--better); } .refuted { color: var(--worse); }
.unresolved { color: var(--none); }
figure { margin: 16px 0 0; }
figure > svg { display: block; width: 100%; max-width: 860px; height: auto; }
svg.narrow { display: none !important; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 6px 0 0; padding: 0;
  list-style: none; font-size: .9rem; }
.legend svg { display: inline-block; width: 34px; height: 14px; vertical-align: -2px; }
.scroll { overflow-x: auto; margin: 6px 0 0; }
summary { cursor: pointer; color: var(--c0); }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
.title { font-weight: 600; font-size: .92rem; margin: 22px 0 0; }
th, td { padding: 5px 8px; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
td { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
tbody th.wrap { font-weight: 400; }
.left, th:first-child { text-align: left; }
th:first-child { padding-left: 0; }
td.wrap, tbody th.wrap { white-space: normal; min-width: 12.5em; text-align: left; }
footer { color: var(--soft); font-size: .85rem; padding-bottom: 40px; }
@media (max-width: 700px) {
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  section { padding: 16px; }
  h1 { font-size: 1.5rem; }
  svg.wide { display: none !important; }
  svg.narrow { display: block !important; }
}
"""
_LINES = "".join(f".c{n} {{ color: var(--c{n}); }}\n" for n in range(8))
PAGE = _PALETTE + _CSS + _SVG_CSS + _LINES
# Of a picture in a file of its own, which has its ground with it.
PICTURE = f"{_PALETTE}{_SVG_CSS}svg {{ background: var(--paper); }}\n{_LINES}"
