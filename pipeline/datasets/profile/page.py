"""Renders stats.html: a self-contained page that shows a data set."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.datasets.profile import drift
from pipeline.datasets.profile.statistics import MAX_MEAN_IMAGES, Statistics
from pipeline.formats import html as html_page
from pipeline.formats import png
from pipeline.formats.tf_example import UNLABELLED, Record

# Limit on the classes of the balance chart.
_MAX_BARS = 100
_MIN_SIDE = 56  # Minimum size of an image on the page, in pixels.
_MIN_COLUMN = 76  # Minimum width of a column in pixels, for captions.


def render(
    *,
    name: str,
    description: Mapping[str, Any],
    comparison: Mapping[str, Any] | None,
    statistics: Mapping[str, Statistics],
    class_names: Sequence[str],
    samples: Mapping[str, Sequence[Record]],
) -> bytes:
    """The page as UTF-8.

    Args:
      name: the data set's name.
      description: the contents of statistics.json.
      comparison: the result of `drift.compare`, if there is one.
      statistics: split -> statistics.
      class_names: class_names[i] is the name of label i.
      samples: split -> records to show.
    """
    first = next(iter(statistics.values()))
    total = sum(part.num_examples for part in statistics.values())
    num_quarantined = sum(part["num_quarantined"] for part in description["splits"].values())
    num_unlabelled = sum(part.num_unlabelled for part in statistics.values())
    shape = "×".join(map(str, first.image_shape))
    warnings = [*description["warnings"], *(comparison["warnings"] if comparison else ())]
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="soft">{total:,} images of {shape}, {_classes(class_names, num_unlabelled)}, '
        f"{num_quarantined:,} quarantined</p>",
        html_page.warnings(warnings) or "<p>Nothing looks wrong.</p>",
        "<h2>Splits</h2>",
        _splits(description["splits"]),
        _quarantined(description["quarantined"], num_quarantined),
    ]
    if comparison:
        parts.append(_drift(comparison))
    if num_unlabelled < total:
        parts += ["<h2>Class balance</h2>", _balance(description["splits"], class_names)]
    parts.append("<h2>Mean images</h2>" if not class_names else "<h2>Mean image of each class</h2>")
    for split, part in statistics.items():
        parts.append(_mean_images(split, part, class_names))
    for split, records in samples.items():
        if records:
            parts.append(f"<h2>{html.escape(split)}: the first {len(records)} images</h2>")
            parts.append(_samples(records, first.image_shape, class_names))
    return html_page.document(name, parts)


def _classes(class_names: Sequence[str], num_unlabelled: int) -> str:
    """The number of classes, in words."""
    if not class_names:
        return "no labels" if num_unlabelled else "0 classes"
    unlabelled = f" and {num_unlabelled:,} images without a label" if num_unlabelled else ""
    return f"{len(class_names)} classes{unlabelled}"


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
        [html_page.cell(split), *(html_page.cell(part[key]) for key in columns)]
        for split, part in splits.items()
    ]
    return html_page.table(["split", *columns.values()], rows)


def _quarantined(reasons: Mapping[str, int], total: int) -> str:
    if not total:
        return ""
    rows = [[html_page.cell(reason), html_page.cell(count)] for reason, count in reasons.items()]
    return "<h2>Quarantined</h2>" + html_page.table(["reason", "records"], rows)


def _drift(comparison: Mapping[str, Any]) -> str:
    """The result of `drift.compare` as tables."""
    rows = []
    for split, part in comparison["splits"].items():
        for name, test in drift.tests(part):
            moments = *test.get("mean", (None, None)), *test.get("variance", (None, None))
            values = split, name, *moments, test["statistic"], test["p_value"]
            rows.append([html_page.cell(value) for value in values])
    sides = "mean, reference", "mean, here", "variance, reference", "variance, here"
    shares = {
        s: p["class_shares"]["shares"]
        for s, p in comparison["splits"].items()
        if p.get("class_shares")
    }
    share_rows = []
    for name in dict.fromkeys(name for part in shares.values() for name in part):
        pairs = [part.get(name, (None, None)) for part in shares.values()]
        cells = [None if share is None else f"{share:.1%}" for pair in pairs for share in pair]
        share_rows.append([html_page.cell(value) for value in (name, *cells)])
    columns = [
        html.escape(f"{split}, {side}") for split in shares for side in ("reference", "here")
    ]
    return "".join(
        [
            "<h2>Drift</h2>",
            '<p class="soft">The records of the last job, compared with the data set '
            f"{html.escape(comparison['reference'])}: the mean of each image (brightness), the "
            "standard deviation of each image (contrast), and the classes. The statistic is that "
            "of Kolmogorov and Smirnov; of classes, the total variation.</p>",
            html_page.table(["split", "", *sides, "statistic", "p-value"], rows) if rows else "",
            '<p class="soft">The classes whose shares differ most</p>' if share_rows else "",
            html_page.table(["class", *columns], share_rows) if share_rows else "",
        ]
    )


def _balance(splits: Mapping[str, Mapping[str, Any]], class_names: Sequence[str]) -> str:
    outside = sorted({int(x) for part in splits.values() for x in part["num_outside_classes"]})
    classes = [(name, "num_per_class", name) for name in class_names]
    classes += [(f"{x}, outside the list", "num_outside_classes", str(x)) for x in outside]
    # (class, its number of records in each split)
    counts = [
        (text, [part[key].get(name, 0) for part in splits.values()]) for text, key, name in classes
    ]
    unlabelled = [part.get("num_unlabelled", 0) for part in splits.values()]
    if any(unlabelled):
        counts.append(("unlabelled", unlabelled))
    highest = [max(1, *column) for column in zip(*(row for _, row in counts), strict=True)]
    rows = []
    for text, row_counts in counts[:_MAX_BARS]:
        row = [html_page.cell(text)]
        for count, most in zip(row_counts, highest, strict=True):
            share = count / most
            bar = f'<span class="bar" style="width:{100 * share:.1f}px"></span>' if count else ""
            row.append(f"<td>{bar}{count:,}</td>")
        rows.append(row)
    table = html_page.table(["class", *map(html.escape, splits)], rows, kind="bars")
    num_hidden = len(counts) - len(rows)
    if num_hidden > 0:
        table += f'<p class="soft">and {num_hidden:,} more classes, in statistics.json</p>'
    return table


def _shown_size(image: np.ndarray) -> tuple[int, int]:
    """(height, width) on the page, in pixels."""
    scale = max(1, -(-_MIN_SIDE // max(image.shape[:2])))
    return image.shape[0] * scale, image.shape[1] * scale


def _grid(figures: Sequence[str], image: np.ndarray) -> str:
    """A grid of figures whose images have the size of `image`; columns leave room for captions."""
    column = max(_MIN_COLUMN, _shown_size(image)[1])
    style = f"grid-template-columns:repeat(auto-fill,{column}px)"
    return f'<div class="images" style="{style}">{"".join(figures)}</div>'


def _figure(image: np.ndarray, caption: str, title: str) -> str:
    height, width = _shown_size(image)
    picture = html_page.image(png.png(image), width=width, height=height, alt=title)
    return (
        f'<figure title="{html.escape(title)}">{picture}'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _mean_images(split: str, part: Statistics, class_names: Sequence[str]) -> str:
    figures = []
    for label, name in enumerate(class_names[:MAX_MEAN_IMAGES]):
        image = part.mean_image(label)
        if image is not None:
            figures.append(_figure(image, name, f"mean of {split}, class {name}"))
    if part.num_examples and part.num_unlabelled == part.num_examples:
        caption = "unlabelled" if class_names else "all images"
        figures.append(_figure(part.mean_image(), caption, f"mean of {split}"))
    if not figures:
        return ""
    section = f'<p class="soft">{html.escape(split)}</p>{_grid(figures, part.mean_image())}'
    num_hidden = len(class_names) - MAX_MEAN_IMAGES
    if num_hidden > 0:
        section += f'<p class="soft">and {num_hidden:,} more classes</p>'
    return section


def _samples(records: Sequence[Record], shape: tuple[int, ...], class_names: Sequence[str]) -> str:
    figures = []
    for record in records:
        image = np.frombuffer(record.image, np.uint8).reshape(shape)
        step = -(-max(shape[:2]) // 128)  # Large images are sampled at every n-th pixel.
        has_name = 0 <= record.label < len(class_names)
        label = class_names[record.label] if has_name else str(record.label)
        if record.label == UNLABELLED:
            label = "unlabelled" if class_names else ""
        title = f"{record.id.decode()}{': ' if label else ''}{label}"
        figures.append(_figure(image[::step, ::step], label, title))
    return _grid(figures, image[::step, ::step])
