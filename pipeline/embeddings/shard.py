"""The export of one shard: its rows, its pictures, its files.

Rows that an earlier export computed are not computed again. Two threads call the model, so
that its calls overlap with each other and with reading and writing.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.embeddings import files as row_files
from pipeline.embeddings import rows
from pipeline.embeddings.inputs import ShardRecords
from pipeline.embeddings.model import PublishedModel
from pipeline.formats import png, tf_example, webdataset
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.stages.tasks import Tasks
from pipeline.storage import files

# Pairs on a contact sheet. The order within a shard is a hash of the ids, so the first records
# of a shard are a fair sample of it.
_SHEET_PAIRS = 96
# Concurrent calls of the model: while one waits for a core, or for its outputs to be copied, the
# other computes.
_CONCURRENT_CALLS = 2


class ExportSettings(NamedTuple):
    """What an export holds of each record. The field names are keys on disk."""

    fields: tuple[str, ...]  # Of rows.FIELDS.
    embedding_format: str  # Of row_files.FORMATS.
    images: str  # "sheets", "all" or "none".
    z_seed: int  # Of the noise in z.


class _Item(NamedTuple):
    """A record that the model has to process."""

    position: int  # Among the readable records of its shard.
    id: str
    label: int
    sha: str
    image: bytes


class EmbeddedShard:
    """The export of one shard."""

    def __init__(
        self,
        task: str,
        records: ShardRecords,
        settings: ExportSettings,
        previous_output: tuple[rows.Rows | None, bytes | None],
        previous_kinds: Mapping[str, int],
        tasks: Tasks,
    ):
        self._task, self._records, self._settings, self._tasks = task, records, settings, tasks
        self._previous_rows, self._previous_sheet = previous_output
        self._previous_kinds, self._kinds = previous_kinds, collections.Counter()
        shas = self._previous_rows.shas if self._previous_rows else ()
        self._previous_positions = {sha: position for position, sha in enumerate(shas)}
        self._ids: list[str] = []
        self._labels: list[int] = []
        self._shas: list[str] = []
        self._reused: list[tuple[int, int]] = []  # (position, position in the previous rows)
        self._sheet: bytes | None = None
        self._secs = dict.fromkeys(("read", "load_model", "compute", "write"), 0.0)

    def make(
        self,
        load_model: Callable[[], PublishedModel],
        outputs: Sequence[str],
        model_manifest: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Writes the shard's files.

        Args:
          load_model: returns the model; called only if a record has to be computed.
          outputs: the model's outputs to compute.
          model_manifest: its manifest.

        Returns:
          The shard's marker without "made_of".
        """
        directory, name = self._tasks.files_directory, row_files.stem(self._task)
        files.make_dirs(directory)
        if self._settings.images == "all":
            with manifest_lib.writing(directory, f"{name}.tar") as file:
                archive = webdataset.Archive(file)
                shard_rows, num_computed, _ = self._compute(
                    load_model, outputs, model_manifest, archive
                )
                archive.close()
            entries = [{**file.entry(), "num_examples": len(shard_rows.ids)}]
        else:
            shard_rows, num_computed, pairs = self._compute(
                load_model, outputs, model_manifest, None
            )
            entries = []
            if pairs:
                originals, reconstructions = map(np.stack, zip(*pairs, strict=True))
                self._sheet = png.contact_sheet(originals, reconstructions)
            if self._sheet:
                entries.append(manifest_lib.write_file(directory, f"{name}.png", self._sheet))
        started = time.perf_counter()
        entries[:0] = row_files.write(
            directory,
            self._task,
            shard_rows,
            embedding_format=self._settings.embedding_format,
            model_id=model_manifest["model_id"],
        )
        if num_reused := len(shard_rows.ids) - num_computed:
            # If the previous shard has rows of several kinds, the kind of a single row is unknown.
            self._kinds[" or ".join(sorted(self._previous_kinds))] += num_reused
        num_missing = self._records.num_read - len(shard_rows.ids)
        entries += quarantine.write(
            directory, self._task, self._records.quarantined, num_quarantined=num_missing
        )
        sums = rows.sums(shard_rows)
        self._secs["write"] += time.perf_counter() - started
        return {
            "entries": entries,
            "secs": self._secs,
            "computed": num_computed,
            "read": self._records.num_read,
            "written": len(shard_rows.ids),
            "quarantined": num_missing,
            "files": [entry["name"] for entry in entries],
            "sums": sums,
            "kinds": dict(self._kinds),
        }

    def _items(self) -> Iterator[_Item]:
        """Yields the records that the model has to process; collects id, label and sha of all."""
        records = (
            (serialized, record, hashlib.sha256(serialized).hexdigest())
            for serialized, record in self._records
        )
        head = list(itertools.islice(records, _SHEET_PAIRS))
        num_pictured = {"all": None, "sheets": _SHEET_PAIRS, "none": 0}[self._settings.images]
        if num_pictured and self._previous_sheet:
            if [sha for *_, sha in head] == self._previous_rows.shas[:_SHEET_PAIRS]:
                num_pictured, self._sheet = 0, self._previous_sheet
        for position, (_, record, sha) in enumerate(itertools.chain(head, records)):
            record_id = record.id.decode()
            self._ids.append(record_id)
            self._labels.append(record.label)
            self._shas.append(sha)
            previous_position = self._previous_positions.get(sha)
            if previous_position is not None:
                self._reused.append((position, previous_position))
            is_pictured = num_pictured is None or position < num_pictured
            if previous_position is None or is_pictured:
                yield _Item(position, record_id, record.label, sha, record.image)

    def _compute(
        self,
        load_model: Callable[[], PublishedModel],
        outputs: Sequence[str],
        model_manifest: Mapping[str, Any],
        archive: webdataset.Archive | None,
    ) -> tuple[rows.Rows, int, list[tuple[np.ndarray, np.ndarray]]]:
        """Returns the rows, the number of computed records, and a sheet's (original, picture)s."""
        settings, computed_columns, pairs, num_computed = self._settings, [], [], 0
        for items, images, model_outputs in self._batches(load_model, outputs):
            started = time.perf_counter()
            shas = [item.sha for item in items]
            columns = rows.columns(model_outputs, shas, settings.fields, seed=settings.z_seed)
            computed_columns.append(([item.position for item in items], columns))
            num_computed += len(items)
            has_pictures = archive or items[0].position < _SHEET_PAIRS
            if "reconstruction" in model_outputs and has_pictures:
                pictures = tf_example.to_pixels(model_outputs["reconstruction"])
                for i, (item, original, picture) in enumerate(
                    zip(items, images, pictures, strict=True)
                ):
                    if archive:
                        archive.add(original, picture, _archive_json(item, i, columns))
                    elif item.position < _SHEET_PAIRS and not self._sheet:
                        pairs.append((original, picture))
            self._tasks.note(self._task, len(self._ids))
            self._secs["write"] += time.perf_counter() - started
        latent_dim = model_manifest["config"]["latent_dim"]
        return self._rows(computed_columns, latent_dim), num_computed, pairs

    def _batches(
        self, load_model: Callable[[], PublishedModel], outputs: Sequence[str]
    ) -> Iterator[tuple[list[_Item], np.ndarray, dict[str, np.ndarray]]]:
        """(items, images, the model's outputs) batch by batch, in order."""
        items = self._items()
        first = self._timed("read", next, items, None)
        if first is None:
            return
        items = itertools.chain([first], items)
        model: PublishedModel = self._timed("load_model", load_model)

        def next_batch() -> tuple[list[_Item], np.ndarray]:
            batch = list(itertools.islice(items, model.batch_size))
            pixels = np.frombuffer(b"".join(item.image for item in batch), np.uint8)
            return batch, pixels.reshape(-1, *model.image_shape)

        calls: collections.deque = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(_CONCURRENT_CALLS) as pool:
            while True:
                batch, images = self._timed("read", next_batch)
                if batch:
                    self._kinds[model.kind] += len(batch)
                    calls.append((batch, images, pool.submit(model.embed, images, outputs)))
                # One batch waits in the queue while the others are computed.
                if len(calls) > _CONCURRENT_CALLS or (calls and not batch):
                    computed_batch, images, future = calls.popleft()
                    yield computed_batch, images, self._timed("compute", future.result)
                elif not batch:
                    break

    def _timed(self, kind: str, work, *args) -> Any:
        started = time.perf_counter()
        try:
            return work(*args)
        finally:
            self._secs[kind] += time.perf_counter() - started

    def _rows(
        self, computed_columns: list[tuple[list[int], dict[str, np.ndarray]]], latent_dim: int
    ) -> rows.Rows:
        """All rows of the shard, computed and reused."""
        columns = {}
        for field in self._settings.fields:
            row_shape = (latent_dim,) if field in rows.VECTORS else ()
            columns[field] = np.empty((len(self._ids), *row_shape), np.float32)
            if self._reused:
                positions, previous_positions = map(list, zip(*self._reused, strict=True))
                columns[field][positions] = self._previous_rows.columns[field][previous_positions]
            for positions, batch_columns in computed_columns:
                columns[field][positions] = batch_columns[field]
        labels = np.array(self._labels, np.int64)
        return rows.Rows(self._ids, labels, self._shas, columns)


def _archive_json(item: _Item, row: int, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A record's JSON object in the archive."""
    values = {field: column[row].tolist() for field, column in columns.items()}
    return {"id": item.id, "label": item.label, **values, "record_sha": item.sha}
