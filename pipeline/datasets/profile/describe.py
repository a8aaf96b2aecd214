"""Describes shards in the Beam job that writes them: an index a shard, and statistics a split."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np

from pipeline.cli.errors import StageError
from pipeline.datasets import index, placement, reader
from pipeline.datasets.profile.statistics import Statistics
from pipeline.formats import tf_example
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import FileEntry
from pipeline.stages.tasks import Tasks
from pipeline.storage import files


class Description:
    """Collects the index and the statistics of one shard."""

    def __init__(self, image_shape: tuple[int, ...]):
        """`image_shape` is (H, W, C)."""
        self.statistics = Statistics(image_shape)
        self._index = index.Builder()

    def add(
        self,
        id_hashes: np.ndarray,
        images: Sequence[bytes],
        labels: np.ndarray,
        num_bytes: Sequence[int],
    ) -> None:
        """Adds records; arguments as of `index.Builder.add`."""
        if images:
            pixels = self._index.add(id_hashes, images, labels, num_bytes)
            self.statistics.add(pixels.reshape(-1, *self.statistics.image_shape), labels)

    def write_index(self, directory: str, shard: str) -> FileEntry:
        """Writes the index of a shard of the data set in `directory`; returns the file's entry."""
        files.make_dirs(files.join(directory, index.DIRECTORY))
        data = self._index.index().to_bytes()
        return manifest_lib.write_file(directory, index.file_name(shard), data)


def parse_shard(
    data: bytes, path: str, image_shape: tuple[int, ...]
) -> list[tuple[bytes, tf_example.Record]]:
    """The (serialized, parsed) records of a shard from its bytes.

    Raises:
      StageError: the shard is damaged.
    """
    records = []
    for item in reader.parse_records(data, path, image_shape):
        if isinstance(item, reader.Fault):
            raise StageError(
                f"{path}: at byte {item.offset} {item.reason}; create the data set again"
            )
        records.append(item[1:])
    return records


def describe_records(
    records: Sequence[tuple[bytes, tf_example.Record]], image_shape: tuple[int, ...], seed: int
) -> Description:
    """The description of a shard with these (serialized, parsed) records."""
    description = Description(image_shape)
    description.add(
        placement.id_hashes(seed, [record.id for _, record in records]),
        [record.image for _, record in records],
        np.array([record.label for _, record in records], np.int64),
        [len(serialized) for serialized, _ in records],
    )
    return description


class DescribeShard(beam.DoFn):
    """Manifest entry of an existing shard -> its index, written, and its statistics."""

    def __init__(self, directory: str, image_shape: tuple[int, ...], seed: int):
        """`directory` is the data set's."""
        self._directory, self._image_shape, self._seed = directory, image_shape, seed

    def process(self, entry: FileEntry) -> Iterator[tuple[str, Statistics]]:
        """Yields (split, statistics)."""
        data = manifest_lib.read_file(self._directory, entry)
        path = files.join(self._directory, entry["name"])
        records = parse_shard(data, path, self._image_shape)
        description = describe_records(records, self._image_shape, self._seed)
        description.write_index(self._directory, entry["name"])
        yield entry["split"], description.statistics


def _sum(parts: Iterable[Statistics]) -> Statistics:
    total: Statistics | None = None
    for part in parts:
        if total is None:
            total = Statistics(part.image_shape)  # Beam forbids changing elements in place.
        total += part
    return total


def job_directory(tasks: Tasks) -> str:
    """Where a job's workers put the statistics of the shards that they write."""
    return tasks.path("statistics")


@beam.ptransform_fn
def WriteStatistics(parts: beam.PCollection, directory: str) -> beam.PCollection:  # noqa: N802
    """(split, Statistics) of shards -> one file for each split, for `read_statistics`."""

    def write(element: tuple[str, Statistics]) -> None:
        split, total = element
        files.make_dirs(directory)
        files.write_bytes(files.join(directory, f"{split}.npz"), total.to_bytes())

    return parts | "AddUp" >> beam.CombinePerKey(_sum) | "Write" >> beam.Map(write)


def read_statistics(directory: str, split: str) -> Statistics | None:
    """A split's file of WriteStatistics; None if the job has written no shard of the split."""
    try:
        return Statistics.from_bytes(files.read_bytes(files.join(directory, f"{split}.npz")))
    except FileNotFoundError:
        return None


def kept_statistics(
    directory: str, by_name: Mapping[str, FileEntry], split: str
) -> Statistics | None:
    """A split's statistics as the data set keeps them; None if they are missing or damaged.

    Args:
      directory: the data set's.
      by_name: name -> manifest entry of all its files.
      split: the split.
    """
    entry: Any = by_name.get(index.statistics_name(split))
    try:
        return Statistics.from_bytes(manifest_lib.read_file(directory, entry)) if entry else None
    except StageError:
        return None
