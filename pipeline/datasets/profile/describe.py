"""Describes the records of a data set in the Beam job that writes them.

Each shard yields statistics, which are summed by split, and image hashes, which are grouped into
buckets. Equal images of all shards meet in one bucket, and a worker holds one bucket at a time.
"""

import functools
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np

from pipeline.cli.errors import StageError
from pipeline.datasets import reader
from pipeline.datasets.profile.statistics import IMAGE_HASH_BYTES, Statistics, image_hash
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.tasks import Tasks
from pipeline.storage import files

# Records per bucket: hashes and ids of about 20 MB, which one worker sorts at once.
_RECORDS_A_BUCKET = 131_072

STATISTICS, IMAGES = "statistics", "images"
# A shard's part of a bucket: split, joined hashes, and ids compressed by _pack_ids.
_Part = tuple[str, bytes, bytes]


def num_buckets(num_records: int) -> int:
    """Number of buckets for the image hashes of `num_records` records."""
    return max(1, -(-num_records // _RECORDS_A_BUCKET))


def _pack_ids(ids: list[bytes]) -> bytes:
    """Compressed ids, since a runner may keep all of them in memory."""
    lengths = np.array([len(record_id) for record_id in ids], "<u4").tobytes()
    return zlib.compress(lengths + b"".join(ids), 1)


def _unpack_ids(packed: bytes, count: int) -> list[bytes]:
    data = zlib.decompress(packed)
    ends = np.cumsum(np.frombuffer(data, "<u4", count), dtype=np.int64) + 4 * count
    starts = np.append(4 * count, ends[:-1])
    return [data[s:e] for s, e in zip(starts.tolist(), ends.tolist(), strict=True)]


class Description:
    """Collects the statistics and image hashes of one shard."""

    def __init__(self, split: str, image_shape: tuple[int, ...], num_buckets: int):
        self._split, self._num_buckets = split, num_buckets
        self._statistics = Statistics(image_shape)
        self._parts: list[tuple[int, _Part]] = []

    def add(self, ids: list[bytes], images: list[bytes], labels: np.ndarray) -> None:
        """Adds records.

        Args:
          ids: the records' ids.
          images: the records' pixels, H·W·C bytes each.
          labels: int64 (n,).
        """
        if not ids:
            return
        pixels = np.frombuffer(b"".join(images), np.uint8)
        self._statistics.add(pixels.reshape(-1, *self._statistics.image_shape), labels)
        hashes = np.frombuffer(b"".join(map(image_hash, images)), np.uint8)
        hashes = hashes.reshape(-1, IMAGE_HASH_BYTES)
        # By the leading bytes, so that the concatenated buckets are in the order of the hashes.
        leading = np.ascontiguousarray(hashes[:, :4]).view(">u4")[:, 0].astype(np.uint64)
        buckets = (leading * np.uint64(self._num_buckets)) >> np.uint64(32)
        for bucket in np.unique(buckets).tolist():
            positions = np.flatnonzero(buckets == bucket)
            bucket_ids = [ids[i] for i in positions.tolist()]
            part = (self._split, hashes[positions].tobytes(), _pack_ids(bucket_ids))
            self._parts.append((bucket, part))

    def outputs(self) -> Iterator[Any]:
        """STATISTICS: (split, Statistics). IMAGES: (bucket, part)."""
        yield beam.pvalue.TaggedOutput(STATISTICS, (self._split, self._statistics))
        for part in self._parts:
            yield beam.pvalue.TaggedOutput(IMAGES, part)


def describe_shard(
    data: bytes, path: str, *, split: str, image_shape: tuple[int, ...], num_buckets: int
) -> Description:
    """The description of a shard from its bytes.

    Raises:
      StageError: the shard is damaged.
    """
    records = []
    for item in reader.parse_records(data, path, image_shape):
        if isinstance(item, reader.Fault):
            raise StageError(
                f"{path}: at byte {item.offset} {item.reason}; create the data set again"
            )
        records.append(item[2])
    description = Description(split, image_shape, num_buckets)
    description.add(
        [record.id for record in records],
        [record.image for record in records],
        np.array([record.label for record in records], np.int64),
    )
    return description


class DescribeShard(beam.DoFn):
    """Manifest entry of an existing shard -> its statistics and image hashes."""

    def __init__(self, directory: str, image_shape: tuple[int, ...], num_buckets: int):
        """`directory` is the data set's."""
        self._directory, self._image_shape = directory, image_shape
        self._num_buckets = num_buckets

    def process(self, entry: dict[str, Any]) -> Iterator[Any]:
        """Manifest entry -> STATISTICS and IMAGES, as `Description.outputs`."""
        data = manifest_lib.read_file(self._directory, entry)
        path = files.join(self._directory, entry["name"])
        description = describe_shard(
            data,
            path,
            split=entry["split"],
            image_shape=self._image_shape,
            num_buckets=self._num_buckets,
        )
        yield from description.outputs()


def _sum(parts: Iterable[Statistics]) -> Statistics:
    total: Statistics | None = None
    for part in parts:
        if total is None:
            total = Statistics(part.image_shape)  # Beam forbids changing elements in place.
        total += part
    return total


def _statistics_file(split: str) -> str:
    return f"statistics-{split}.npz"


def _duplicates_file(bucket: int) -> str:
    return f"duplicates-{bucket:05d}.jsonl"


@beam.ptransform_fn
def WriteStatistics(parts: beam.PCollection, tasks: Tasks) -> beam.PCollection:  # noqa: N802
    """(split, Statistics) of shards -> one file for each split."""

    def write(element: tuple[str, Statistics]) -> None:
        split, total = element
        files.write_bytes(tasks.path(_statistics_file(split)), total.to_bytes())

    return parts | "AddUp" >> beam.CombinePerKey(_sum) | "Write" >> beam.Map(write)


class FindDuplicates(beam.DoFn):
    """Image hashes of a bucket -> a file with a line for each group of equal images."""

    def __init__(self, tasks: Tasks):
        """`tasks` of the data set's directory."""
        self._tasks = tasks

    def process(self, element: tuple[int, Iterable[_Part]]) -> None:
        """Takes (bucket, [part]); yields nothing."""
        bucket, parts = element[0], list(element[1])
        hashes = b"".join(part[1] for part in parts)
        words = np.frombuffer(hashes, ">u8").reshape(-1, IMAGE_HASH_BYTES // 8)
        counts = [len(part[1]) // IMAGE_HASH_BYTES for part in parts]
        part_ends = np.cumsum(counts)
        order = np.lexsort((words[:, 1], words[:, 0]))
        words = words[order]
        begins = np.flatnonzero(np.append(True, (words[1:] != words[:-1]).any(axis=1)))
        sizes = np.diff(np.append(begins, len(order)))

        @functools.cache
        def unpacked(number: int) -> list[bytes]:
            """The ids of a part; most parts hold no duplicate and stay compressed."""
            return _unpack_ids(parts[number][2], counts[number])

        lines = []
        for begin, size in zip(begins[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            group: dict[str, list[str]] = {}
            for position in order[begin : begin + size].tolist():
                number = int(np.searchsorted(part_ends, position, side="right"))
                record_id = unpacked(number)[position - part_ends[number] + counts[number]]
                group.setdefault(parts[number][0], []).append(record_id.decode())
            line = {
                "image_hash": words[begin].tobytes().hex(),
                "ids": {split: sorted(split_ids) for split, split_ids in sorted(group.items())},
            }
            lines.append(json.dumps(line) + "\n")
        path = self._tasks.path(_duplicates_file(bucket))
        files.write_bytes(path, "".join(lines).encode())


def read_statistics(tasks: Tasks, split: str) -> Statistics:
    """Reads a split's file of WriteStatistics."""
    return Statistics.from_bytes(files.read_bytes(tasks.path(_statistics_file(split))))


def read_duplicates(tasks: Tasks, num_buckets: int) -> Iterator[bytes]:
    """The lines of FindDuplicates, in the order of the hashes."""
    for bucket in range(num_buckets):
        path = tasks.path(_duplicates_file(bucket))
        if files.exists(path):  # An empty bucket has no file.
            with files.open_read(path) as file:
                yield from file
