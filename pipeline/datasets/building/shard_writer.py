"""Job 1: an image set to TFRecord shards, as a Beam pipeline.

What the pipeline shuffles are indices, 8 bytes a record. Each shard's writer fetches its
own records from the source, so memory is bounded by one shard, and since the order is a
function of the seed and the ids, so are the bytes.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli.progress import Progress
from pipeline.datasets import placement, reader
from pipeline.datasets.building import new_records, source_records
from pipeline.datasets.profile import describe
from pipeline.datasets.profile.describe import IMAGES, STATISTICS
from pipeline.formats import tfrecord
from pipeline.runners import run as runner
from pipeline.sources import conversion
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.stages.tasks import Tasks
from pipeline.storage import files

# Indices hashed at a time: a megabyte of them, a fraction of a second of work.
BLOCK_SIZE = 65_536
# (first, last + 1), or the name of a file of indices.
Block = tuple[int, int] | str


class Layout(NamedTuple):
    """Which shards a job writes, and what they are called."""

    name: str
    seed: int
    validation_fraction: float
    compression: str
    num_shards: dict[str, int]  # split -> shards that this job writes
    first: dict[str, int]  # split -> number of the first of them; above 0 in an append
    named: dict[str, int]  # split -> shards of the set as it was first made

    def shard_name(self, split: str, shard: int) -> str:
        """File name of this job's shard of that number, from 0."""
        number = self.first[split] + shard
        return reader.shard_name(self.name, split, number, self.named[split], self.compression)

    def keys(self) -> list[tuple[str, int]]:
        """(split, shard) of every shard that this job writes."""
        return [(split, shard) for split, n in self.num_shards.items() for shard in range(n)]

    def tasks(self) -> list[str]:
        """Their file names."""
        return [self.shard_name(*key) for key in self.keys()]


class AssignShards(beam.DoFn):
    """Block of indices -> the part of it that each shard gets."""

    def __init__(self, reading: conversion.SourceSpec, layout: Layout, tasks: Tasks | None = None):
        """Takes the source, the shards, and where files of indices are, if blocks may be such.

        Records of splits that the layout has no shards for are left out.
        """
        self._reading, self._layout, self._tasks = reading, layout, tasks

    def process(self, block: Block) -> Iterator[tuple[tuple[str, int], bytes]]:
        """Block -> ((split, shard), int64 indices as little-endian bytes)."""
        layout, source = self._layout, conversion.open_converted(self._reading)
        is_file = isinstance(block, str)
        indices = new_records.load_indices(self._tasks, block) if is_file else np.arange(*block)
        for source_split, here in source.by_source_split(indices):
            ids = source.ids(here)
            splits = placement.splits_of(source_split, ids, layout.validation_fraction)
            numbers, _ = placement.shards_and_order(layout.seed, ids)
            for split in sorted(set(splits.tolist()) & layout.num_shards.keys()):
                of_split = splits == split
                shard_numbers = numbers[of_split] % np.uint64(layout.num_shards[split])
                order = np.argsort(shard_numbers, kind="stable")
                found, starts = np.unique(shard_numbers[order], return_index=True)
                parts = np.split(here[of_split][order].astype("<i8"), starts[1:])
                for shard, part in zip(found.tolist(), parts, strict=True):
                    yield (split, shard), part.tobytes()


