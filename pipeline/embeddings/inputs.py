"""What export reads: the shards of a data set, or a source taken through preprocess' own code.

Both give the same records, byte for byte, in shards of the same names; so a row is the same
whichever way its image came.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import apache_beam as beam
import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import placement, reader
from pipeline.datasets.building import create as create_set
from pipeline.datasets.building import shard_writer
from pipeline.datasets.building.source_records import SourceRecords
from pipeline.formats import tf_example
from pipeline.formats.tfrecord import Fault
from pipeline.sources import conversion
from pipeline.stages import manifest as manifest_lib

# What names a record: its shard, and its id.
Key = tuple[str, str]


class Records(Protocol):
    """The records of one shard on their way to the model."""

    num_read: int  # How many the input says there are.
    # After the last record: a JSON object for each fault, and what `digest` would say.
    quarantined: list[dict[str, Any]]
    found: str

    def digest(self, *, as_promised: bool) -> str:
        """Names what the shard holds.

        Args:
          as_promised: what the data set's manifest says may be believed, and nothing is read.
        """

    def __iter__(self) -> Iterator[tuple[bytes, tf_example.Record]]:
        """(serialized, record) of each that can be had, in order."""


class _OfShard:
    """Records of a TFRecord file."""

    def __init__(self, dataset: reader.Dataset, entry: Mapping[str, Any]):
        self._dataset, self._entry = dataset, entry
        self.num_read: int = entry["num_examples"]
        self.quarantined: list[dict[str, Any]] = []
        self.found: str = entry["sha256"]

    def digest(self, *, as_promised: bool) -> str:
        return self._entry["sha256"] if as_promised else self._dataset.digest(self._entry)

    def __iter__(self) -> Iterator[tuple[bytes, tf_example.Record]]:
        faults: list[Fault] = []
        yield from self._dataset.records(self._entry, faults)
        loss = reader.DamagedShard(self._entry["name"], 0, faults)
        self.quarantined = loss.lines(self._dataset.directory)
        if faults:
            self.found = self.digest(as_promised=False)


class _OfSource:
    """Records of a source."""

    def __init__(self, records: SourceRecords):
        self._records = records
        self.num_read = records.num_read
        self.quarantined: list[dict[str, Any]] = []
        self.found = ""

    def digest(self, *, as_promised: bool) -> str:
        del as_promised  # Nobody has promised anything.
        for _ in self:
            pass
        return self.found

    def __iter__(self) -> Iterator[tuple[bytes, tf_example.Record]]:
        digest = hashlib.sha256()
        for block in self._records.batches():
            found = zip(block.ids, block.images, block.labels.tolist(), strict=True)
            for serialized, record in zip(block.encoded, found, strict=True):
                digest.update(hashlib.sha256(serialized).digest())
                yield serialized, tf_example.Record(*record)
        self.quarantined = self._records.faults
        digest.update(manifest_lib.canonical_json(self.quarantined))
        self.found = digest.hexdigest()


class Input(Protocol):
    """An image set to export; workers get a copy of it."""

    image_shape: tuple[int, int, int]
    class_names: Sequence[str]
    place: str  # The directory whose files are the records, if it is such; else "".
    sizes: dict[str, int]  # Names of the shards, in order -> about how many records each has.
    settings: dict[str, Any]  # What a directory is made with, and stays as it is.
    identity: dict[str, Any]  # What may grow from one run to the next.

    def elements(self, pipeline: beam.Pipeline) -> beam.PCollection:
        """(task, what `records` needs of it) of every shard."""

    def records(self, task: str, needed: Any) -> Records:
        """The records of a shard, in a worker."""

    def check_unchanged(self) -> None:
        """Raises SourceChanged if what is read can no longer be what it was."""

    def images(self, wanted: Mapping[str, set[str]]) -> Iterator[tuple[Key, np.ndarray]]:
        """Some records' images: task -> ids to (key, uint8 (H, W, C)) of those that are there."""


