"""Which records of a source a finished data set doesn't hold yet, as a Beam pipeline.

What is shuffled are hashes, 32 bytes for a record that is there and 24 for one of the
source: the ids of both meet in buckets. Only for an id that is there already is the
source's image read, to see whether it is the same.
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
from pipeline.datasets.profile.describe import num_buckets
from pipeline.formats import tf_example
from pipeline.runners import run as runner
from pipeline.sources import conversion
from pipeline.stages import quarantine
from pipeline.stages.manifest import read_sealed, sealed_json
from pipeline.stages.tasks import Tasks
from pipeline.storage import files

_HASH_BYTES = 16
# Element of the shuffle: (name of a shard, hashes of ids, hashes of records), or
# ("", hashes of ids, int64 indices as little-endian bytes); hashes in a row.
_Part = tuple[str, bytes, bytes]


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_HASH_BYTES]


def _by_bucket(
    name: str, ids: list[bytes], values: np.ndarray, buckets: int
) -> Iterator[tuple[int, _Part]]:
    """Sorts ids, and a value (n, bytes) for each, into buckets by the ids' hashes."""
    hashes = np.frombuffer(b"".join(map(_hash, ids)), np.uint8).reshape(-1, _HASH_BYTES)
    numbers = np.ascontiguousarray(hashes[:, :4]).view("<u4")[:, 0] % buckets
    for bucket in np.unique(numbers).tolist():
        here = numbers == bucket
        yield bucket, (name, hashes[here].tobytes(), values[here].tobytes())


class ReadKnown(beam.DoFn):
    """Entry of a shard -> the hashes of its ids and of its records."""

    def __init__(self, tasks: Tasks, buckets: int):
        """Takes the data set, and how many buckets there are."""
        self._tasks, self._buckets = tasks, buckets

    def process(self, entry: dict[str, Any]) -> Iterator[tuple[int, _Part]]:
        """Manifest entry -> (bucket, part)."""
        try:
            shard = reader.Dataset(self._tasks.directory).read_shard(entry)
        except StageError as error:
            _mark(self._tasks, entry["name"], {"failed": str(error)})
            return
        ids = [record_id.encode() for record_id in shard.ids]
        hashes = np.frombuffer(b"".join(map(_hash, shard.records)), np.uint8)
        yield from _by_bucket(entry["name"], ids, hashes.reshape(-1, _HASH_BYTES), self._buckets)


class HashIds(beam.DoFn):
    """Block of indices -> the hashes of their ids."""

    def __init__(self, reading: conversion.SourceSpec, buckets: int):
        """Takes the source, and how many buckets there are."""
        self._reading, self._buckets = reading, buckets

    def process(self, block: tuple[int, int]) -> Iterator[tuple[int, _Part]]:
        """(first, last + 1) -> (bucket, part)."""
        indices = np.arange(*block, dtype="<i8")
        ids = conversion.open_converted(self._reading).ids(indices)
        yield from _by_bucket("", ids, indices.view(np.uint8).reshape(-1, 8), self._buckets)


class KeepNew(beam.DoFn):
    """All ids of a bucket -> a file of the indices that are new, and a marker."""

    def __init__(
        self,
        reading: conversion.SourceSpec,
        validation_fraction: float,
        quarantined: frozenset[bytes],
        tasks: Tasks,
    ):
        """Takes the source, how it is split, ids known to be bad, and where to write."""
        self._reading, self._tasks = reading, tasks
        self._validation_fraction, self._quarantined = validation_fraction, quarantined

    def process(self, element: tuple[int, Iterable[_Part]]) -> None:
        """(bucket, parts) -> nothing."""
        bucket, parts = element
        known: dict[bytes, tuple[bytes, str]] = {}  # hash of id -> hash of record, shard
        asked: list[tuple[bytes, int]] = []  # hash of id, index
        for name, joined, values in parts:
            hashes = [joined[i : i + _HASH_BYTES] for i in range(0, len(joined), _HASH_BYTES)]
            if name:
                for place, id_hash in enumerate(hashes):
                    start = place * _HASH_BYTES
                    known[id_hash] = values[start : start + _HASH_BYTES], name
            else:
                asked += zip(hashes, np.frombuffer(values, "<i8").tolist(), strict=True)
        new = np.array(sorted(i for id_hash, i in asked if id_hash not in known), "<i8")
        there = sorted((i, known[id_hash]) for id_hash, i in asked if id_hash in known)
        source = conversion.open_converted(self._reading)
        still_bad = self._still_bad(source, new)
        new = np.setdiff1d(new, still_bad)
        num_there = len(there) + len(still_bad)
        marker = {"num_there": num_there, "splits": self._split_counts(source, new)}
        failed = self._other_content(source, there)
        if failed:
            marker["failed"] = failed
        buffer = io.BytesIO()
        np.save(buffer, new)
        files.write_bytes(self._tasks.path(_new_file(bucket)), buffer.getvalue())
        _mark(self._tasks, str(bucket), marker)

    def _still_bad(self, source: conversion.ConvertedSource, new: np.ndarray) -> np.ndarray:
        """Those of the new that are in the set's quarantine, and would go there again."""
        ids = source.ids(new) if self._quarantined else []
        known = new[[i for i, record_id in enumerate(ids) if record_id in self._quarantined]]
        step = self._reading.records_at_a_time
        bad = [np.empty(0, np.int64)]
        for first in range(0, len(known), step):
            faults = source.read(known[first : first + step]).faults
            bad.append(known[[first + place for place, _ in faults]])
        return np.concatenate(bad)

    def _split_counts(self, source: conversion.ConvertedSource, new: np.ndarray) -> dict[str, int]:
        counts: dict[str, int] = {}
        for split, indices in source.by_source_split(new):
            ids = source.ids(indices)
            found = placement.splits_of(split, ids, self._validation_fraction)
            for name, count in zip(*np.unique(found, return_counts=True), strict=True):
                counts[str(name)] = counts.get(str(name), 0) + int(count)
        return counts

    def _other_content(
        self, source: conversion.ConvertedSource, there: list[tuple[int, tuple[bytes, str]]]
    ) -> str:
        """Which record has an id that is there with other content; "" if none has."""
        step = self._reading.records_at_a_time
        for first in range(0, len(there), step):
            some = there[first : first + step]
            indices = np.array([index for index, _ in some], np.int64)
            ids = source.ids(indices)
            records = source.read(indices)
            places = records.places.tolist()
            for place, image, label in zip(places, records.images, records.labels, strict=True):
                index, (record_hash, shard) = some[place]
                encoded = tf_example.encode(ids[place], image.tobytes(), int(label))
                if _hash(encoded) != record_hash:
                    return _conflict(source, index, ids[place], shard)
            if records.faults:
                place, reason = records.faults[0]
                index, (_, shard) = some[place]
                return f"{_conflict(source, index, ids[place], shard)} ({reason})"
        return ""


