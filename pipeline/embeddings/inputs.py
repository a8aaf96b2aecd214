"""What export reads: the shards of a data set, or a source as preprocess would convert it.

Both give the same records, byte for byte, in shards of the same names. So a row does not depend
on which of the two its image came from.
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
from pipeline.datasets.building import reading, shard_writer
from pipeline.datasets.building.source_records import SourceRecords
from pipeline.formats import tf_example
from pipeline.formats.tfrecord import Fault
from pipeline.sources import conversion
from pipeline.sources.splits import UNSPLIT
from pipeline.stages import manifest as manifest_lib

# Identifies a record: the name of its shard, and its id.
Key = tuple[str, str]


class ShardRecords(Protocol):
    """The records of one shard."""

    num_read: int  # Number of records in the input, readable or not.
    # Valid after the last record: a JSON object for each fault, and the value of `digest`.
    quarantined: list[dict[str, Any]]
    content_digest: str

    def digest(self, *, trust_manifest: bool) -> str:
        """A hash of the shard's contents.

        Args:
          trust_manifest: whether to take the hash from the data set's manifest, without reading
            the shard.
        """

    def __iter__(self) -> Iterator[tuple[bytes, tf_example.Record]]:
        """(serialized, record) of each readable record, in order."""


class _TFRecordShard:
    """Records of a TFRecord file."""

    def __init__(self, dataset: reader.Dataset, entry: Mapping[str, Any]):
        self._dataset, self._entry = dataset, entry
        self.num_read: int = entry["num_examples"]
        self.quarantined: list[dict[str, Any]] = []
        self.content_digest: str = entry["sha256"]

    def digest(self, *, trust_manifest: bool) -> str:
        return self._entry["sha256"] if trust_manifest else self._dataset.digest(self._entry)

    def __iter__(self) -> Iterator[tuple[bytes, tf_example.Record]]:
        faults: list[Fault] = []
        yield from self._dataset.records(self._entry, faults)
        loss = reader.DamagedShard(self._entry["name"], 0, faults)
        self.quarantined = loss.lines(self._dataset.directory)
        if faults:
            self.content_digest = self.digest(trust_manifest=False)


class _SourceShard:
    """Records of a source that preprocess would write to one shard."""

    def __init__(self, records: SourceRecords):
        self._records = records
        self.num_read = records.num_read
        self.quarantined: list[dict[str, Any]] = []
        self.content_digest = ""

    def digest(self, *, trust_manifest: bool) -> str:
        del trust_manifest  # A source has no manifest.
        for _ in self:
            pass
        return self.content_digest

    def __iter__(self) -> Iterator[tuple[bytes, tf_example.Record]]:
        digest = hashlib.sha256()
        for block in self._records.batches():
            records = zip(block.ids, block.images, block.labels.tolist(), strict=True)
            for serialized, record in zip(block.encoded, records, strict=True):
                digest.update(hashlib.sha256(serialized).digest())
                yield serialized, tf_example.Record(*record)
        self.quarantined = self._records.faults
        digest.update(manifest_lib.canonical_json(self.quarantined))
        self.content_digest = digest.hexdigest()


class Input(Protocol):
    """An image set to export; it is pickled and sent to the workers."""

    image_shape: tuple[int, int, int]
    class_names: Sequence[str]
    directory: str  # The directory with the images; "" if the source is not a directory.
    sizes: dict[str, int]  # Names of the shards, in order -> approximate number of records.
    settings: dict[str, Any]  # Fixed for an output directory until it is overwritten.
    identity: dict[str, Any]  # May change from one run to the next.
    notes: Sequence[str]  # What is read, a line each.

    def elements(self, pipeline: beam.Pipeline) -> beam.PCollection:
        """(task, argument of `records`) for every shard."""

    def records(self, task: str, element_data: Any) -> ShardRecords:
        """The records of a shard; called in a worker."""

    def check_unchanged(self) -> None:
        """Raises SourceChanged if the input may have changed since it was opened."""

    def images(self, ids_by_shard: Mapping[str, set[str]]) -> Iterator[tuple[Key, np.ndarray]]:
        """(key, uint8 (H, W, C)) of the requested records that are still readable."""


class ShardsInput:
    """The shards of some splits of a finished data set."""

    def __init__(self, data_dir: str, splits: Sequence[str], on_corrupt: str):
        """Opens the data set.

        Raises:
          StageError: no such data set or split.
        """
        self.directory, self.notes = data_dir, ()
        self._dataset = dataset = reader.Dataset(data_dir, on_corrupt=on_corrupt)
        entries = {split: dataset.shards(split) for split in splits}
        # In the order of the data set, whatever the order of `splits`.
        ordered_splits = [split for split in dataset.splits if split in entries]
        self._entries = {e["name"]: e for split in ordered_splits for e in entries[split]}
        self.image_shape, self.class_names = dataset.image_shape, dataset.manifest["class_names"]
        self.sizes = {name: entry["num_examples"] for name, entry in self._entries.items()}
        self.settings = {
            "from": "shards",
            "name": dataset.manifest["name"],
            "split": ordered_splits,
        }
        self.identity = {"dataset_id": dataset.dataset_id}

    def elements(self, pipeline: beam.Pipeline) -> beam.PCollection:
        """As `Input.elements`."""
        return pipeline | "Shards" >> beam.Create(list(self._entries.items()), reshuffle=True)

    def records(self, task: str, element_data: Mapping[str, Any]) -> ShardRecords:
        """As `Input.records`; `element_data` is the shard's entry in the manifest."""
        del task
        return _TFRecordShard(self._dataset, element_data)

    def check_unchanged(self) -> None:
        """Does nothing, because each shard is checked against its sha256."""

    def images(self, ids_by_shard: Mapping[str, set[str]]) -> Iterator[tuple[Key, np.ndarray]]:
        """As `Input.images`."""
        for task, ids in ids_by_shard.items():
            # A shard may be damaged or gone by now; then its unreadable images are not shown.
            with contextlib.suppress(FileNotFoundError, StageError):
                for record in self._find_records(self._entries[task], set(ids)):
                    image = np.frombuffer(record.image, np.uint8).reshape(self.image_shape)
                    yield (task, record.id.decode()), image

    def _find_records(
        self, entry: Mapping[str, Any], missing_ids: set[str]
    ) -> Iterator[tf_example.Record]:
        """Yields a shard's records with these ids, and removes each id from `missing_ids`."""
        # The report samples the first rows of a shard, so most often its head is enough.
        num_records = 2 * len(missing_ids) + 64
        head = reader.read_head(self._dataset.directory, entry, num_records, self.image_shape)
        dataset = reader.Dataset(self._dataset.directory, on_corrupt="quarantine")
        all_records = (record for _, record in dataset.records(entry, []))
        for records in (head, all_records):
            for record in records:
                if not missing_ids:
                    return
                if record.id.decode() in missing_ids:
                    missing_ids.discard(record.id.decode())
                    yield record


