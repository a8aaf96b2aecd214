"""stats.html: a data set as a person looks at it, in one file that needs no other."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.examples import Record
from pipeline.set_statistics import MAX_MEAN_IMAGES, Statistics

# Classes on the balance chart; more would be no picture any more.
_MAX_BARS = 100
_MIN_SIDE = 56  # Pixels a side that an image is shown at, at least.
_MIN_COLUMN = 76  # Pixels of a column, for captions.
_STYLE = """
:root { --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --paper: #fff; --bar: #3b6ea5;
        --warn: #fff8c5; --warn-line: #d4a72c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #8d96a0; --line: #30363d; --paper: #0d1117; --bar: #6ea8e0;
          --warn: #2e2a1f; --warn-line: #bb8009; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p { margin: .3rem 0 } .soft { color: var(--soft) }
table { border-collapse: collapse } .scroll { overflow-x: auto }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums; white-space: nowrap }
th { font-weight: 600 } th:first-child, td:first-child { text-align: left }
ul.warnings { background: var(--warn); border-left: 4px solid var(--warn-line); margin: 1rem 0;
              padding: .6rem .6rem .6rem 2rem; overflow-wrap: anywhere }
.bar { display: inline-block; height: .7rem; background: var(--bar); vertical-align: middle;
       margin-right: .4rem; min-width: 1px }
.bars th, .bars td { text-align: left; min-width: 6rem }
.images { display: grid; gap: 6px }
figure { margin: 0; text-align: center; min-width: 0 }
figcaption { font-size: .75rem; color: var(--soft); overflow: hidden; text-overflow: ellipsis;
             white-space: nowrap }
img { image-rendering: pixelated; display: block; margin: 0 auto; background: #888 }
"""


def page(
    *,
    name: str,
    described: Mapping[str, Any],
    statistics: Mapping[str, Statistics],
    class_names: Sequence[str],
    samples: Mapping[str, Sequence[Record]],
) -> bytes:
    """The page as UTF-8.

    Args:
      name: the data set's.
      described: the contents of statistics.json.
      statistics: of each split.
      class_names: name of label i at place i.
      samples: some records of each split.
    """
    first = next(iter(statistics.values()))
    total = sum(part.num_examples for part in statistics.values())
    num_quarantined = sum(part["num_quarantined"] for part in described["splits"].values())
    shape = "×".join(map(str, first.image_shape))
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="soft">{total:,} images of {shape}, {len(class_names)} classes, '
        f"{num_quarantined:,} quarantined</p>",
        _warnings(described["warnings"]),
        "<h2>Splits</h2>",
        _splits(described["splits"]),
        _quarantined(described["quarantined"], num_quarantined),
        "<h2>Class balance</h2>",
        _balance(described["splits"], class_names),
        "<h2>Mean image of each class</h2>",
    ]
    for split, part in statistics.items():
        parts.append(_mean_images(split, part, class_names))
    for split, records in samples.items():
        if records:
            parts.append(f"<h2>{html.escape(split)}: the first {len(records)} images</h2>")
            parts.append(_samples(records, first.image_shape, class_names))
    title = html.escape(name)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    ).encode(errors="backslashreplace")


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return "<p>Nothing looks wrong.</p>"
    items = "".join(f"<li>{html.escape(text)}</li>" for text in warnings)
    return f'<ul class="warnings">{items}</ul>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table, of a CSS class, of cells that are HTML already."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{header}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if value is None:
        text = "–"
    elif isinstance(value, list):
        text = ", ".join(f"{item:.2f}" for item in value)
    else:
        text = f"{value:,}" if isinstance(value, int) else str(value)
    return f"<td>{html.escape(text)}</td>"


def _splits(splits: Mapping[str, Mapping[str, Any]]) -> str:
    columns = {
        "num_examples": "images",
        "mean_per_channel": "mean",
        "std_per_channel": "standard deviation",
        "min": "min",
        "max": "max",
        "num_duplicates": "repeated",
        "num_blank": "blank",
        "num_quarantined": "quarantined",
    }
    rows = [
        [_cell(split), *(_cell(part[key]) for key in columns)] for split, part in splits.items()
    ]
    return _table(["split", *columns.values()], rows)


def _quarantined(reasons: Mapping[str, int], total: int) -> str:
    if not total:
        return ""
    rows = [[_cell(reason), _cell(count)] for reason, count in reasons.items()]
    return "<h2>Quarantined</h2>" + _table(["reason", "records"], rows)


def _balance(splits: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]) -> str:
    outside = sorted({int(x) for part in splits.values() for x in part["num_outside_classes"]})
    shown = [("num_per_class", name, name) for name in class_names]
    shown += [("num_outside_classes", str(x), f"{x}, outside the list") for x in outside]
    most = {
        split: max(1, *part["num_per_class"].values(), *part["num_outside_classes"].values())
        for split, part in splits.items()
    }
    rows = []
    for key, name, text in shown[:_MAX_BARS]:
        row = [_cell(text)]
        for split, part in splits.items():
            count = part[key].get(name, 0)
            share = count / most[split]
            bar = f'<span class="bar" style="width:{100 * share:.1f}px"></span>' if count else ""
            row.append(f"<td>{bar}{count:,}</td>")
        rows.append(row)
    left = len(shown) - len(rows)
    more = f'<p class="soft">and {left:,} more classes, in statistics.json</p>' if left > 0 else ""
    return _table(["class", *map(html.escape, splits)], rows, kind="bars") + more


def _shown_size(image: np.ndarray) -> tuple[int, int]:
    """Height and width in pixels on the page."""
    scale = max(1, -(-_MIN_SIDE // max(image.shape[:2])))
    return image.shape[0] * scale, image.shape[1] * scale


def _grid(figures: Sequence[str], image: np.ndarray) -> str:
    """Figures of images of one size, in columns that hold a caption too."""
    column = max(_MIN_COLUMN, _shown_size(image)[1])
    style = f"grid-template-columns:repeat(auto-fill,{column}px)"
    return f'<div class="images" style="{style}">{"".join(figures)}</div>'


def _figure(image: np.ndarray, caption: str, title: str) -> str:
    from PIL import Image

    if image.shape[2] not in (1, 3):
        image = image[..., :1]
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = _shown_size(image)
    return (
        f'<figure title="{html.escape(title)}"><img width="{width}" height="{height}" '
        f'alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _mean_images(split: str, part: Statistics, class_names: Sequence[str]) -> str:
    figures = []
    for label, name in enumerate(class_names[:MAX_MEAN_IMAGES]):
        image = part.mean_image(label)
        if image is not None:
            figures.append(_figure(image, name, f"mean of {split}, class {name}"))
    left = len(class_names) - MAX_MEAN_IMAGES
    more = f'<p class="soft">and {left:,} more classes</p>' if left > 0 else ""
    if not figures:
        return ""
    return f'<p class="soft">{html.escape(split)}</p>{_grid(figures, part.mean_image())}{more}'


def _samples(records: Sequence[Record], shape: tuple[int, ...], class_names: Sequence[str]) -> str:
    figures = []
    for record in records:
        image = np.frombuffer(record.image, np.uint8).reshape(shape)
        step = -(-max(shape[:2]) // 128)  # Large images are shown by every n-th pixel.
        known = 0 <= record.label < len(class_names)
        label = class_names[record.label] if known else str(record.label)
        figures.append(_figure(image[::step, ::step], label, f"{record.id.decode()}: {label}"))
    return _grid(figures, image[::step, ::step])
