"""The HTML of report.html: one file that loads nothing else."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.formats import html as html_page
from pipeline.formats import png as png_lib
from pipeline.reports.latent_space import Accuracies
from pipeline.reports.plots import Plot

# Pixels of a side of a displayed image.
_MIN_SIDE, _MAX_SIDE = 56, 128
_MAX_ROWS = 50  # Rows of a table.


class Section(NamedTuple):
    """A part of the page with a heading."""

    name: str  # The id of the HTML element.
    title: str
    body: str  # HTML


def page(*, title: str, lead: str, warnings: Sequence[str], sections: Sequence[Section]) -> bytes:
    """The page as UTF-8.

    Args:
      title: text of the heading.
      lead: text below it.
      warnings: texts at the top of the page.
      sections: the sections in order.
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
    """A table of values; a long table is cut."""
    body = [[html_page.cell(value) for value in row] for row in rows[:_MAX_ROWS]]
    num_hidden = len(rows) - len(body)
    note = text(f"and {num_hidden:,} more") if num_hidden > 0 else ""
    return html_page.table(head, body) + note


def plots(*figures: tuple[Plot, str, str]) -> str:
    """Plots side by side if the screen is wide enough; each is (plot, alt text, caption)."""
    return f'<div class="plots">{"".join(_plot(*figure) for figure in figures)}</div>'


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
    """A column of images with a caption."""

    images: Sequence[np.ndarray]  # uint8 (H, W, C)
    caption: str
    alt: str


def tiles(contents: Sequence[Tile], *, num_columns: int | None = None) -> str:
    """A grid of tiles: num_columns columns that scroll, or as many as the screen is wide."""
    if not contents:
        return ""
    figures = [_tile(tile) for tile in contents]
    column_width = max(76, max(width for _, width in figures))
    style = f"grid-template-columns:repeat({num_columns or 'auto-fill'},{column_width}px)"
    body = "".join(figure for figure, _ in figures)
    return f'<div class="scroll"><div class="images" style="{style}">{body}</div></div>'


def _tile(tile: Tile) -> tuple[str, int]:
    image = np.concatenate(tile.images)
    height, width = tile.images[0].shape[:2]
    side = math.sqrt(height * width)  # The mean side, so that a wide image keeps its height.
    step = max(1, math.ceil(side / _MAX_SIDE))  # Of large images every step-th pixel is shown.
    image = image[::step, ::step]
    scale = max(1, math.ceil(_MIN_SIDE * step / side))
    height, width = image.shape[0] * scale, image.shape[1] * scale
    element = html_page.image(png_lib.png(image), width=width, height=height, alt=tile.alt)
    caption = f"<figcaption>{html.escape(tile.caption)}</figcaption>"
    return f'<figure title="{html.escape(tile.alt)}">{element}{caption}</figure>', width


def accuracies(results: Accuracies | str) -> str:
    """The accuracies of the probes, or the reason why there are none."""
    if isinstance(results, str):
        return text(f"No probes: {results}.")
    rows = [
        ["k-NN, k = 5", f"{results.knn:.1%}"],
        ["linear probe", f"{results.linear:.1%}"],
        ["always the largest class", f"{results.largest_class:.1%}"],
    ]
    rows_used = f"{results.rows_used[0].upper()}{results.rows_used[1:]}."
    return table(("", "accuracy"), rows) + text(rows_used)


def drift(comparison: Mapping[str, Any]) -> str:
    """The result of `drift.compare` as a table."""
    columns = [(f"latent {i}", test) for i, test in enumerate(comparison.get("latents", ()))]
    if "reconstruction_loss" in comparison:
        columns.insert(0, ("reconstruction_loss", comparison["reconstruction_loss"]))
    rows = [
        [name, *test["mean"], *test["variance"], test["statistic"], test["p_value"]]
        for name, test in columns
    ]
    head = (
        *("", "mean, reference", "mean, this export"),
        *("variance, reference", "variance, this export", "KS statistic", "p-value"),
    )
    note = f"Comparison with the reference export {comparison['reference']}."
    if not comparison["same_model"]:
        note += " Another model made it, and latents of two models cannot be compared."
    return text(note) + table(head, rows)
