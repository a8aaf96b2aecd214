"""What the Beam job learns of the records beside writing them: statistics, and equal images.

Each shard gives the statistics of its records, which are added up by split, and the
hashes of its images, which are sorted into buckets: equal images meet in one bucket
wherever they stood, and no worker holds more than a bucket.
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

# Records whose hashes and ids one worker sorts at once: some 20 MB of them.
_RECORDS_A_BUCKET = 131_072

STATISTICS, IMAGES = "statistics", "images"
# What a bucket gets of a shard: split, hashes in a row, and the ids as _pack_ids packs them.
_Part = tuple[str, bytes, bytes]


def num_buckets(num_records: int) -> int:
    """Into how many buckets so many records are sorted."""
    return max(1, -(-num_records // _RECORDS_A_BUCKET))


def _pack_ids(ids: list[bytes]) -> bytes:
    """Ids in few bytes, since a runner may keep all of them in memory."""
    lengths = np.array([len(record_id) for record_id in ids], "<u4").tobytes()
    return zlib.compress(lengths + b"".join(ids), 1)


def _unpack_ids(packed: bytes, count: int) -> list[bytes]:
    data = zlib.decompress(packed)
    ends = np.cumsum(np.frombuffer(data, "<u4", count), dtype=np.int64) + 4 * count
    starts = np.append(4 * count, ends[:-1])
    return [data[s:e] for s, e in zip(starts.tolist(), ends.tolist(), strict=True)]


class Description:
    """What is learnt of one shard, in parts as they come by."""

    def __init__(self, split: str, image_shape: tuple[int, ...], num_buckets: int):
        self._split, self._num_buckets = split, num_buckets
        self._statistics = Statistics(image_shape)
        self._parts: list[tuple[int, _Part]] = []

    def add(self, ids: list[bytes], images: list[bytes], labels: np.ndarray) -> None:
        """Takes in some records.

        Args:
          ids: their ids.
          images: their pixels, H·W·C bytes each.
          labels: int64 (n,).
        """
        if not ids:
            return
        pixels = np.frombuffer(b"".join(images), np.uint8)
        self._statistics.add(pixels.reshape(-1, *self._statistics.image_shape), labels)
        hashes = np.frombuffer(b"".join(map(image_hash, images)), np.uint8)
        hashes = hashes.reshape(-1, IMAGE_HASH_BYTES)
        # By the leading bytes, so that the buckets one after the other are in order.
        leading = np.ascontiguousarray(hashes[:, :4]).view(">u4")[:, 0].astype(np.uint64)
        buckets = (leading * np.uint64(self._num_buckets)) >> np.uint64(32)
        for bucket in np.unique(buckets).tolist():
            here = np.flatnonzero(buckets == bucket)
            some = [ids[i] for i in here.tolist()]
            part = (self._split, hashes[here].tobytes(), _pack_ids(some))
            self._parts.append((bucket, part))

    def outputs(self) -> Iterator[Any]:
        """STATISTICS: (split, Statistics). IMAGES: (bucket, part)."""
        yield beam.pvalue.TaggedOutput(STATISTICS, (self._split, self._statistics))
        for part in self._parts:
            yield beam.pvalue.TaggedOutput(IMAGES, part)


def read_back(
    data: bytes, path: str, *, split: str, image_shape: tuple[int, ...], num_buckets: int
) -> Description:
    """The description of a shard from its bytes.

    Raises:
      StageError: something is wrong with the shard.
    """
    parsed = []
    for found in reader.parse_records(data, path, image_shape):
        if isinstance(found, reader.Fault):
            raise StageError(f"{path}: at byte {found.offset} {found.reason}; make it again")
        parsed.append(found[2])
    description = Description(split, image_shape, num_buckets)
    description.add(
        [record.id for record in parsed],
        [record.image for record in parsed],
        np.array([record.label for record in parsed], np.int64),
    )
    return description


class DescribeShard(beam.DoFn):
    """Entry of a shard that is there already -> what is learnt of it."""

    def __init__(self, directory: str, image_shape: tuple[int, ...], num_buckets: int):
        """Takes where the shards lie, and what they hold."""
        self._directory, self._image_shape = directory, image_shape
        self._num_buckets = num_buckets

    def process(self, entry: dict[str, Any]) -> Iterator[Any]:
        """Manifest entry -> STATISTICS and IMAGES, as `Description.outputs`."""
        data = manifest_lib.read_file(self._directory, entry)
        path = files.join(self._directory, entry["name"])
        description = read_back(
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
            total = Statistics(part.image_shape)  # Elements are never changed in place.
        total += part
    return total


def _statistics_file(split: str) -> str:
    return f"statistics-{split}.npz"


def _duplicates_file(bucket: int) -> str:
    return f"duplicates-{bucket:05d}.jsonl"


@beam.ptransform_fn
def WriteStatistics(parts: beam.PCollection, tasks: Tasks) -> beam.PCollection:  # noqa: N802
    """(split, Statistics) of parts -> one file for each split."""

    def write(element: tuple[str, Statistics]) -> None:
        split, total = element
        files.write_bytes(tasks.path(_statistics_file(split)), total.to_bytes())

    return parts | "AddUp" >> beam.CombinePerKey(_sum) | "Write" >> beam.Map(write)


class FindDuplicates(beam.DoFn):
    """All images of a bucket -> a file with a line for each group of equal ones."""

    def __init__(self, tasks: Tasks):
        """Takes where to write."""
        self._tasks = tasks

    def process(self, element: tuple[int, Iterable[_Part]]) -> None:
        """(bucket, [part]) -> nothing."""
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
            """The ids of a part; most parts hold no duplicate and stay packed."""
            return _unpack_ids(parts[number][2], counts[number])

        lines = []
        for begin, size in zip(begins[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            group: dict[str, list[str]] = {}
            for place in order[begin : begin + size].tolist():
                number = int(np.searchsorted(part_ends, place, side="right"))
                record_id = unpacked(number)[place - part_ends[number] + counts[number]]
                group.setdefault(parts[number][0], []).append(record_id.decode())
            line = {
                "image_hash": words[begin].tobytes().hex(),
                "ids": {split: sorted(found) for split, found in sorted(group.items())},
            }
            lines.append(json.dumps(line) + "\n")
        path = self._tasks.path(_duplicates_file(bucket))
        files.write_bytes(path, "".join(lines).encode())


def read_statistics(tasks: Tasks, split: str) -> Statistics:
    """What WriteStatistics wrote of a split."""
    return Statistics.from_bytes(files.read_bytes(tasks.path(_statistics_file(split))))


def read_duplicates(tasks: Tasks, num_buckets: int) -> Iterator[bytes]:
    """The lines that FindDuplicates wrote, in the order of the hashes."""
    for bucket in range(num_buckets):
        path = tasks.path(_duplicates_file(bucket))
        if files.exists(path):  # No image fell into it otherwise.
            with files.open_read(path) as file:
                yield from file
