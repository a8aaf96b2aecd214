"""The scatters that scatter.js draws in report.html: their data, and the script.

Without scripts, the page shows the figures of plots.py.
"""

import html
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.embeddings.rows import Rows
from pipeline.formats import html as html_page
from pipeline.formats.projector import Sprite
from pipeline.reports import latent_space
from pipeline.reports.latent_space import Map

# The first rows of the sample, the same in every map; they bound the page's size.
MAX_POINTS = latent_space.MAX_TSNE
MAX_SIDE = 32  # Pixels of a record's picture.
# Bytes of the pictures as PNG, which is exact; larger ones become a JPEG. 2,000 digits of MNIST
# take 400 kB, and 2,000 colour photos take 5 MB as PNG or 900 kB as JPEG.
_MAX_PNG = 1_000_000
_JPEG_QUALITY = 60
_RANGE = 10_000  # Coordinates are integers from 0 to this.
_MARGIN = 0.03  # Of a map's width, so that points don't touch its frame.


def script() -> str:
    """The text of scatter.js, which reads the elements that `data` makes."""
    return pathlib.Path(__file__).with_name("scatter.js").read_text(encoding="utf-8")


def data(
    maps: Sequence[Map], rows: Rows, *, class_name: Callable[[int], str], sprite: Sprite | None
) -> str:
    """The HTML in front of the figures: a place for the legend, and the data of all maps.

    Args:
      maps: of the first rows of a sample, or of all rows.
      rows: the sample.
      class_name: gives a label's name.
      sprite: pictures of the first MAX_POINTS rows.
    """
    count = min(MAX_POINTS, len(rows.ids))
    classes, indices = np.unique(rows.labels[:count], return_inverse=True)
    losses = rows.columns.get("reconstruction_loss")
    value = {
        "ids": rows.ids[:count],
        "classes": indices.tolist(),
        "names": [class_name(label) for label in classes.tolist()],
        "losses": None if losses is None else [round(x, 1) for x in losses[:count].tolist()],
        "maps": {latent_map.name: _map(latent_map) for latent_map in maps},
        "sprite": sprite and _sprite(sprite),
    }
    hint = (
        f"{count:,} records are drawn. Point at one, tap it, or walk from one to the next with the "
        "arrow keys. A click keeps the record, Escape drops it."
    )
    return (
        f'<div class="legend" id="scatter-legend" hidden><p class="soft">{html.escape(hint)}</p>'
        '<div role="group" aria-label="Classes"></div></div>'
    ) + html_page.json_data("scatter-data", value)


def _map(latent_map: Map) -> dict[str, Any]:
    from matplotlib import ticker

    points = latent_map.points[:MAX_POINTS].astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.maximum(_MARGIN * (high - low), 1e-6)
    low, span = low - margin, high - low + 2 * margin
    ticks: list[list[tuple[int, str]]] = []
    for name, start, width in zip(latent_map.axes, low, span, strict=True):
        values = ticker.MaxNLocator(5).tick_values(start, start + width) if name else []
        places = [(round(_RANGE * (v - start) / width), f"{v:.4g}") for v in values]
        ticks.append([(at, text.replace("-", "−")) for at, text in places if 0 <= at <= _RANGE])
    scaled = np.rint(_RANGE * (points - low) / span).astype(int)
    return {"points": scaled.ravel().tolist(), "axes": latent_map.axes, "ticks": ticks}


def _sprite(sprite: Sprite) -> dict[str, Any]:
    png = sprite.png()
    is_small = len(png) <= _MAX_PNG
    return {
        "url": html_page.data_url(png) if is_small else html_page.data_url(_jpeg(sprite), "jpeg"),
        "columns": sprite.columns,
        "height": sprite.size[0],
        "width": sprite.size[1],
        "missing": sorted(sprite.missing),
    }


def _jpeg(sprite: Sprite) -> bytes:
    from PIL import Image

    pixels, buffer = sprite.pixels, io.BytesIO()
    picture = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
    picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