def _conflict(source: conversion.ConvertedSource, index: int, record_id: bytes, shard: str) -> str:
    return (
        f"the id {record_id.decode()!r} is in {shard} already, with another image or label than "
        f"in {source.where(index)}; expected records with new ids: give them others with "
        "--id_prefix, or make a new data set of all of them"
    )


def _new_file(bucket: int) -> str:
    return f"new-{bucket:05d}.npy"


def _mark(tasks: Tasks, name: str, marker: dict[str, Any]) -> None:
    files.write_bytes(tasks.path(f"new-{name}.seen"), sealed_json(marker))


def load_indices(tasks: Tasks, name: str) -> np.ndarray:
    """The int64 indices in a file that `find_new` names."""
    return np.load(io.BytesIO(files.read_bytes(tasks.path(name))))


def find_new(
    *,
    reading: conversion.SourceSpec,
    num_records: int,
    base: dict[str, Any],
    tasks: Tasks,
    options: PipelineOptions,
) -> tuple[list[str], dict[str, int], int]:
    """Finds the records of a source whose ids a data set doesn't hold.

    Args:
      reading: the source.
      num_records: how many it holds.
      base: the data set's manifest.
      tasks: of its directory, which this process holds.
      options: Beam's.

    Returns:
      Names of the files of indices, for `load_indices`; how many are new, by the split they
      end in; and how many are there already, with the same content.

    Raises:
      StageError: an id is there with other content, or a shard is damaged.
    """
    entries = [entry for entry in base["files"] if "split" in entry]
    num_known = sum(entry["num_examples"] for entry in entries)
    buckets = num_buckets(num_records + num_known)
    block_size = max(1, min(65_536, num_records))
    blocks = [
        (first, min(first + block_size, num_records)) for first in range(0, num_records, block_size)
    ]
    markers = [str(bucket) for bucket in range(buckets)]
    names = [_new_file(bucket) for bucket in range(buckets)]
    files.make_dirs(tasks.path())
    for name in [*names, *(f"new-{m}.seen" for m in [*markers, *(e["name"] for e in entries)])]:
        files.remove(tasks.path(name))
    bad = frozenset(
        fault["id"].encode() for fault in quarantine.read_all(tasks.directory, base["files"])
    )
    keep = KeepNew(reading, base["made_from"]["validation_fraction"], bad, tasks)

    def build(pipeline: beam.Pipeline) -> None:
        known = (
            pipeline
            | "Shards" >> beam.Create(entries, reshuffle=True)  # manifest entries
            | "ReadKnown" >> beam.ParDo(ReadKnown(tasks, buckets))
        )
        asked = (
            pipeline
            | "Blocks" >> beam.Create(blocks, reshuffle=True)  # (first, last + 1)
            | "HashIds" >> beam.ParDo(HashIds(reading, buckets))
        )
        _ = (
            (known, asked)
            | beam.Flatten()
            | "GroupById" >> beam.GroupByKey()  # (bucket, [part])
            | "KeepNew" >> beam.ParDo(keep)
        )

    def num_seen() -> int:
        return sum(n.endswith(".seen") for n in files.list_names(tasks.path()))

    progress = Progress("preprocess: what is new", total=buckets, unit="parts")
    runner.run(build, options, progress=progress, count_done=num_seen)

    found = {
        name: read_sealed(tasks.path(f"new-{name}.seen"))
        for name in [*markers, *(entry["name"] for entry in entries)]
    }
    failed = [marker["failed"] for marker in found.values() if marker and "failed" in marker]
    if failed:
        more = f" (and {len(failed) - 1} more)" * (len(failed) > 1)
        raise StageError(f"--append: {failed[0]}{more}")
    splits: dict[str, int] = {}
    for name in markers:  # A bucket that nothing fell into has no marker.
        for split, count in ((found[name] or {}).get("splits", {})).items():
            splits[split] = splits.get(split, 0) + count
    num_there = sum((found[name] or {}).get("num_there", 0) for name in markers)
    if sum(splits.values()) + num_there != num_records:
        raise StageError(
            f"--append: {num_records} records read, {sum(splits.values())} new and {num_there} "
            "there already; expected all of them: run the same command again"
        )
    return [n for n in names if files.exists(tasks.path(n))], splits, num_there
