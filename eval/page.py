"""One HTML page that needs nothing else: style, sorting script and pictures lie in it.

Text goes through `html.escape`.  The page's own policy forbids every fetch and every script but the
one here, so that a name in a row cannot do what a name should not.
"""

import base64
import hashlib
import html
import math
from collections.abc import Mapping, Sequence

from eval import charts

STYLE = """
:root { color-scheme: light dark; --text: #1c2420; --soft: #5c6660; --paper: #ffffff;
  --panel: #f4f6f4; --line: #d5dbd7; --warn: #fdf3df; --warn-line: #d9a441;
  --c0: #2a6f4e; --c1: #d9a441; --c2: #4878a8; --c3: #a03a3a; --c4: #7b5ea7; --c5: #8a8a8a; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e9e6; --soft: #9aa59f; --paper: #141816;
  --panel: #1d2320; --line: #38413c; --warn: #2e2714; --warn-line: #a87e2f;
  --c0: #58b088; --c1: #e0b35c; --c2: #79a8d8; --c3: #d87474; --c4: #ab90d6; --c5: #a0a0a0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 16px; color: var(--text);
  background: var(--paper); font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 24px; margin: 8px 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 32px 0 8px; padding-top: 8px; border-top: 2px solid var(--line); }
h3 { font-size: 15px; margin: 16px 0 4px; overflow-wrap: anywhere; }
p, li { overflow-wrap: anywhere; }
ul { padding-left: 24px; }
li { margin: 3px 0; }
.soft, figcaption, .axis-label { color: var(--soft); font-size: 13px; }
.axis-label.right { text-align: right; }
a { color: inherit; }
code { font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
code span { display: inline-block; max-width: 100%; word-break: break-all; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: 8px 0; }
.scroll.tall { max-height: 420px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: 4px 10px; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { background: var(--panel); position: sticky; top: 0; font-weight: 600; white-space: normal;
  vertical-align: bottom; }
th:not(:first-child) { min-width: 68px; }
th.number { text-align: right; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--c2); }
th[aria-sort=ascending] button::after { content: " \\25b4"; }
th[aria-sort=descending] button::after { content: " \\25be"; }
tr:last-child td { border-bottom: 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
table.facts td, table.facts th { text-align: left; }
table.facts td:first-child { white-space: normal; min-width: 130px; }
td.wrap { white-space: normal; min-width: 260px; overflow-wrap: anywhere; }
td.long { max-width: 300px; overflow: hidden; text-overflow: ellipsis; }
figure { margin: 8px 0 16px; }
.plot { display: flex; }
.plot .area { flex: 1; min-width: 0; display: block; }
.names { width: 38%; max-width: 300px; flex: none; padding-top: 20px; font-size: 11px; }
.names div { height: 15px; line-height: 15px; text-align: right; padding-right: 8px;
  overflow: hidden; white-space: nowrap; text-overflow: ellipsis; direction: rtl; }
.bar-label { font-size: 13px; margin-top: 6px; overflow-wrap: anywhere; }
.bars svg, .plot svg { display: block; overflow: visible; }
figcaption { margin-top: 6px; }
.legend { font-size: 13px; padding-left: 24px; margin: 6px 0; }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 16px; }
svg text { fill: var(--text); font-size: 12px; }
svg text.number { font-size: 11px; font-weight: 600; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; }
.grid { stroke: var(--line); } .whisker { stroke: var(--text); fill: none; stroke-width: 1.3; }
.line { fill: none; stroke-width: 1.2; vector-effect: non-scaling-stroke; }
.c0 { fill: var(--c0); } .c1 { fill: var(--c1); } .c2 { fill: var(--c2); }
.c3 { fill: var(--c3); } .c4 { fill: var(--c4); } .c5 { fill: var(--c5); }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.emulated { background: var(--warn); border: 1px solid var(--warn-line); border-radius: 6px;
  padding: 4px 12px 12px; margin-top: 24px; }
.emulated h2 { border: 0; margin-top: 8px; }
.emulated .scroll { background: var(--paper); }
.badge { font-size: 12px; font-weight: 600; border: 1px solid var(--warn-line); border-radius: 10px;
  padding: 0 8px; display: inline-block; }
details { margin: 8px 0; } summary { cursor: pointer; }
@media (max-width: 600px) { td, th { padding: 4px 6px; }
  td.name { white-space: normal; overflow-wrap: anywhere; min-width: 140px; } }
@media print { .scroll.tall { max-height: none; } }
"""
# Sorts a table by the column whose heading is pressed; numbers by the row's value, not as shown.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending", at = head.cellIndex;
  const key = row => { const cell = row.cells[at], value = cell.querySelector("data");
    return value ? value.value : cell.textContent; };
  const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "")
    : (up ? 1 : -1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
};
"""


def whole(title: str, parts: Sequence[str]) -> str:
    """Returns the page: `parts` are HTML, `title` is text."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(title: str, parts: Sequence[str], emulated: bool = False) -> str:
    """Returns a section with its heading; what was emulated or estimated stands apart and says so."""
    kind, badge = ("", "")
    if emulated:
        kind = ' class="emulated"'
        badge = ' <span class="badge">emulated, compiled or estimated: no device latency</span>'
    return (
        f"<section{kind}>\n<h2>{html.escape(title)}{badge}</h2>\n"
        + "\n".join(parts)
        + "\n</section>"
    )


