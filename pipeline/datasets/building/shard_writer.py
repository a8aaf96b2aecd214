"""The Beam pipeline that writes an image set into TFRecord shards.

The pipeline shuffles indices, 8 bytes a record. The writer of a shard reads its records from the
source, so memory is bounded by one shard. The bytes of a shard depend on the seed and its records
only.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli.progress import Progress
from pipeline.datasets import index, placement, reader
from pipeline.datasets.building import new_records, rewriting, source_records
from pipeline.datasets.profile import describe
from pipeline.datasets.profile.statistics import Statistics
from pipeline.formats import tfrecord
from pipeline.runners import run as runner
from pipeline.sources import conversion
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.stages.tasks import Tasks
from pipeline.storage import files

# Indices hashed at a time: half a megabyte, and a fraction of a second of work.
BLOCK_SIZE = 65_536
# What the runner's own page shows.
_NAMESPACE = "vae-preprocess"
_NUM_WRITTEN = Metrics.counter(_NAMESPACE, "records_written")
_NUM_QUARANTINED = Metrics.counter(_NAMESPACE, "records_quarantined")
# (first, last + 1), or the name of a file of indices.
IndexBlock = tuple[int, int] | str


class Layout(NamedTuple):
    """The shards that a job writes, and their names."""

    name: str
    seed: int
    validation_fraction: float
    compression: str
    num_shards: dict[str, int]  # split -> shards that this job writes
    first_shard: dict[str, int]  # split -> number of the first such shard; above 0 in an append
    num_in_names: dict[str, int]  # split -> number of shards in file names, without appended ones

    def shard_name(self, split: str, shard: int) -> str:
        """File name of this job's shard with that number, from 0."""
        number, total = self.first_shard[split] + shard, self.num_in_names[split]
        return reader.shard_name(self.name, split, number, total, self.compression)

    def keys(self) -> list[tuple[str, int]]:
        """(split, shard) of every shard that this job writes."""
        return [(split, shard) for split, n in self.num_shards.items() for shard in range(n)]

    def tasks(self) -> list[str]:
        """File names of the shards that this job writes."""
        return [self.shard_name(*key) for key in self.keys()]


class AssignShards(beam.DoFn):
    """IndexBlock -> the indices of each shard."""

    def __init__(
        self, source_spec: conversion.SourceSpec, layout: Layout, tasks: Tasks | None = None
    ):
        """Skips records whose split has no shards in `layout`.

        Args:
          source_spec: the source.
          layout: the shards.
          tasks: of the directory with the files of indices; None if no block is a file name.
        """
        self._source_spec, self.layout, self._tasks = source_spec, layout, tasks

    def process(self, block: IndexBlock) -> Iterator[tuple[tuple[str, int], bytes]]:
        """IndexBlock -> ((split, shard), int64 indices as little-endian bytes)."""
        layout, source = self.layout, conversion.open_converted(self._source_spec)
        is_file = isinstance(block, str)
        indices = new_records.load_indices(self._tasks, block) if is_file else np.arange(*block)
        for source_split, split_indices in source.by_source_split(indices):
            ids = source.ids(split_indices)
            splits = placement.splits_of(source_split, ids, layout.validation_fraction)
            numbers = placement.id_hashes(layout.seed, ids)[:, 0]
            for split in sorted(set(splits.tolist()) & layout.num_shards.keys()):
                mask = splits == split
                shard_numbers = numbers[mask] % np.uint64(layout.num_shards[split])
                order = np.argsort(shard_numbers, kind="stable")
                shards, starts = np.unique(shard_numbers[order], return_index=True)
                parts = np.split(split_indices[mask][order].astype("<i8"), starts[1:])
                for shard, part in zip(shards.tolist(), parts, strict=True):
                    yield (split, shard), part.tobytes()


@beam.ptransform_fn
def IndicesByShard(  # noqa: N802
    pipeline: beam.Pipeline, assign: AssignShards, blocks: Sequence[IndexBlock]
) -> beam.PCollection:
    """A pipeline -> ((split, shard), [int64 indices as little-endian bytes]) of every shard.

    A shard without records has an empty part.
    """
    assigned = (
        pipeline
        | "Blocks" >> beam.Create(blocks, reshuffle=True)
        | "AssignShards" >> beam.ParDo(assign)
    )
    shards = [(key, b"") for key in assign.layout.keys()]
    empty = pipeline | "EveryShard" >> beam.Create(shards)
    return (assigned, empty) | "AllParts" >> beam.Flatten() | "GroupByShard" >> beam.GroupByKey()


