"""The sections of a report that show records: pictures in rows, or their ids.

Functions put each figure, as PNG, into `plots` by its name.
"""

import numpy as np

from pipeline.formats import png as png_lib
from pipeline.formats import tf_example
from pipeline.reports import page as report_page
from pipeline.reports.data import NUM_PAIRS, ReportData
from pipeline.reports.page import Section, Tile


def reconstructions(data: ReportData, plots: dict[str, bytes]) -> Section | None:
    """Originals, their reconstructions, and the differences."""
    if not data.sample or not data.model:
        return None
    sample, images = data.sample, data.images
    candidates = range(min(NUM_PAIRS, len(sample.tasks)))
    rows = [row for row in candidates if sample.key(row) in images]
    if not rows:
        return None
    originals = np.stack([images[sample.key(row)] for row in rows])
    pictures = tf_example.to_pixels(data.model.reconstruct(originals))
    differences, scale = _differences(originals, pictures)
    plots["reconstructions"] = png_lib.contact_sheet(originals, pictures, differences)
    tiles = []
    for row, *column in zip(rows, originals, pictures, differences, strict=True):
        name = data.class_name(int(sample.rows.labels[row]))
        alt = f"{sample.rows.ids[row]} above its reconstruction"
        tiles.append(Tile(column, name, alt))
    note = report_page.text(
        "Each original is above its reconstruction by the model,",
        f"which has latent_dim = {data.model.latent_dim}. {scale}",
    )
    body = note + report_page.tiles(tiles)
    return Section("reconstructions", "Originals and reconstructions", body)


def _differences(originals: np.ndarray, pictures: np.ndarray) -> tuple[np.ndarray, str]:
    """Pictures of reconstruction − original, uint8 (n, H, W, C), and a sentence on their scale."""
    differences = pictures.astype(np.float64) - originals
    # Without the largest one in a hundred, so that a few pixels don't hide the others.
    reach = max(1, round(float(np.percentile(np.abs(differences), 99))))
    shades = np.clip(np.rint(127.5 * (1 + differences / reach)), 0, 255).astype(np.uint8)
    colours = " in each colour" if originals.shape[-1] == 3 else ""
    scale = (
        f"The third picture is their difference{colours}: grey where both are equal, white where "
        f"the reconstruction is brighter by {reach} of 255 or more, black where it is as much "
        "darker."
    )
    return shades, scale


def largest_losses(data: ReportData, plots: dict[str, bytes]) -> Section | None:
    """The records that the model reconstructs worst."""
    if not data.worst:
        return None
    images, title = data.images, "Largest reconstruction_loss"
    worst = [row for row in data.worst if (row[3], row[1]) in images]
    is_labelled, has_floor = data.is_labelled, len(data.worst[0]) > 4
    which = "Images with the largest reconstruction_loss"
    if has_floor:
        which = (
            "Images whose reconstruction_loss is furthest above the entropy of their pixels, "
            "which no Bernoulli loss is below"
        )
    ending = ". They may be unusual or damaged."
    if is_labelled:
        ending = ", with their labels. They may be unusual, damaged or mislabelled."
    note = which + ending
    if not worst:
        rows = [
            [record_id, *([data.class_name(label)] if is_labelled else []), loss, *excess]
            for loss, record_id, label, _, *excess in data.worst
        ]
        columns = ["id", *(["label"] if is_labelled else []), "reconstruction_loss"]
        columns += ["above the entropy"] if has_floor else []
        body = report_page.text(note) + report_page.table(columns, rows)
        return Section("largest-losses", title, body)
    originals = np.stack([images[row[3], row[1]] for row in worst])
    columns = [(original,) for original in originals]
    if data.model:
        pictures = tf_example.to_pixels(data.model.reconstruct(originals))
        differences, scale = _differences(originals, pictures)
        note = f"{note} {scale}"
        columns = list(zip(originals, pictures, differences, strict=True))
        plots["largest_losses"] = png_lib.contact_sheet(originals, pictures, differences)
    tiles = []
    for (loss, record_id, label, _, *excess), column in zip(worst, columns, strict=True):
        name = data.class_name(label)
        labelled = f", labelled {name}" if name else ""
        alt = f"{record_id}{labelled}, reconstruction_loss {loss:.1f} nats"
        alt += "".join(f", {nats:.1f} above the entropy" for nats in excess)
        shown = f"{(excess or [loss])[0]:.0f}"
        tiles.append(Tile(column, f"{shown}{': ' if name else ''}{name}", alt))
    return Section("largest-losses", title, report_page.text(note) + report_page.tiles(tiles))


def nearest(data: ReportData) -> Section | None:
    """Records with their nearest neighbours."""
    if not data.neighbours:
        return None
    rows, tiles = data.sample.rows, []
    for query, *neighbours in data.neighbours:
        query_id = rows.ids[query]
        for row in (query, *neighbours):
            record_id, name = rows.ids[row], data.class_name(int(rows.labels[row]))
            image = data.images.get(data.sample.key(row))
            if image is None:
                continue
            alt, caption = ", ".join(filter(None, (record_id, name))), f"{name or 'query'}:"
            if row != query:
                alt, caption = f"{alt}, near {query_id}", name
            tiles.append(Tile((image,), caption, alt))
    if not tiles:
        table = [
            [rows.ids[query], ", ".join(rows.ids[row] for row in neighbours)]
            for query, *neighbours in data.neighbours
        ]
        body = report_page.table(("id", "nearest"), table)
    else:
        body = report_page.tiles(tiles, num_columns=max(map(len, data.neighbours)))
    note = report_page.text(
        "Each row shows a record, then the records with the nearest embeddings",
        f"in a sample of {len(rows.ids):,}.",
    )
    return Section("neighbours", "Nearest neighbours", note + body)