def command(text: str) -> str:
    """Returns a command line, broken between its words where it must be."""
    words = " ".join(f"<span>{html.escape(word)}</span>" for word in text.split())
    return f"<code>{words}</code>"


def heading(text: str) -> str:
    """Returns a heading below a section's."""
    return f"<h3>{html.escape(text)}</h3>"


def paragraph(text: str, soft: bool = False) -> str:
    """Returns a paragraph of text."""
    return f"<p{' class=soft' if soft else ''}>{html.escape(text)}</p>"


def soft(text: str) -> str:
    """Returns words in the colour of captions."""
    return f'<span class="soft">{html.escape(text)}</span>'


def listing(items: Sequence[str]) -> str:
    """Returns a list; `items` are HTML."""
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def figure(content: str, caption: str) -> str:
    """Returns a figure; `content` is HTML, `caption` text."""
    return f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>"


def folded(title: str, content: str, opened: bool = False) -> str:
    """Returns content, HTML, behind a line that opens it."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{html.escape(title)}</summary>{content}</details>"


def table(
    rows: Sequence[Mapping[str, str]],
    columns: Mapping[str, str],
    wrapped: Sequence[str] = (),
    facts: bool = False,
) -> str:
    """Returns a table in a box of its own that scrolls, sortable by its headings.

    Args:
      rows: of text; absent or "" stays empty; "#" is the number of a measurement, a link to it.
      columns: {key: heading}; those that no row fills are left out.
      wrapped: columns of sentences.
      facts: whether lines are facts and columns their subjects; numbers then stand on the left.
    """
    kept = {key: name for key, name in columns.items() if any(row.get(key) for row in rows)}
    head = "".join(
        f'<th scope="col"{_side(rows, key)}><button>{_unbroken(name)}</button></th>'
        for key, name in kept.items()
    )
    body = "".join(
        "<tr>" + "".join(_cell(key, row.get(key) or "", key in wrapped) for key in kept) + "</tr>"
        for row in rows
    )
    tall = " tall" if len(rows) > 40 else ""
    kind = ' class="facts"' if facts else ""
    return (
        f'<div class="scroll{tall}" tabindex="0" role="region" aria-label="table"><table{kind}>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _unbroken(heading):
    return html.escape(heading.replace("-", "\N{NON-BREAKING HYPHEN}"))


def _side(rows, key):
    texts = [row[key] for row in rows if row.get(key)]
    return ' class="number"' if all(map(is_number, texts)) else ""


def _cell(key, text, wrap):
    if key == "#":
        return f'<td class="number"><a href="#m{text}"><data value="{text}">{text}</data></a></td>'
    if is_number(text):
        shown = charts.rounded(text)
        return f'<td class="number"><data value="{html.escape(text)}">{shown}</data></td>'
    if key == "file":
        return f'<td class="name">{html.escape(text)}</td>'
    kind = "wrap" if wrap else "long" if len(text) > 48 else ""
    attributes = f' class="{kind}" title="{html.escape(text)}"' if kind == "long" else ""
    attributes = attributes or (' class="wrap"' if wrap else "")
    return f"<td{attributes}>{html.escape(text)}</td>"


def is_number(text: str) -> bool:
    """Returns whether a cell's text is a finite number."""
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False
