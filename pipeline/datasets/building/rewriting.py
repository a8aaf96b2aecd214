"""Writes shards again without some of their records.

A rewritten shard gets a new name, with the next free number, and the old file goes after the
manifest has been replaced. Until then the old data set is whole.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np

from pipeline.datasets import index, reader
from pipeline.datasets.profile import describe
from pipeline.datasets.profile.statistics import Statistics
from pipeline.formats import tfrecord
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import FileEntry
from pipeline.stages.tasks import Tasks
from pipeline.storage import files


class Rewrite(NamedTuple):
    """A shard that is written again."""

    shard: FileEntry  # The old one.
    new_name: str
    positions: tuple[int, ...]  # Of the records to leave out, in order.


class Removed(NamedTuple):
    """Records that a job takes out of a data set."""

    num_records: int
    rewritten: Mapping[str, str]  # Old shard -> the one that is written without them.
    images: np.ndarray  # uint64 (num_records, 2): hashes
    statistics: Mapping[str, Statistics]  # Split -> statistics of these records.


NOTHING_REMOVED = Removed(0, {}, np.empty((0, 2), np.uint64), {})


def next_numbers(shards: Sequence[FileEntry]) -> dict[str, int]:
    """Split -> the number of its next shard."""
    numbers: dict[str, int] = {}
    for shard in shards:
        number = 1 + reader.shard_number(shard["name"])
        numbers[shard["split"]] = max(number, numbers.get(shard["split"], 0))
    return numbers


def plan(
    base: Mapping[str, Any], indexes: index.Indexes, places: index.Places, first: Mapping[str, int]
) -> list[Rewrite]:
    """The shards to write again.

    Args:
      base: the data set's manifest.
      indexes: of the data set.
      places: of the records to leave out.
      first: split -> number of its first rewritten shard.
    """
    made_from, numbers, rewrites = base["made_from"], dict(first), []
    for number in np.unique(places.shards).tolist():
        shard = indexes.shards[number]
        split = shard["split"]
        new_name = reader.shard_name(
            base["name"],
            split,
            numbers[split],
            base["num_shards"][split],
            made_from["compression"],
        )
        numbers[split] += 1
        positions = sorted(places.positions[places.shards == number].tolist())
        rewrites.append(Rewrite(shard, new_name, tuple(positions)))
    return rewrites


def file_names(rewrites: Sequence[Rewrite]) -> list[str]:
    """The files that a job writes for these shards."""
    names = [rewrite.new_name for rewrite in rewrites]
    return [*names, *map(index.file_name, names)]


def dropped_names(shards: Iterable[str]) -> list[str]:
    """The files that go when shards have been written again.

    Args:
      shards: names of the old shards.
    """
    names = list(shards)
    return [*names, *map(index.file_name, names)]


def identity(rewrites: Sequence[Rewrite]) -> str:
    """A hash of the records that are left out; part of `made_from`."""
    return manifest_lib.content_id([[r.shard["sha256"], r.positions] for r in rewrites])


def removed(
    directory: str,
    indexes: index.Indexes,
    rewrites: Sequence[Rewrite],
    image_shape: Sequence[int],
) -> Removed:
    """What the rewritten shards leave out, read from the old ones.

    Raises:
      StageError: a shard is missing or damaged.
    """
    images = [np.empty((0, 2), np.uint64)]
    statistics: dict[str, Statistics] = {}
    for shard, _, positions in rewrites:
        rows = indexes[shard].rows[list(positions)]
        images.append(rows["image"])
        total = statistics.setdefault(shard["split"], Statistics(image_shape))
        records = list(reader.read_records(directory, shard, rows["offset"].tolist()))
        pixels = np.frombuffer(b"".join(record.image for record in records), np.uint8)
        labels = np.array([record.label for record in records], np.int64)
        total.add(pixels.reshape(len(records), *image_shape), labels)
    hashes = np.concatenate(images)
    names = {rewrite.shard["name"]: rewrite.new_name for rewrite in rewrites}
    return Removed(len(hashes), names, hashes, statistics)


class RewriteShard(beam.DoFn):
    """Rewrite -> the new shard, its index and its marker; yields nothing."""

    def __init__(self, image_shape: tuple[int, ...], seed: int, tasks: Tasks):
        """`seed` is the data set's, `tasks` are of its directory."""
        self._image_shape, self._seed, self._tasks = image_shape, seed, tasks

    def process(self, rewrite: Rewrite) -> None:
        """Writes one shard."""
        directory, tasks = self._tasks.directory, self._tasks

        def make() -> dict[str, Any]:
            started = time.perf_counter()
            path = files.join(directory, rewrite.shard["name"])
            data = manifest_lib.read_file(directory, rewrite.shard)
            records = describe.parse_shard(data, path, self._image_shape)
            for position in reversed(rewrite.positions):
                del records[position]
            with manifest_lib.writing(directory, rewrite.new_name) as file:
                serialized = (serialized for serialized, _ in records)
                num_examples = tfrecord.write(file, rewrite.new_name, serialized)
            description = describe.describe_records(records, self._image_shape, self._seed)
            entry = {
                **file.entry(),
                "num_examples": num_examples,
                "split": rewrite.shard["split"],
                "instead_of": [*rewrite.shard.get("instead_of", ()), rewrite.shard["name"]],
            }
            index_entry = description.write_index(directory, rewrite.new_name)
            return {
                "entries": [entry, index_entry],
                "secs": {"write": time.perf_counter() - started},
            }

        tasks.make_once(rewrite.new_name, make)


def rewrite_shards(
    pipeline: beam.Pipeline,
    rewrites: Sequence[Rewrite],
    image_shape: tuple[int, ...],
    seed: int,
    tasks: Tasks,
) -> None:
    """Adds the work to a pipeline; then each new shard has a marker of success or failure."""
    _ = (
        pipeline
        | "Rewrites" >> beam.Create(rewrites, reshuffle=True)
        | "RewriteShard" >> beam.ParDo(RewriteShard(image_shape, seed, tasks))
    )
