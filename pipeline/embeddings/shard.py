"""The export of one shard: its records in, its rows and pictures out, then its files.

Rows that an earlier export computed are not computed again. Two threads call the model, so that
its calls overlap with each other and with the work on their results.
"""

import collections
import concurrent.futures
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.embeddings import files as row_files
from pipeline.embeddings import rows
from pipeline.embeddings.inputs import ShardContents
from pipeline.embeddings.model import PublishedModel
from pipeline.formats import png, tf_example, webdataset
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.storage import files

# Concurrent calls of the model: while one waits for a core, or for its outputs to be copied, the
# other computes.
_CONCURRENT_CALLS = 2
# The likelihood whose reconstruction_loss holds the entropy of the pixels.
BERNOULLI = "bernoulli"


class ExportSettings(NamedTuple):
    """What an export holds of each record. The field names are keys on disk."""

    fields: tuple[str, ...]  # Of rows.FIELDS.
    embedding_format: str  # Of row_files.FORMATS.
    images: str  # "sheets", "all" or "none".
    z_seed: int  # Of the noise in z.


class PreviousShard(NamedTuple):
    """What an earlier export by the same model has of a shard."""

    rows: rows.Rows | None
    sheet: bytes | None  # PNG
    kinds: Mapping[str, int]  # Kind of arithmetic -> number of rows.


class EmbeddedShard(NamedTuple):
    """The rows and pictures of a shard with n records."""

    rows: rows.Rows
    pictures: np.ndarray | None  # uint8 (k, H, W, C): reconstructions of the first k records
    sheet: bytes | None  # The PNG of an earlier export, where it stays the same.
    num_computed: int
    kinds: dict[str, int]  # Kind of arithmetic -> number of rows.
    secs: dict[str, float]


def embed(
    contents: ShardContents,
    settings: ExportSettings,
    previous: PreviousShard,
    *,
    load_model: Callable[[], PublishedModel],
    outputs: Sequence[str],
    latent_dim: int,
    note: Callable[[int], None],
    note_call: Callable[[float], None],
) -> EmbeddedShard:
    """Computes the rows and pictures of a shard that the earlier export does not have.

    Args:
      contents: the shard's records.
      settings: what to export of each record.
      previous: what an earlier export has.
      load_model: returns the model; called only if a record has to be computed.
      outputs: the model's outputs to compute.
      latent_dim: the model's.
      note: takes the number of records that are done.
      note_call: takes the seconds of each call of the model.
    """
    count, shas = len(contents.ids), contents.shas
    known = previous.rows.shas if previous.rows else []
    positions = {sha: position for position, sha in enumerate(known)}
    origins = np.array([positions.get(sha, -1) for sha in shas], np.int64)
    num_pictures = {"all": count, "sheets": min(count, row_files.SHEET_PAIRS), "none": 0}[
        settings.images
    ]
    sheet = None
    if (
        settings.images == "sheets"
        and previous.sheet
        and shas[: row_files.SHEET_PAIRS] == (known[: row_files.SHEET_PAIRS])
    ):
        num_pictures, sheet = 0, previous.sheet
    is_known = origins >= 0
    columns = {
        field: np.empty((count, latent_dim) if field in rows.VECTORS else (count,), np.float32)
        for field in settings.fields
    }
    for field, column in columns.items():
        if previous.rows and is_known.any():  # TFRecords without rows have no columns.
            column[is_known] = previous.rows.columns[field][origins[is_known]]
    pictures = np.empty((num_pictures, *contents.images.shape[1:]), np.uint8)
    to_compute = np.flatnonzero(~is_known | (np.arange(count) < num_pictures))
    secs, kinds = {"load_model": 0.0, "compute": 0.0}, collections.Counter()
    if len(to_compute):
        started = time.perf_counter()
        model = load_model()
        secs["load_model"] = time.perf_counter() - started
        kinds[model.kind] = len(to_compute)
        for batch, values, call_secs in _outputs(model, contents.images, to_compute, outputs):
            note_call(call_secs)
            new = rows.columns(
                values, [shas[i] for i in batch], settings.fields, seed=settings.z_seed
            )
            for field, column in columns.items():
                column[batch] = new[field]
            is_pictured = batch < num_pictures
            if is_pictured.any():
                reconstructions = values["reconstruction"][is_pictured]
                pictures[batch[is_pictured]] = tf_example.to_pixels(reconstructions)
            note(int(batch[-1]) + 1)
        secs["compute"] = time.perf_counter() - started - secs["load_model"]
    if num_reused := count - len(to_compute):
        # If the previous shard has rows of several kinds, the kind of a single row is unknown.
        kinds[" or ".join(sorted(previous.kinds))] += num_reused
    return EmbeddedShard(
        rows.Rows(contents.ids, contents.labels, shas, columns),
        pictures if num_pictures else None,
        sheet,
        len(to_compute),
        dict(kinds),
        secs,
    )


