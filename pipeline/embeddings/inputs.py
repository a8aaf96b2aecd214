"""What export reads: the shards of a data set, or a source as preprocess would convert it.

Both give the same records, byte for byte, in shards of the same names. So a row does not depend
on which of the two its image came from.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

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
from pipeline.stages import manifest as manifest_lib

# Identifies a record: the name of its shard, and its id.
Key = tuple[str, str]


class ShardContents(NamedTuple):
    """The n readable records of a shard, in order, and the account of the others."""

    ids: list[str]
    labels: np.ndarray  # (n,) int64
    shas: list[str]  # sha256 of each serialized tf.Example, hex
    images: np.ndarray  # (n, H, W, C) uint8
    num_read: int  # Records of the shard, readable or not.
    quarantined: list[dict[str, Any]]  # A JSON object for each fault.
    digest: str  # As `ShardRecords.digest`, of what was read.


class ShardRecords(Protocol):
    """The records of one shard, not read yet."""

    def digest(self, *, trust_manifest: bool) -> str:
        """A hash of the shard's contents.

        Args:
          trust_manifest: whether to take the hash from the data set's manifest, without reading
            the shard.
        """

    def read(self) -> ShardContents:
        """Reads the shard."""


class _TFRecordShard:
    """Records of a TFRecord file."""

    def __init__(self, dataset: reader.Dataset, entry: Mapping[str, Any]):
        self._dataset, self._entry = dataset, entry

    def digest(self, *, trust_manifest: bool) -> str:
        return self._entry["sha256"] if trust_manifest else self._dataset.digest(self._entry)

    def read(self) -> ShardContents:
        faults: list[Fault] = []
        ids, labels, shas = [], [], []
        num_read: int = self._entry["num_examples"]
        images = np.empty((num_read, *self._dataset.image_shape), np.uint8)
        for serialized, record in self._dataset.records(self._entry, faults):
            image = np.frombuffer(record.image, np.uint8)
            images[len(ids)] = image.reshape(self._dataset.image_shape)
            ids.append(record.id.decode())
            labels.append(record.label)
            shas.append(hashlib.sha256(serialized).hexdigest())
        return ShardContents(
            ids=ids,
            labels=np.array(labels, np.int64),
            shas=shas,
            images=images[: len(ids)],
            num_read=num_read,
            quarantined=reader.DamagedShard(self._entry["name"], 0, faults).lines(
                self._dataset.directory
            ),
            digest=self.digest(trust_manifest=not faults),
        )


class _SourceShard:
    """Records of a source that preprocess would write to one shard."""

    def __init__(self, records: SourceRecords, image_shape: tuple[int, int, int]):
        self._records, self._image_shape = records, image_shape

    def digest(self, *, trust_manifest: bool) -> str:
        del trust_manifest  # A source has no manifest.
        return self.read().digest

    def read(self) -> ShardContents:
        ids, images, labels, shas = [], [], [], []
        digest = hashlib.sha256()
        for batch in self._records.batches():
            ids += [record_id.decode() for record_id in batch.ids]
            images += batch.images
            labels.append(batch.labels)
            for serialized in batch.encoded:
                sha = hashlib.sha256(serialized)
                digest.update(sha.digest())
                shas.append(sha.hexdigest())
        digest.update(manifest_lib.canonical_json(self._records.faults))
        pixels = np.frombuffer(b"".join(images), np.uint8)
        return ShardContents(
            ids=ids,
            labels=np.concatenate([np.empty(0, np.int64), *labels]),
            shas=shas,
            images=pixels.reshape(-1, *self._image_shape),
            num_read=self._records.num_read,
            quarantined=self._records.faults,
            digest=digest.hexdigest(),
        )


class Input(Protocol):
    """An image set to export; it is pickled and sent to the workers."""

    image_shape: tuple[int, int, int]
    class_names: Sequence[str]
    directory: str  # The directory with the images; "" if the source is not a directory.
    sizes: dict[str, int]  # Names of the shards, in order -> approximate number of records.
    splits: dict[str, str]  # Name of a shard -> its split.
    # Name of a shard -> names of the shards that it has taken the place of, without some records.
    earlier_names: Mapping[str, Sequence[str]]
    settings: dict[str, Any]  # Fixed for an output directory until it is overwritten.
    identity: dict[str, Any]  # May change from one run to the next.
    notes: Sequence[str]  # What is read, a line each.

    def elements(self, pipeline: beam.Pipeline) -> beam.PCollection:
        """(task, argument of `records`) for every shard."""

    def records(self, task: str, element_data: Any) -> ShardRecords:
        """The records of a shard; called in a worker."""

    def digest_again(self, task: str) -> str | None:
        """A hash of a shard as its file is now; None if `identity` tells of every change."""

    def check_unchanged(self) -> None:
        """Raises SourceChanged if the input may have changed since it was opened."""

    def images(self, ids_by_shard: Mapping[str, set[str]]) -> Iterator[tuple[Key, np.ndarray]]:
        """(key, uint8 (H, W, C)) of the requested records that are still readable."""


class ShardsInput:
    """The shards of some splits of a finished data set."""

    def __init__(self, data_dir: str, splits: Sequence[str] | None, on_corrupt: str):
        """Opens the data set; its splits are all if `splits` is None.

        Raises:
          StageError: no such data set or split.
        """
        self.directory, self.notes = data_dir, ()
        self._dataset = dataset = reader.Dataset(data_dir, on_corrupt=on_corrupt)
        entries = {s: dataset.shards(s) for s in (dataset.splits if splits is None else splits)}
        # In the order of the data set, whatever the order of `splits`.
        ordered_splits = [split for split in dataset.splits if split in entries]
        self._entries = {e["name"]: e for split in ordered_splits for e in entries[split]}
        self.image_shape, self.class_names = dataset.image_shape, dataset.manifest["class_names"]
        self.sizes = {name: entry["num_examples"] for name, entry in self._entries.items()}
        self.splits = {name: entry["split"] for name, entry in self._entries.items()}
        self.earlier_names = {
            n: e["instead_of"] for n, e in self._entries.items() if "instead_of" in e
        }
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

    def digest_again(self, task: str) -> str | None:
        """As `Input.digest_again`; a damaged shard may be repaired under the same dataset_id."""
        return self.records(task, self._entries[task]).digest(trust_manifest=False)

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


def _unknown_classes(source: conversion.ConvertedSource) -> list[str]:
    """A line for the classes of a source that the model's class list lacks, if there are any."""
    model_names, names = source.source_spec.model_class_names or (), source.source_class_names
    numbers = {name: number for number, name in enumerate(source.class_names)}
    unknown = [f"{name} {numbers[name]}" for name in names if name not in model_names]
    if not model_names or not unknown:
        return []
    shown = reading.shown(unknown)
    if len(unknown) < len(names):
        return [f"classes that the model's class list lacks are numbered after it: {shown}"]
    return [
        f"the model's class list ({reading.shown(model_names)}) has none of the source's classes, "
        f"which are numbered after it: {shown}; --class_names=@DATA_DIR takes a data set's names"
    ]


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
          splits: those to export; None for all.

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
            splits = list(counts)
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
            *reading.lines(source, settings.name, settings.validation_fraction),
            *_unknown_classes(source),
            f"embeds {', '.join(num_shards)}",
        ]
        self._reading = source.for_workers()
        self._num_records = source.num_records
        self.image_shape, self.class_names = source.image_shape, source.class_names
        self.sizes = {
            self._layout.shard_name(split, number): round(sizes[split] / num_shards[split])
            for split, number in self._layout.keys()
        }
        self.splits = {self._layout.shard_name(*key): key[0] for key in self._layout.keys()}
        self.earlier_names = {}
        source_settings = create_set.source_identity(source_spec, source)
        fingerprint = source_settings.pop("fingerprint")
        self.identity = {"fingerprint": fingerprint, "num_shards": num_shards}
        if self.class_names != source.source_class_names:  # Else ids of earlier exports stay.
            self.identity["model_class_names"] = source_spec.model_class_names
        self.settings = {
            "from": "source",
            **settings.shared(),
            "split": list(num_shards),
            **source_settings,
        }

    def elements(self, pipeline: beam.Pipeline) -> beam.PCollection:
        """As `Input.elements`."""
        layout = self._layout
        assign = shard_writer.AssignShards(self._reading, layout)
        blocks = shard_writer.index_blocks(self._num_records)
        return (
            pipeline
            | "IndicesByShard" >> shard_writer.IndicesByShard(assign, blocks)
            | "NameShard" >> beam.MapTuple(lambda key, parts: (layout.shard_name(*key), parts))
        )

    def records(self, task: str, element_data: Sequence[bytes]) -> ShardRecords:
        """As `Input.records`; `element_data` holds indices into the source, as int64 bytes."""
        indices = np.frombuffer(b"".join(element_data), "<i8")
        records = SourceRecords(self._reading, self._layout.seed, task, indices)
        return _SourceShard(records, self.image_shape)

    def digest_again(self, task: str) -> str | None:
        """As `Input.digest_again`."""
        del task

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
