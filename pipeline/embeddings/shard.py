"""One shard on its way through the model: its rows, its pictures, its files.

Records that are known from an earlier export are not computed again. The model is called
from two threads, so that its calls overlap with each other and with reading and writing.
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
from pipeline.embeddings.inputs import Records
from pipeline.embeddings.model import PublishedModel
from pipeline.formats import png, tf_example, webdataset
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.stages.tasks import Tasks
from pipeline.storage import files

# Pairs on a contact sheet. The order within a shard is a hash of the ids, so the
# first records are a fair sample of it.
_SHEET_PAIRS = 96
# Calls of the model under way at a time: while one waits for a core, or for its outputs to be
# copied, the other computes.
_CALLS_AT_ONCE = 2


class Making(NamedTuple):
    """What is made of each record."""

    fields: tuple[str, ...]  # Of rows.FIELDS.
    embedding_format: str  # Of row_files.FORMATS.
    images: str  # "sheets", "all" or "none".
    z_seed: int  # Of the noise in z.


class _Item(NamedTuple):
    """A record that the model is to see."""

    place: int  # In its shard, of the records that can be had.
    id: str
    label: int
    sha: str
    image: bytes


class EmbeddedShard:
    """One shard on its way through the model."""

    def __init__(
        self,
        task: str,
        records: Records,
        making: Making,
        known: tuple[rows.Rows | None, bytes | None],
        known_kinds: Mapping[str, int],
        tasks: Tasks,
    ):
        self._known_kinds, self._kinds = known_kinds, collections.Counter()
        self._task, self._records, self._making, self._tasks = task, records, making, tasks
        self._known_rows, self._known_sheet = known
        shas = self._known_rows.shas if self._known_rows else ()
        self._known = {sha: place for place, sha in enumerate(shas)}
        self._ids: list[str] = []
        self._labels: list[int] = []
        self._shas: list[str] = []
        self._from_known: list[tuple[int, int]] = []  # (place, place among the known)
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
          load_model: gives the model; called only if there is anything to compute.
          outputs: which of its outputs are needed.
          model_manifest: its manifest.

        Returns:
          The shard's marker, but for what it was made of.
        """
        directory, name = self._tasks.files_directory, row_files.stem(self._task)
        files.make_dirs(directory)
        if self._making.images == "all":
            with manifest_lib.writing(directory, f"{name}.tar") as file:
                archive = webdataset.Archive(file)
                made, num_computed, _ = self._compute(load_model, outputs, model_manifest, archive)
                archive.close()
            entries = [{**file.entry(), "num_examples": len(made.ids)}]
        else:
            made, num_computed, pairs = self._compute(load_model, outputs, model_manifest, None)
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
            made,
            embedding_format=self._making.embedding_format,
            model_id=model_manifest["model_id"],
        )
        if num_reused := len(made.ids) - num_computed:
            # Of several kinds in one shard nobody knows which row is of which.
            self._kinds[" or ".join(sorted(self._known_kinds))] += num_reused
        num_lost = self._records.num_read - len(made.ids)
        entries += quarantine.write(
            directory, self._task, self._records.quarantined, num_quarantined=num_lost
        )
        sums = rows.sums(made)
        self._secs["write"] += time.perf_counter() - started
        return {
            "entries": entries,
            "secs": self._secs,
            "computed": num_computed,
            "read": self._records.num_read,
            "written": len(made.ids),
            "quarantined": num_lost,
            "files": [entry["name"] for entry in entries],
            "sums": sums,
            "kinds": dict(self._kinds),
        }

    def _items(self) -> Iterator[_Item]:
        """The records that the model is to see; notes all of them."""
        records = ((s, record, hashlib.sha256(s).hexdigest()) for s, record in self._records)
        head = list(itertools.islice(records, _SHEET_PAIRS))
        num_pictured = {"all": None, "sheets": _SHEET_PAIRS, "none": 0}[self._making.images]
        if num_pictured and self._known_sheet:
            if [sha for *_, sha in head] == self._known_rows.shas[:_SHEET_PAIRS]:
                num_pictured, self._sheet = 0, self._known_sheet
        for place, (_, record, sha) in enumerate(itertools.chain(head, records)):
            record_id = record.id.decode()
            self._ids.append(record_id)
            self._labels.append(record.label)
            self._shas.append(sha)
            there = self._known.get(sha)
            if there is not None:
                self._from_known.append((place, there))
            if there is None or num_pictured is None or place < num_pictured:
                yield _Item(place, record_id, record.label, sha, record.image)

    def _compute(
        self,
        load_model: Callable[[], PublishedModel],
        outputs: Sequence[str],
        model_manifest: Mapping[str, Any],
        archive: webdataset.Archive | None,
    ) -> tuple[rows.Rows, int, list[tuple[np.ndarray, np.ndarray]]]:
        """The rows; how many records the model has seen; (original, reconstruction) of a sheet."""
        making, found, pairs, num_computed = self._making, [], [], 0
        for items, images, given in self._given(load_model, outputs):
            started = time.perf_counter()
            shas = [item.sha for item in items]
            made = rows.columns(given, shas, making.fields, seed=making.z_seed)
            found.append(([item.place for item in items], made))
            num_computed += len(items)
            if "reconstruction" in given and (archive or items[0].place < _SHEET_PAIRS):
                pictures = tf_example.to_pixels(given["reconstruction"])
                for i, (item, original, picture) in enumerate(
                    zip(items, images, pictures, strict=True)
                ):
                    if archive:
                        archive.add(original, picture, _about(item, i, made))
                    elif item.place < _SHEET_PAIRS and not self._sheet:
                        pairs.append((original, picture))
            self._tasks.note(self._task, len(self._ids))
            self._secs["write"] += time.perf_counter() - started
        return self._rows(found, model_manifest["config"]["latent_dim"]), num_computed, pairs

    def _given(
        self, load_model: Callable[[], PublishedModel], outputs: Sequence[str]
    ) -> Iterator[tuple[list[_Item], np.ndarray, dict[str, np.ndarray]]]:
        """(items, images, the model's outputs) batch by batch, in order."""
        items = self._items()
        first = self._timed("read", next, items, None)
        if first is None:
            return
        items = itertools.chain([first], items)
        model: PublishedModel = self._timed("load_model", load_model)

        def batch() -> tuple[list[_Item], np.ndarray]:
            some = list(itertools.islice(items, model.batch_size))
            pixels = np.frombuffer(b"".join(item.image for item in some), np.uint8)
            return some, pixels.reshape(-1, *model.image_shape)

        running: collections.deque = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
            while True:
                some, images = self._timed("read", batch)
                if some:
                    self._kinds[model.kind] += len(some)
                    running.append((some, images, pool.submit(model.embed, images, outputs)))
                # One more than are computed stands ready.
                if len(running) > _CALLS_AT_ONCE or (running and not some):
                    some_done, images, future = running.popleft()
                    yield some_done, images, self._timed("compute", future.result)
                elif not some:
                    break

    def _timed(self, kind: str, work, *args) -> Any:
        started = time.perf_counter()
        try:
            return work(*args)
        finally:
            self._secs[kind] += time.perf_counter() - started

    def _rows(
        self, found: list[tuple[list[int], dict[str, np.ndarray]]], latent_dim: int
    ) -> rows.Rows:
        """All rows: those computed, and those that were known."""
        columns = {}
        for field in self._making.fields:
            wide = (latent_dim,) if field in rows.VECTORS else ()
            columns[field] = np.empty((len(self._ids), *wide), np.float32)
            if self._from_known:
                places, there = zip(*self._from_known, strict=True)
                columns[field][list(places)] = self._known_rows.columns[field][list(there)]
            for places, made in found:
                columns[field][places] = made[field]
        labels = np.array(self._labels, np.int64)
        return rows.Rows(self._ids, labels, self._shas, columns)


def _about(item: _Item, place: int, made: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What an archive says of a record, as JSON values."""
    values = {field: column[place].tolist() for field, column in made.items()}
    return {"id": item.id, "label": item.label, **values, "record_sha": item.sha}