def _outputs(
    model: PublishedModel, images: np.ndarray, positions: np.ndarray, outputs: Sequence[str]
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], float]]:
    """(positions of a batch, the model's outputs for its images, seconds), in order."""

    def call(batch_images: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
        started = time.perf_counter()
        values = model.embed(batch_images, outputs)
        return values, time.perf_counter() - started

    calls: collections.deque[Any] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_CALLS) as pool:
        for first in range(0, len(positions), model.batch_size):
            batch = positions[first : first + model.batch_size]
            calls.append((batch, pool.submit(call, images[batch])))
            if len(calls) > _CONCURRENT_CALLS:  # One batch waits while the others are computed.
                done, future = calls.popleft()
                yield done, *future.result()
        for done, future in calls:
            yield done, *future.result()


def write(
    directory: str,
    task: str,
    contents: ShardContents,
    embedded: EmbeddedShard,
    settings: ExportSettings,
    *,
    class_names: Sequence[str],
    split: str,
    model_id: str,
    likelihood: str,
) -> dict[str, Any]:
    """Writes the files of a shard.

    Args:
      directory: the export's.
      task: name of the shard.
      contents: its records.
      embedded: its rows and pictures.
      settings: what to export of each record.
      class_names: class_names[i] is the name of label i.
      split: of the shard.
      model_id: of the model.
      likelihood: the model's, as its config names it.

    Returns:
      The shard's marker without "made_of".
    """
    started = time.perf_counter()
    entries = row_files.write(
        directory,
        task,
        embedded.rows,
        class_names=class_names,
        split=split,
        embedding_format=settings.embedding_format,
        model_id=model_id,
    )
    name = row_files.picture_name(task, settings.images)
    pictures, originals = embedded.pictures, contents.images
    sheet = embedded.sheet
    if settings.images == "all":
        files.make_dirs(files.join(directory, row_files.IMAGES_DIRECTORY))
        entries.append(_write_archive(directory, name, contents, embedded))
    elif pictures is not None:
        sheet = png.contact_sheet(originals[: len(pictures)], pictures)
    if sheet:
        files.make_dirs(files.join(directory, row_files.IMAGES_DIRECTORY))
        entries.append(manifest_lib.write_file(directory, name, sheet))
    num_missing = contents.num_read - len(contents.ids)
    entries += quarantine.write(directory, task, contents.quarantined, num_quarantined=num_missing)
    floor = rows.bernoulli_entropy(originals) if likelihood == BERNOULLI else None
    sums = rows.sums(embedded.rows, floor)
    return {
        "entries": entries,
        "secs": {**embedded.secs, "write": time.perf_counter() - started},
        "computed": embedded.num_computed,
        "read": contents.num_read,
        "written": len(contents.ids),
        "quarantined": num_missing,
        "files": [entry["name"] for entry in entries],
        "sums": sums,
        "kinds": embedded.kinds,
    }


def _write_archive(
    directory: str, name: str, contents: ShardContents, embedded: EmbeddedShard
) -> dict[str, Any]:
    """Writes all pictures of a shard, and returns the archive's entry."""
    columns = embedded.rows.columns
    with manifest_lib.writing(directory, name) as file:
        archive = webdataset.Archive(file)
        for i, record_id in enumerate(contents.ids):
            about = {
                "id": record_id,
                "label": int(contents.labels[i]),
                **{field: column[i].tolist() for field, column in columns.items()},
                "record_sha": contents.shas[i],
            }
            archive.add(contents.images[i], embedded.pictures[i], about)
        archive.close()
    return {**file.entry(), "num_examples": len(contents.ids)}
