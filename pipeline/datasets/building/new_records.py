"""The Beam pipeline that finds the records of a source that a finished data set does not hold.

The pipeline shuffles hashes: 32 bytes for a record of the data set, 24 for a record of the source.
The ids of both meet in buckets. An image of the source is read only if its id is already in the
data set, to check that both are the same record.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli.errors import StageError
from pipeline.cli.progress import Progress
from pipeline.datasets import placement, reader
from pipeline.datasets.profile import describe
from pipeline.formats import tf_example
from pipeline.runners import run as runner
from pipeline.sources import conversion
from pipeline.stages import quarantine
from pipeline.stages.contracts import is_shard
from pipeline.stages.manifest import read_sealed, sealed_json
from pipeline.stages.tasks import Tasks
from pipeline.storage import files

_HASH_BYTES = 16
# Element of the shuffle: (name of a shard, hashes of ids, hashes of records), or
# ("", hashes of ids, int64 indices as little-endian bytes). Hashes are joined.
_Part = tuple[str, bytes, bytes]


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_HASH_BYTES]


def _by_bucket(
    name: str, ids: list[bytes], values: np.ndarray, num_buckets: int
) -> Iterator[tuple[int, _Part]]:
    """Groups ids and their values (n, bytes) into buckets by the hashes of the ids."""
    hashes = np.frombuffer(b"".join(map(_hash, ids)), np.uint8).reshape(-1, _HASH_BYTES)
    numbers = np.ascontiguousarray(hashes[:, :4]).view("<u4")[:, 0] % num_buckets
    for bucket in np.unique(numbers).tolist():
        mask = numbers == bucket
        yield bucket, (name, hashes[mask].tobytes(), values[mask].tobytes())


class HashShard(beam.DoFn):
    """Manifest entry of a shard -> the hashes of its ids and of its records."""

    def __init__(self, tasks: Tasks, num_buckets: int):
        """`tasks` of the data set's directory; `num_buckets` as in describe.num_buckets."""
        self._tasks, self._num_buckets = tasks, num_buckets

    def process(self, entry: dict[str, Any]) -> Iterator[tuple[int, _Part]]:
        """Manifest entry -> (bucket, part)."""
        try:
            shard = reader.Dataset(self._tasks.directory).read_shard(entry)
        except StageError as error:
            _mark(self._tasks, entry["name"], {"failed": str(error)})
            return
        ids = [record_id.encode() for record_id in shard.ids]
        hashes = np.frombuffer(b"".join(map(_hash, shard.records)), np.uint8)
        yield from _by_bucket(
            entry["name"], ids, hashes.reshape(-1, _HASH_BYTES), self._num_buckets
        )


class HashIds(beam.DoFn):
    """Block of indices -> the hashes of their ids."""

    def __init__(self, source_spec: conversion.SourceSpec, num_buckets: int):
        """`num_buckets` as in describe.num_buckets."""
        self._source_spec, self._num_buckets = source_spec, num_buckets

    def process(self, block: tuple[int, int]) -> Iterator[tuple[int, _Part]]:
        """(first, last + 1) -> (bucket, part)."""
        indices = np.arange(*block, dtype="<i8")
        ids = conversion.open_converted(self._source_spec).ids(indices)
        yield from _by_bucket("", ids, indices.view(np.uint8).reshape(-1, 8), self._num_buckets)


