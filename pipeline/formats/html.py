"""HTML that the pages of data sets and exports share: style, tables, images."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark;
        --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --paper: #fff; --bar: #3b6ea5;
        --warn: #fff8c5; --warn-line: #d4a72c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #8d96a0; --line: #30363d; --paper: #0d1117; --bar: #6ea8e0;
          --warn: #2e2a1f; --warn-line: #bb8009; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 70rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: 0 0 .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { margin: .3rem 0 } .soft { color: var(--soft) }
table { border-collapse: collapse } .scroll { overflow-x: auto }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums; white-space: nowrap }
th { font-weight: 600 } th:first-child, td:first-child { text-align: left }
.facts td, .facts th { text-align: left; white-space: normal }
ul.warnings { background: var(--warn); border-left: 4px solid var(--warn-line); margin: 1rem 0;
              padding: .6rem .6rem .6rem 2rem }
.bar { display: inline-block; height: .7rem; background: var(--bar); vertical-align: middle;
       margin-right: .4rem; min-width: 1px }
.bars th, .bars td { text-align: left; min-width: 6rem }
.images { display: grid; gap: 6px }
figure { margin: 0; text-align: center; min-width: 0 }
figcaption { font-size: .75rem; color: var(--soft); overflow: hidden; text-overflow: ellipsis;
             white-space: nowrap }
img { image-rendering: pixelated; display: block; margin: 0 auto; background: #888 }
.plots { display: flex; flex-wrap: wrap; gap: 1rem }
.plots figure { width: 32rem; max-width: 100% }
.plot img { image-rendering: auto; background: none; width: 100%; height: auto }
.sheet img { max-width: 100%; height: auto; margin: 0 }
.plot figcaption, .sheet figcaption { font-size: .85rem; white-space: normal; text-align: left;
                                      margin-top: .3rem }
nav { margin: .8rem 0; font-size: .9rem } nav a { color: var(--bar); margin-right: .8rem;
      display: inline-block }
"""


def document(title: str, parts: Sequence[str], *, head: str = "") -> bytes:
    """A whole page as UTF-8; the page fetches nothing.

    Args:
      title: text.
      parts: HTML; empty parts are left out.
      head: HTML for the beginning of <head>.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{head}"
        # Otherwise a browser asks the page's server for an icon.
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    ).encode(errors="backslashreplace")


def content_policy(script: str = "") -> str:
    """A <meta> element: the page loads data URLs alone, and runs this script at most.

    Args:
      script: the text of a <script> element, without carriage returns.
    """
    parts = [
        *("default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"),
        *("base-uri 'none'", "form-action 'none'"),
    ]
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        parts.append(f"script-src 'sha256-{digest}'")
    return f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(parts)}">\n'


def json_data(element_id: str, value: Any) -> str:
    """A <script> element that holds a JSON value and runs nothing; no text in it ends the element.

    Args:
      element_id: the id of the element.
      value: a JSON value with finite numbers.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{element_id}">{text}</script>'


def warnings(texts: Sequence[str]) -> str:
    """A highlighted list of warnings; "" without warnings."""
    if not texts:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f'<ul class="warnings">{items}</ul>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table.

    Args:
      head: cells of the header row, HTML.
      rows: rows of cells as from `cell`, HTML.
      kind: CSS class.
    """
    header = f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{header}{body}</table></div>'


def cell(value: Any) -> str:
    """A table cell with a number, a text or a list of numbers; "–" for None."""
    if value is None:
        text = "–"
    elif isinstance(value, list):
        text = ", ".join(f"{item:.2f}" for item in value)
    elif isinstance(value, float):
        text = f"{value:,.4g}"
    else:
        text = f"{value:,}" if isinstance(value, int) else str(value)
    return f"<td>{html.escape(text)}</td>"


def data_url(picture: bytes, kind: str = "png") -> str:
    """A picture, of the kind "png" or "jpeg", as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def image(png: bytes, *, width: int, height: int, alt: str) -> str:
    """An <img> element; width and height in pixels."""
    return f'<img width="{width}" height="{height}" alt="{html.escape(alt)}" src="{data_url(png)}">'
