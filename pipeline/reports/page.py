"""report.html: an export as a person looks at it, in one file that fetches nothing."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.formats import html as html_page
from pipeline.formats import png as png_lib
from pipeline.reports.latent_space import Accuracies
from pipeline.reports.plots import Plot

_MIN_SIDE = 56  # Pixels a side that an image is shown at, at least.
_MAX_SIDE = 128
# Rows of a table; more would be no page any more.
_MAX_ROWS = 50


class Section(NamedTuple):
    """A part of the page with a heading."""

    name: str  # Its address in the page.
    title: str
    body: str  # HTML


def page(*, title: str, lead: str, warnings: Sequence[str], sections: Sequence[Section]) -> bytes:
    """The page as UTF-8.

    Args:
      title: text of the heading.
      lead: text below it.
      warnings: texts that have to be seen.
      sections: in their order.
    """
    links = "".join(f'<a href="#{s.name}">{html.escape(s.title)}</a>' for s in sections)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{html.escape(lead)}</p>',
        html_page.warnings(warnings),
        f"<nav>{links}</nav>",
    ]
    for section in sections:
        heading = f"<h2>{html.escape(section.title)}</h2>"
        parts.append(f'<section id="{section.name}">{heading}\n{section.body}</section>')
    return html_page.document(title, parts)


def text(*sentences: str) -> str:
    """A paragraph of text."""
    return f'<p class="soft">{html.escape(" ".join(sentences))}</p>'


def facts(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = [[html_page.cell(name), html_page.cell(value)] for name, value in values.items()]
    return html_page.table((), rows, kind="facts")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of values; of very many rows the first."""
    body = [[html_page.cell(value) for value in row] for row in rows[:_MAX_ROWS]]
    left = len(rows) - len(body)
    return html_page.table(head, body) + (text(f"and {left:,} more") if left > 0 else "")


def plots(*found: tuple[Plot, str, str]) -> str:
    """Plots side by side where there is room: (plot, alt text, caption) of each."""
    return f'<div class="plots">{"".join(_plot(*of) for of in found)}</div>'


def _plot(plot: Plot, alt: str, caption: str) -> str:
    return (
        '<figure class="plot"><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{html_page.data_url(plot.dark)}"><img alt="{html.escape(alt)}" '
        f'src="{html_page.data_url(plot.light)}"></picture>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def sheet(png: bytes, alt: str, caption: str) -> str:
    """One large picture with a caption."""
    return (
        f'<figure class="sheet"><img alt="{html.escape(alt)}" src="{html_page.data_url(png)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


class Tile(NamedTuple):
    """Images above each other, with a caption."""

    images: Sequence[np.ndarray]  # uint8 (H, W, C)
    caption: str
    alt: str


def tiles(found: Sequence[Tile], *, num_columns: int | None = None) -> str:
    """Tiles in as many columns as the screen has room for, or in so many that can be scrolled."""
    if not found:
        return ""
    shown = [_tile(tile) for tile in found]
    column = max(76, max(width for _, width in shown))
    style = f"grid-template-columns:repeat({num_columns or 'auto-fill'},{column}px)"
    body = "".join(body for body, _ in shown)
    return f'<div class="scroll"><div class="images" style="{style}">{body}</div></div>'


def _tile(tile: Tile) -> tuple[str, int]:
    image = np.concatenate(tile.images)
    height, width = tile.images[0].shape[:2]
    side = math.sqrt(height * width)  # So that a wide image keeps its height.
    step = max(1, math.ceil(side / _MAX_SIDE))  # Large images are shown by every n-th pixel.
    image = image[::step, ::step]
    scale = max(1, math.ceil(_MIN_SIDE * step / side))
    height, width = image.shape[0] * scale, image.shape[1] * scale
    shown = html_page.image(png_lib.png(image), width=width, height=height, alt=tile.alt)
    caption = f"<figcaption>{html.escape(tile.caption)}</figcaption>"
    return f'<figure title="{html.escape(tile.alt)}">{shown}{caption}</figure>', width


def accuracies(found: Accuracies | str) -> str:
    """What a k-NN and a linear probe make of the embeddings."""
    if isinstance(found, str):
        return text(f"No probes: {found}.")
    rows = [
        ["k-NN, k = 5", f"{found.knn:.1%}"],
        ["linear probe", f"{found.linear:.1%}"],
        ["always the largest class", f"{found.largest_class:.1%}"],
    ]
    return table(("", "accuracy"), rows) + text(f"{found.how[0].upper()}{found.how[1:]}.")


def drift(found: Mapping[str, Any]) -> str:
    """How far the rows lie from those of the reference."""
    rows = []
    named = [(f"latent {i}", of) for i, of in enumerate(found.get("latents", ()))]
    if "reconstruction_loss" in found:
        named.insert(0, ("reconstruction_loss", found["reconstruction_loss"]))
    for name, of in named:
        rows.append([name, *of["mean"], *of["variance"], of["statistic"], of["p_value"]])
    head = ("", "mean there", "mean here", "variance there", "variance here", "KS statistic", "p")
    other = "" if found["same_model"] else (
        " Another model made it, and latents of two models cannot be compared."
    )  # fmt: skip
    return text(f"Against the export {found['reference']}.{other}") + table(head, rows)