class KeepNew(beam.DoFn):
    """All ids of a bucket -> a file with the indices of new records, and a marker."""

    def __init__(
        self,
        source_spec: conversion.SourceSpec,
        validation_fraction: float,
        quarantined: frozenset[bytes],
        tasks: Tasks,
    ):
        """`quarantined` are the ids in the data set's quarantine."""
        self._source_spec, self._tasks = source_spec, tasks
        self._validation_fraction, self._quarantined = validation_fraction, quarantined

    def process(self, element: tuple[int, Iterable[_Part]]) -> None:
        """Takes (bucket, parts); yields nothing."""
        bucket, parts = element
        set_records: dict[bytes, tuple[bytes, str]] = {}  # hash of id -> hash of record, shard
        source_ids: list[tuple[bytes, int]] = []  # hash of id, index
        for name, joined, values in parts:
            hashes = [joined[i : i + _HASH_BYTES] for i in range(0, len(joined), _HASH_BYTES)]
            if name:
                for number, id_hash in enumerate(hashes):
                    start = number * _HASH_BYTES
                    set_records[id_hash] = values[start : start + _HASH_BYTES], name
            else:
                source_ids += zip(hashes, np.frombuffer(values, "<i8").tolist(), strict=True)
        new = np.array(sorted(i for id_hash, i in source_ids if id_hash not in set_records), "<i8")
        existing = sorted((i, set_records[h]) for h, i in source_ids if h in set_records)
        source = conversion.open_converted(self._source_spec)
        still_bad = self._still_bad(source, new)
        new = np.setdiff1d(new, still_bad)
        num_existing = len(existing) + len(still_bad)
        marker = {"num_there": num_existing, "splits": self._split_counts(source, new)}
        conflict = self._first_conflict(source, existing)
        if conflict:
            marker["failed"] = conflict
        buffer = io.BytesIO()
        np.save(buffer, new)
        files.write_bytes(self._tasks.path(_new_file(bucket)), buffer.getvalue())
        _mark(self._tasks, str(bucket), marker)

    def _still_bad(self, source: conversion.ConvertedSource, new: np.ndarray) -> np.ndarray:
        """The new indices whose records are in the set's quarantine and are still unreadable."""
        ids = source.ids(new) if self._quarantined else []
        quarantined = new[[i for i, record_id in enumerate(ids) if record_id in self._quarantined]]
        step = self._source_spec.records_at_a_time
        bad = [np.empty(0, np.int64)]
        for first in range(0, len(quarantined), step):
            faults = source.read(quarantined[first : first + step]).faults
            bad.append(quarantined[[first + place for place, _ in faults]])
        return np.concatenate(bad)

    def _split_counts(self, source: conversion.ConvertedSource, new: np.ndarray) -> dict[str, int]:
        counts: dict[str, int] = {}
        for split, indices in source.by_source_split(new):
            ids = source.ids(indices)
            splits = placement.splits_of(split, ids, self._validation_fraction)
            for name, count in zip(*np.unique(splits, return_counts=True), strict=True):
                counts[str(name)] = counts.get(str(name), 0) + int(count)
        return counts

    def _first_conflict(
        self, source: conversion.ConvertedSource, existing: list[tuple[int, tuple[bytes, str]]]
    ) -> str:
        """The error for an existing id whose record differs in the source; "" if none does."""
        step = self._source_spec.records_at_a_time
        for first in range(0, len(existing), step):
            batch = existing[first : first + step]
            indices = np.array([index for index, _ in batch], np.int64)
            ids = source.ids(indices)
            records = source.read(indices)
            places = records.places.tolist()
            for place, image, label in zip(places, records.images, records.labels, strict=True):
                index, (record_hash, shard) = batch[place]
                encoded = tf_example.encode(ids[place], image.tobytes(), int(label))
                if _hash(encoded) != record_hash:
                    return _conflict(source, index, ids[place], shard)
            if records.faults:
                place, reason = records.faults[0]
                index, (_, shard) = batch[place]
                return f"{_conflict(source, index, ids[place], shard)} ({reason})"
        return ""


def _conflict(source: conversion.ConvertedSource, index: int, record_id: bytes, shard: str) -> str:
    return (
        f"the id {record_id.decode()!r} is already in {shard}, with another image or label than "
        f"in {source.where(index)}; expected new records to have new ids: add a prefix with "
        "--id_prefix, or create a new data set"
    )


def _new_file(bucket: int) -> str:
    return f"new-{bucket:05d}.npy"