class WriteShard(beam.DoFn):
    """All indices of a shard -> its file, index and marker, and its statistics."""

    def __init__(self, source_spec: conversion.SourceSpec, layout: Layout, tasks: Tasks):
        """`tasks` are of the output directory."""
        self._source_spec, self._layout, self._tasks = source_spec, layout, tasks

    def process(
        self, element: tuple[tuple[str, int], Iterable[bytes]]
    ) -> Iterator[tuple[str, Statistics]]:
        """((split, shard), [int64 indices as little-endian bytes]) -> (split, statistics)."""
        (split, shard), parts = element
        seed, name = self._layout.seed, self._layout.shard_name(split, shard)
        description = describe.Description(self._source_spec.image_shape)
        indices = np.frombuffer(b"".join(parts), "<i8")
        records = source_records.SourceRecords(self._source_spec, seed, name, indices)
        directory = self._tasks.directory

        def encoded() -> Iterator[bytes]:
            for batch in records.batches():
                started = time.perf_counter()
                num_bytes = list(map(len, batch.encoded))
                description.add(batch.id_hashes, batch.images, batch.labels, num_bytes)
                records.secs["compute"] += time.perf_counter() - started
                yield from batch.encoded

        def make() -> dict[str, Any]:
            started = time.perf_counter()
            with manifest_lib.writing(directory, name) as file:
                num_examples = tfrecord.write(file, name, encoded())
            entry = {**file.entry(), "num_examples": num_examples, "split": split}
            index_entry = description.write_index(directory, name)
            fault_entries = quarantine.write(
                directory, name, records.faults, num_quarantined=len(records.faults)
            )
            secs = records.secs
            secs["write"] = time.perf_counter() - started - secs["read"] - secs["compute"]
            fault_entries = [{**fault_entry, "of_split": split} for fault_entry in fault_entries]
            return {"entries": [entry, *fault_entries, index_entry], "secs": secs}

        marker = self._tasks.make_once(name, make)
        if marker is None:
            return
        entries = marker["entries"]
        _NUM_WRITTEN.inc(sum(entry.get("num_examples", 0) for entry in entries))
        _NUM_QUARANTINED.inc(sum(entry.get("num_quarantined", 0) for entry in entries))
        if marker["reused"]:
            path = files.join(directory, name)
            shape = self._source_spec.image_shape
            stored = describe.parse_shard(files.read_bytes(path), path, shape)
            description = describe.describe_records(stored, shape, seed)
            names = {entry["name"] for entry in entries}
            if index.file_name(name) not in names:  # A try of an earlier version.
                entries = [*entries, description.write_index(directory, name)]
                self._tasks.write_marker(name, {**marker, "entries": entries})
        yield split, description.statistics


def index_blocks(num_records: int) -> list[IndexBlock]:
    """Blocks that cover all indices of a source."""
    return [
        (first, min(first + BLOCK_SIZE, num_records)) for first in range(0, num_records, BLOCK_SIZE)
    ]


def write_shards(
    *,
    source_spec: conversion.SourceSpec,
    layout: Layout,
    blocks: Sequence[IndexBlock],
    rewrites: Sequence[rewriting.Rewrite] = (),
    tasks: Tasks,
    options: PipelineOptions,
) -> None:
    """Runs the pipeline; then each shard's task has a marker of success or failure.

    Args:
      source_spec: the source.
      layout: the shards to write.
      blocks: the indices of the records to write.
      rewrites: existing shards to write again without some records.
      tasks: of the output directory, which this process holds.
      options: Beam's.
    """

    def build(pipeline: beam.Pipeline) -> None:
        _ = (
            pipeline
            | "IndicesByShard" >> IndicesByShard(AssignShards(source_spec, layout, tasks), blocks)
            | "WriteShard" >> beam.ParDo(WriteShard(source_spec, layout, tasks))
            | "WriteStatistics" >> describe.WriteStatistics(describe.job_directory(tasks))
        )
        if rewrites:
            rewriting.rewrite_shards(
                pipeline, rewrites, source_spec.image_shape, layout.seed, tasks
            )

    progress = Progress("preprocess", total=len(layout.keys()) + len(rewrites), unit="shards")
    runner.run(build, options, progress=progress, count_done=tasks.num_done)