class ShardsInput:
    """The shards of some splits of a finished data set."""

    def __init__(self, data_dir: str, splits: Sequence[str], on_corrupt: str):
        """Opens the data set.

        Raises:
          StageError: no such data set or split.
        """
        self.place = data_dir
        self._dataset = dataset = reader.Dataset(data_dir, on_corrupt=on_corrupt)
        # In the set's order, whichever way they were asked for.
        entries = {split: dataset.shards(split) for split in splits}
        asked = [split for split in dataset.splits if split in entries]
        self._entries = {e["name"]: e for split in asked for e in entries[split]}
        self.image_shape, self.class_names = dataset.image_shape, dataset.manifest["class_names"]
        self.sizes = {name: entry["num_examples"] for name, entry in self._entries.items()}
        self.settings = {"from": "shards", "name": dataset.manifest["name"], "split": asked}
        self.identity = {"dataset_id": dataset.dataset_id}

    def elements(self, pipeline: beam.Pipeline) -> beam.PCollection:
        """As `Input.elements`."""
        return pipeline | "Shards" >> beam.Create(list(self._entries.items()), reshuffle=True)

    def records(self, task: str, needed: Mapping[str, Any]) -> Records:
        """As `Input.records`."""
        del task
        return _OfShard(self._dataset, needed)

    def check_unchanged(self) -> None:
        """Does nothing: each shard is checked against its sha256."""

    def images(self, wanted: Mapping[str, set[str]]) -> Iterator[tuple[Key, np.ndarray]]:
        """As `Input.images`."""
        for task, ids in wanted.items():
            # A shard that is damaged or gone by now: what cannot be had is not shown.
            with contextlib.suppress(FileNotFoundError, StageError):
                for record in self._look_for(self._entries[task], set(ids)):
                    image = np.frombuffer(record.image, np.uint8).reshape(self.image_shape)
                    yield (task, record.id.decode()), image

    def _look_for(self, entry: Mapping[str, Any], left: set[str]) -> Iterator[tf_example.Record]:
        """Those of a shard's records whose ids are in `left`, which it empties."""
        # Samples stand at the beginning of a shard, so most often there is no need of the rest.
        head = reader.read_head(
            self._dataset.directory, entry, 2 * len(left) + 64, self.image_shape
        )
        tolerant = reader.Dataset(self._dataset.directory, on_corrupt="quarantine")
        rest = (record for _, record in tolerant.records(entry, []))
        for records in (head, rest):
            for record in records:
                if not left:
                    return
                if record.id.decode() in left:
                    left.discard(record.id.decode())
                    yield record


class SourceInput:
    """A source, in the shards that preprocess would write of it."""

    def __init__(
        self,
        source_spec: conversion.SourceSpec,
        settings: create_set.Settings,
        splits: Sequence[str],
    ):
        """Opens the source.

        Raises:
          StageError: the source cannot be read, or has no such split.
          UsageError: a conversion or a setting that it cannot have.
        """
        source = conversion.open_converted(source_spec)
        kind, _, rest = source_spec.source.partition(":")
        self.place = rest if kind == "folder" else ""
        create_set.check(settings, source)
        sizes = placement.expected_sizes(source.split_sizes, settings.validation_fraction)
        counts = create_set.num_shards(settings, sizes, source.image_shape)
        for split in splits:
            if split not in counts:
                raise UsageError(
                    f"--split={split}: {source_spec.source} has {', '.join(counts)}; name one of "
                    "them"
                )
        asked = {split: count for split, count in counts.items() if split in splits}
        zeros = dict.fromkeys(asked, 0)
        self._layout = shard_writer.Layout(
            **settings.shared(), num_shards=asked, first_shard=zeros, num_in_names=asked
        )
        self._reading = source.for_workers()
        self._num_records = source.num_records
        self.image_shape, self.class_names = source.image_shape, source.class_names
        self.sizes = {
            self._layout.shard_name(*key): round(sizes[key[0]] / asked[key[0]])
            for key in self._layout.keys()
        }
        of_source = create_set.source_identity(source_spec, source)
        self.identity = {"fingerprint": of_source.pop("fingerprint"), "num_shards": asked}
        self.settings = {
            "from": "source",
            **settings.shared(),
            "split": list(asked),
            **of_source,
        }

    def elements(self, pipeline: beam.Pipeline) -> beam.PCollection:
        """As `Input.elements`."""
        layout = self._layout
        assigned = (
            pipeline
            | "Blocks" >> beam.Create(shard_writer.index_blocks(self._num_records), reshuffle=True)
            | "AssignShards" >> beam.ParDo(shard_writer.AssignShards(self._reading, layout))
        )
        every = pipeline | "EveryShard" >> beam.Create([(key, b"") for key in layout.keys()])
        return (
            (assigned, every)
            | "AllParts" >> beam.Flatten()
            | "GroupByShard" >> beam.GroupByKey()  # ((split, shard), [indices])
            | "NameShard" >> beam.MapTuple(lambda key, parts: (layout.shard_name(*key), parts))
        )

    def records(self, task: str, needed: Sequence[bytes]) -> Records:
        """As `Input.records`."""
        indices = np.frombuffer(b"".join(needed), "<i8")
        return _OfSource(SourceRecords(self._reading, self._layout.seed, task, indices))

    def check_unchanged(self) -> None:
        """As `OpenedSource.check_unchanged`."""
        conversion.open_converted(self._reading).check_unchanged()

    def images(self, wanted: Mapping[str, set[str]]) -> Iterator[tuple[Key, np.ndarray]]:
        """As `Input.images`."""
        source = conversion.open_converted(self._reading)
        assign = shard_writer.AssignShards(self._reading, self._layout)
        places: list[tuple[int, Key]] = []
        for block in shard_writer.index_blocks(self._num_records):
            for key, data in assign.process(block):
                task = self._layout.shard_name(*key)
                indices = np.frombuffer(data, "<i8") if task in wanted else np.empty(0, "<i8")
                for index, record_id in zip(indices.tolist(), source.ids(indices), strict=True):
                    if record_id.decode() in wanted[task]:
                        places.append((index, (task, record_id.decode())))
        places.sort()
        step = self._reading.records_at_a_time
        for first in range(0, len(places), step):
            some = places[first : first + step]
            read = source.read(np.array([index for index, _ in some], np.int64))
            for place, image in zip(read.places.tolist(), read.images, strict=True):
                yield some[place][1], image