def _mark(tasks: Tasks, name: str, marker: dict[str, Any]) -> None:
    files.write_bytes(tasks.path(f"new-{name}.seen"), sealed_json(marker))


def load_indices(tasks: Tasks, name: str) -> np.ndarray:
    """The int64 indices in a file named by `find`."""
    return np.load(io.BytesIO(files.read_bytes(tasks.path(name))))


def find(
    *,
    source_spec: conversion.SourceSpec,
    num_records: int,
    base: dict[str, Any],
    tasks: Tasks,
    options: PipelineOptions,
) -> tuple[list[str], dict[str, int], int]:
    """Finds the records of a source whose ids a data set does not hold.

    Args:
      source_spec: the source.
      num_records: number of records in the source.
      base: the data set's manifest.
      tasks: of the data set's directory, which this process holds.
      options: Beam's.

    Returns:
      Names of the files of indices, for `load_indices`; split -> number of new records; and the
      number of records that the data set already holds.

    Raises:
      StageError: an id is in the data set with another record, or a shard is damaged.
    """
    entries = list(filter(is_shard, base["files"]))
    num_examples = sum(entry["num_examples"] for entry in entries)
    num_buckets = describe.num_buckets(num_records + num_examples)
    block_size = max(1, min(65_536, num_records))
    blocks = [
        (first, min(first + block_size, num_records)) for first in range(0, num_records, block_size)
    ]
    bucket_names = [str(bucket) for bucket in range(num_buckets)]
    names = [_new_file(bucket) for bucket in range(num_buckets)]
    files.make_dirs(tasks.path())
    for name in [
        *names,
        *(f"new-{m}.seen" for m in [*bucket_names, *(e["name"] for e in entries)]),
    ]:
        files.remove(tasks.path(name))
    quarantined = frozenset(
        fault["id"].encode() for fault in quarantine.read_all(tasks.directory, base["files"])
    )
    keep = KeepNew(source_spec, base["made_from"]["validation_fraction"], quarantined, tasks)

    def build(pipeline: beam.Pipeline) -> None:
        set_parts = (
            pipeline
            | "Shards" >> beam.Create(entries, reshuffle=True)  # manifest entries
            | "HashShard" >> beam.ParDo(HashShard(tasks, num_buckets))
        )
        source_parts = (
            pipeline
            | "Blocks" >> beam.Create(blocks, reshuffle=True)  # (first, last + 1)
            | "HashIds" >> beam.ParDo(HashIds(source_spec, num_buckets))
        )
        _ = (
            (set_parts, source_parts)
            | beam.Flatten()
            | "GroupById" >> beam.GroupByKey()  # (bucket, [part])
            | "KeepNew" >> beam.ParDo(keep)
        )

    def num_seen() -> int:
        return sum(n.endswith(".seen") for n in files.list_names(tasks.path()))

    progress = Progress("preprocess: finding new records", total=num_buckets, unit="parts")
    runner.run(build, options, progress=progress, count_done=num_seen)

    markers = {
        name: read_sealed(tasks.path(f"new-{name}.seen"))
        for name in [*bucket_names, *(entry["name"] for entry in entries)]
    }
    failed = [marker["failed"] for marker in markers.values() if marker and "failed" in marker]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise StageError(f"--append: {failed[0]}{more}")
    splits: dict[str, int] = {}
    for name in bucket_names:  # An empty bucket has no marker.
        for split, count in ((markers[name] or {}).get("splits", {})).items():
            splits[split] = splits.get(split, 0) + count
    num_existing = sum((markers[name] or {}).get("num_there", 0) for name in bucket_names)
    if sum(splits.values()) + num_existing != num_records:
        raise StageError(
            f"--append: {num_records} records read, but {sum(splits.values())} new + "
            f"{num_existing} already in the data set; expected the sum to match: run the same "
            "command again"
        )
    return [n for n in names if files.exists(tasks.path(n))], splits, num_existing
