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
_MAX_CLASSES = 1_000  # Rows of the table of classes, which scrolls.
_STYLE = """
.map { position: relative; aspect-ratio: 4.8 / 3.9 }
.map > canvas { width: 100%; height: 100%; display: block; cursor: crosshair; touch-action: pan-y }
.map > canvas:focus-visible { outline: 2px solid var(--bar) }
.card { position: absolute; box-sizing: border-box; width: 9.2rem; max-height: 100%; padding: .4rem;
        overflow: hidden; font-size: .75rem; line-height: 1.35; text-align: left;
        background: var(--paper); border: 1px solid var(--soft); border-radius: 6px }
.card canvas { display: block; margin-bottom: .3rem; image-rendering: pixelated; background: #888 }
.card b, .card div { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 5;
                     overflow: hidden }
.legend [role=group] { display: flex; flex-wrap: wrap; gap: .3rem; margin: .6rem 0;
                       max-height: 9.8rem; overflow-y: auto }
.legend button { display: flex; align-items: center; gap: .3rem; max-width: 14rem; padding: 0 .6rem;
                 min-height: 2rem; font: inherit; font-size: .8rem; color: inherit;
                 background: none; border: 1px solid var(--line); border-radius: 1rem }
.legend button:hover, .legend button:focus-visible { border-color: var(--ink) }
.legend svg { width: 1rem; height: 1rem; flex: none }
.legend span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.legend [aria-pressed=false] { color: var(--soft); text-decoration: line-through }
.legend [aria-pressed=false] svg { opacity: .25 }
.tall { max-height: 27rem; overflow-y: auto }
.classes td:first-child { white-space: normal; min-width: 5rem; max-width: 12rem }
.box { display: block; position: relative; width: 9.5rem; height: .8rem }
.box i { position: absolute; top: 0; bottom: 0; min-width: 2px; background: var(--bar) }
.box i + i { top: -.15rem; bottom: -.15rem; background: var(--ink) }
"""


class Section(NamedTuple):
    """A part of the page with a heading."""

    name: str  # The id of the HTML element.
    title: str
    body: str  # HTML


def page(
    *,
    title: str,
    lead: str,
    warnings: Sequence[str],
    sections: Sequence[Section],
    script: str = "",
) -> bytes:
    """The page as UTF-8; it runs no script but the given one.

    Args:
      title: text of the heading.
      lead: text below it.
      warnings: texts at the top of the page.
      sections: the sections in order.
      script: JavaScript that runs when the page is there.
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
    if script:
        parts.append(f"<script>{script}</script>")
    head = f"{html_page.content_policy(script)}<style>{_STYLE}</style>\n"
    return html_page.document(title, parts, head=head)


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


def plots(*figures: tuple[Plot, str, str] | tuple[Plot, str, str, str]) -> str:
    """Plots side by side if the screen is wide enough.

    Args:
      *figures: (plot, alt text, caption), and the name of a map that a script may draw instead.
    """
    return f'<div class="plots">{"".join(_plot(*figure) for figure in figures)}</div>'


def _plot(plot: Plot, alt: str, caption: str, map_name: str = "") -> str:
    data_map = f' data-map="{map_name}"' if map_name else ""
    return (
        f'<figure class="plot"{data_map}><picture><source media="(prefers-color-scheme: dark)" '
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


class ClassLosses(NamedTuple):
    """The reconstruction_loss of a class, nats per image."""

    name: str
    num_records: int
    quartiles: tuple[float, float, float]
    excess: float | None  # The median above the entropy of the pixels.


def class_losses(classes: Sequence[ClassLosses]) -> str:
    """A table with a box from quartile to quartile for each class, the worst class first."""
    has_floor = all(c.excess is not None for c in classes)
    classes = sorted(classes, key=lambda c: -(c.excess or 0 if has_floor else c.quartiles[1]))
    low, high = min(c.quartiles[0] for c in classes), max(c.quartiles[2] for c in classes)
    scale = 100 / max(high - low, 1e-9)
    head = ["class", "median", f"{low:,.1f} to {high:,.1f}", "quartiles", "records"]
    head += ["above the entropy"] if has_floor else []
    rows = []
    for c in classes[:_MAX_CLASSES]:
        first, median, third = c.quartiles
        texts = [c.name, f"{median:,.1f}", "", f"{first:,.1f} to {third:,.1f}", c.num_records]
        texts += [f"{c.excess:,.1f}"] if has_floor else []
        row = [html_page.cell(value) for value in texts]
        row[2] = (
            f'<td><span class="box"><i style="left:{scale * (first - low):.1f}%;'
            f'width:{scale * (third - first):.1f}%"></i>'
            f'<i style="left:{scale * (median - low):.1f}%"></i></span></td>'
        )
        rows.append(row)
    note = (
        f"In nats per image, of a sample of {sum(c.num_records for c in classes):,} records. A bar "
        "goes from the lower to the upper quartile, and its line is the median."
    )
    if has_floor:
        note += (
            " Classes are in order of their median above the entropy of the pixels, which no "
            "Bernoulli loss is below."
        )
    num_hidden = len(classes) - len(rows)
    end = text(f"and {num_hidden:,} more") if num_hidden > 0 else ""
    table = html_page.table(head, rows, kind="classes")
    return f'{text(note)}<div class="tall">{table}</div>{end}'


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