class WriteShard(beam.DoFn):
    """All indices of a shard -> its file and marker, and what is learnt of its records."""

    def __init__(
        self,
        reading: conversion.SourceSpec,
        layout: Layout,
        tasks: Tasks,
        num_buckets: int,
    ):
        """Takes the source, the shards, where to write, and the buckets of image hashes."""
        self._reading, self._layout, self._tasks = reading, layout, tasks
        self._num_buckets = num_buckets

    def process(self, element: tuple[tuple[str, int], Iterable[bytes]]) -> Iterator[Any]:
        """((split, shard), [int64 indices as little-endian bytes]) -> STATISTICS and IMAGES."""
        (split, shard), parts = element
        name = self._layout.shard_name(split, shard)
        description = describe.Description(split, self._reading.image_shape, self._num_buckets)
        indices = np.frombuffer(b"".join(parts), "<i8")
        records = source_records.SourceRecords(self._reading, self._layout.seed, name, indices)

        def encoded() -> Iterator[bytes]:
            for block in records.blocks():
                started = time.perf_counter()
                description.add(block.ids, block.images, block.labels)
                records.secs["compute"] += time.perf_counter() - started
                yield from block.encoded

        def make() -> dict[str, Any]:
            started = time.perf_counter()
            with manifest_lib.writing(self._tasks.directory, name) as file:
                num_examples = tfrecord.write(file, name, encoded())
            entry = {**file.entry(), "num_examples": num_examples}
            faults = quarantine.write(
                self._tasks.directory,
                name,
                records.faults,
                num_quarantined=len(records.faults),
            )
            secs = records.secs
            secs["write"] = time.perf_counter() - started - secs["read"] - secs["compute"]
            of_split = [{**fault, "of_split": split} for fault in faults]
            return {"entries": [{**entry, "split": split}, *of_split], "secs": secs}

        marker = self._tasks.make_once(name, make)
        if marker is None:
            return
        if marker["reused"]:
            path = files.join(self._tasks.directory, name)
            data = files.read_bytes(path)
            description = describe.read_back(
                data,
                path,
                split=split,
                image_shape=self._reading.image_shape,
                num_buckets=self._num_buckets,
            )
        yield from description.outputs()


def index_blocks(num_records: int) -> list[Block]:
    """All indices of a source, in blocks."""
    return [
        (first, min(first + BLOCK_SIZE, num_records)) for first in range(0, num_records, BLOCK_SIZE)
    ]


def write_shards(
    *,
    reading: conversion.SourceSpec,
    layout: Layout,
    blocks: Sequence[Block],
    there: Sequence[dict[str, Any]],
    num_buckets: int,
    tasks: Tasks,
    options: PipelineOptions,
) -> None:
    """Runs the pipeline: afterwards each task has its marker, or says why it failed.

    Args:
      reading: the source.
      layout: the shards to write.
      blocks: the indices of the records to write.
      there: manifest entries of shards that stay, and are described with the new ones.
      num_buckets: see describe.num_buckets.
      tasks: of the directory to write to, which this process holds.
      options: Beam's.
    """

    def build(pipeline: beam.Pipeline) -> None:
        assigned = (
            pipeline
            | "Blocks" >> beam.Create(blocks, reshuffle=True)
            | "AssignShards" >> beam.ParDo(AssignShards(reading, layout, tasks))
        )
        # A shard that no record falls into is a file too, with nothing in it.
        every = pipeline | "EveryShard" >> beam.Create([(key, b"") for key in layout.keys()])
        written = (
            (assigned, every)
            | "AllParts" >> beam.Flatten()
            | "GroupByShard" >> beam.GroupByKey()  # ((split, shard), [indices])
            | "WriteShard"
            >> beam.ParDo(WriteShard(reading, layout, tasks, num_buckets)).with_outputs(
                STATISTICS, IMAGES
            )
        )
        described = (
            pipeline
            | "Shards" >> beam.Create(there, reshuffle=True)  # manifest entries
            | "DescribeShard"
            >> beam.ParDo(
                describe.DescribeShard(tasks.directory, reading.image_shape, num_buckets)
            ).with_outputs(STATISTICS, IMAGES)
        )
        _ = (
            (written[STATISTICS], described[STATISTICS])
            | "AllStatistics" >> beam.Flatten()
            | "WriteStatistics" >> describe.WriteStatistics(tasks)
        )
        _ = (
            (written[IMAGES], described[IMAGES])
            | "AllImages" >> beam.Flatten()
            | "GroupByHash" >> beam.GroupByKey()  # (bucket, [part])
            | "FindDuplicates" >> beam.ParDo(describe.FindDuplicates(tasks))
        )

    progress = Progress("preprocess", total=len(layout.keys()), unit="shards")
    runner.run(build, options, progress=progress, count_done=tasks.num_done)