class SourceInput:
    """A source, divided into the shards that preprocess would write."""

    def __init__(
        self,
        source_spec: conversion.SourceSpec,
        settings: create_set.Settings,
        splits: Sequence[str] | None,
    ):
        """Opens the source.

        Args:
          source_spec: the source.
          settings: as for preprocess.
          splits: those to export; None for test, or for all records of a source without splits.

        Raises:
          StageError: the source cannot be read, or has no such split.
          UsageError: the source does not allow a conversion or a setting.
        """
        source = conversion.open_converted(source_spec)
        kind, _, path = source_spec.source.partition(":")
        self.directory = path if kind == "folder" else ""
        settings = create_set.resolve(settings, source)
        create_set.check(settings, source)
        sizes = placement.expected_sizes(source.split_sizes, settings.validation_fraction)
        counts = create_set.num_shards(settings, sizes, source.image_shape)
        if splits is None:
            splits = list(counts) if UNSPLIT in source.split_sizes else ["test"]
        for split in splits:
            if split not in counts:
                raise UsageError(
                    f"--split={split}: {source_spec.source} has {', '.join(counts)}; name one of "
                    "them"
                )
        num_shards = {split: count for split, count in counts.items() if split in splits}
        zeros = dict.fromkeys(num_shards, 0)
        self._layout = shard_writer.Layout(
            **settings.shared(), num_shards=num_shards, first_shard=zeros, num_in_names=num_shards
        )
        self.notes = [
            *reading.lines(source, settings.validation_fraction),
            f"embeds {', '.join(num_shards)}",
        ]
        self._reading = source.for_workers()
        self._num_records = source.num_records
        self.image_shape, self.class_names = source.image_shape, source.class_names
        self.sizes = {
            self._layout.shard_name(split, number): round(sizes[split] / num_shards[split])
            for split, number in self._layout.keys()
        }
        source_settings = create_set.source_identity(source_spec, source)
        fingerprint = source_settings.pop("fingerprint")
        self.identity = {"fingerprint": fingerprint, "num_shards": num_shards}
        self.settings = {
            "from": "source",
            **settings.shared(),
            "split": list(num_shards),
            **source_settings,
        }

    def elements(self, pipeline: beam.Pipeline) -> beam.PCollection:
        """As `Input.elements`."""
        layout = self._layout
        assigned = (
            pipeline
            | "Blocks" >> beam.Create(shard_writer.index_blocks(self._num_records), reshuffle=True)
            | "AssignShards" >> beam.ParDo(shard_writer.AssignShards(self._reading, layout))
        )
        shards = pipeline | "EveryShard" >> beam.Create([(key, b"") for key in layout.keys()])
        return (
            (assigned, shards)
            | "AllParts" >> beam.Flatten()
            | "GroupByShard" >> beam.GroupByKey()  # ((split, shard), [indices])
            | "NameShard" >> beam.MapTuple(lambda key, parts: (layout.shard_name(*key), parts))
        )

    def records(self, task: str, element_data: Sequence[bytes]) -> ShardRecords:
        """As `Input.records`; `element_data` holds indices into the source, as int64 bytes."""
        indices = np.frombuffer(b"".join(element_data), "<i8")
        return _SourceShard(SourceRecords(self._reading, self._layout.seed, task, indices))

    def check_unchanged(self) -> None:
        """As `OpenedSource.check_unchanged`."""
        conversion.open_converted(self._reading).check_unchanged()

    def images(self, ids_by_shard: Mapping[str, set[str]]) -> Iterator[tuple[Key, np.ndarray]]:
        """As `Input.images`."""
        source = conversion.open_converted(self._reading)
        assign = shard_writer.AssignShards(self._reading, self._layout)
        keys_by_index: list[tuple[int, Key]] = []
        for block in shard_writer.index_blocks(self._num_records):
            for key, data in assign.process(block):
                task = self._layout.shard_name(*key)
                if task not in ids_by_shard:
                    continue
                indices = np.frombuffer(data, "<i8")
                for index, record_id in zip(indices.tolist(), source.ids(indices), strict=True):
                    if record_id.decode() in ids_by_shard[task]:
                        keys_by_index.append((index, (task, record_id.decode())))
        keys_by_index.sort()
        step = self._reading.records_at_a_time
        for first in range(0, len(keys_by_index), step):
            batch = keys_by_index[first : first + step]
            records = source.read(np.array([index for index, _ in batch], np.int64))
            for i, image in zip(records.places.tolist(), records.images, strict=True):
                yield batch[i][1], image
