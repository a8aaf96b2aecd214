"""Job 1: an image set to TFRecord shards, as a Beam pipeline.

What the pipeline shuffles are indices, 8 bytes a record. Each shard's writer
fetches its own records from the source, so memory is bounded by one shard, and
since the order is a function of the seed and the ids, so are the bytes.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline import beam_runner, examples, placement, shards, sources, stage
from pipeline.errors import StageError, UsageError
from pipeline.output_directory import OutputDirectory
from pipeline.progress import Progress

# Indices hashed at a time: half a megabyte of them, a fraction of a second of work.
_BLOCK_SIZE = 65_536
# Pixels read and encoded at a time, so that a writer holds little beside its indices.
_RECORDS_AT_A_TIME = 4_096


class AssignShards(beam.DoFn):
    """Block of indices -> the part of it that each shard gets."""

    def __init__(self, spec: str, settings: dict[str, Any]):
        """Takes the source's spec and the job's settings."""
        self._spec, self._settings = spec, settings

    def process(self, block: tuple[int, int]) -> Iterator[tuple[tuple[str, int], bytes]]:
        """(first, last + 1) -> ((split, shard), int64 indices as little-endian bytes)."""
        source = sources.open_source(self._spec)
        indices = np.arange(*block)
        source_splits = list(source.split_sizes)
        ends = np.cumsum(list(source.split_sizes.values()))
        split_numbers = np.searchsorted(ends, indices, side="right").tolist()
        seed, num_shards = self._settings["seed"], self._settings["num_shards"]
        fraction = self._settings["validation_fraction"]
        parts: dict[tuple[str, int], list[int]] = {}
        for index, record_id, split_number in zip(
            indices.tolist(), source.ids(indices), split_numbers, strict=True
        ):
            split = placement.split_of(source_splits[split_number], record_id, fraction)
            number, _ = placement.shard_and_order(seed, record_id)
            parts.setdefault((split, number % num_shards), []).append(index)
        for key, part in parts.items():
            yield key, np.array(part, "<i8").tobytes()


class WriteShard(beam.DoFn):
    """All indices of a shard -> its file and marker."""

    def __init__(self, spec: str, settings: dict[str, Any], output: OutputDirectory):
        """Takes the source's spec, the job's settings and where to write."""
        self._spec, self._settings, self._output = spec, settings, output

    def process(self, element: tuple[tuple[str, int], Iterable[bytes]]) -> None:
        """((split, shard), [int64 indices as little-endian bytes]) -> nothing."""
        (split, shard), parts = element
        name = shards.shard_name(self._settings["name"], split, shard, self._settings["num_shards"])

        def make() -> tuple[list[dict[str, Any]], dict[str, float]]:
            started = time.perf_counter()
            secs = {"read": 0.0, "compute": 0.0}
            records = self._records(name, np.frombuffer(b"".join(parts), "<i8"), secs)
            entry = shards.write_shard(self._output.directory, name, records)
            secs["write"] = time.perf_counter() - started - secs["read"] - secs["compute"]
            return [{**entry, "split": split}], secs

        self._output.make_once(name, make)

    def _records(self, name: str, indices: np.ndarray, secs: dict[str, float]) -> Iterator[bytes]:
        """The shard's serialized records in order; adds the seconds spent to `secs`."""
        started = time.perf_counter()
        source = sources.open_source(self._spec)
        ids = source.ids(indices)
        order = placement.sort_order(self._settings["seed"], ids)
        ids = [ids[place] for place in order]
        for previous, this, place in zip(ids, ids[1:], order[1:], strict=False):
            if previous == this:  # Equal ids hash alike, so they stand side by side.
                raise StageError(
                    f"{self._spec}: the id {this.decode()!r} stands twice, the second time at "
                    f"index {indices[place]}; ids must be unique"
                )
        secs["compute"] += time.perf_counter() - started
        for first in range(0, len(ids), _RECORDS_AT_A_TIME):
            started = time.perf_counter()
            chunk = slice(first, first + _RECORDS_AT_A_TIME)
            images, labels = source.read(indices[order[chunk]])
            read = time.perf_counter()
            encoded = [
                examples.encode(record_id, image.tobytes(), label)
                for record_id, image, label in zip(ids[chunk], images, labels.tolist(), strict=True)
            ]
            secs["read"] += read - started
            secs["compute"] += time.perf_counter() - read
            yield from encoded


def _check_settings(source: sources.Source, settings: dict[str, Any]) -> None:
    """Raises a UsageError for settings that this source cannot have."""
    num_shards, num_records = settings["num_shards"], sum(source.split_sizes.values())
    if num_shards > num_records:
        raise UsageError(
            f"--num_shards={num_shards}: more shards than the {num_records} records; "
            f"expected 1 to {num_records}"
        )
    limit = 1 - placement.TEST_FRACTION if placement.UNSPLIT in source.split_sizes else 1
    if not 0 <= settings["validation_fraction"] < limit:
        raise UsageError(
            f"--validation_fraction={settings['validation_fraction']}: expected 0 ≤ fraction < "
            f"{limit}, so that records are left for train"
        )


def write_shards(
    *,
    spec: str,
    output_dir: str,
    name: str,
    num_shards: int,
    validation_fraction: float,
    seed: int,
    overwrite: bool,
    options: PipelineOptions,
) -> dict[str, Any]:
    """Turns an image set into a finished data set directory.

    Args:
      spec: the source, `sample` or `idx:DIR`.
      output_dir: local path or fsspec URL.
      name: the data set's name; shard files begin with it.
      num_shards: shards per split.
      validation_fraction: share of train that goes to validation.
      seed: of the order of the records.
      overwrite: whether output of other inputs may be replaced.
      options: Beam's.

    Returns:
      The manifest, with the key "reused" where nothing had to be done.

    Raises:
      StageError: the source or the output directory cannot be used.
    """
    source = sources.open_source(spec)
    settings = {
        "name": name,
        "num_shards": num_shards,
        "validation_fraction": validation_fraction,
        "seed": seed,
    }
    _check_settings(source, settings)
    made_from = {"source_fingerprint": source.fingerprint(), **settings}
    splits = placement.splits_made(list(source.split_sizes), validation_fraction)
    keys = [(split, shard) for split in splits for shard in range(num_shards)]
    tasks = [shards.shard_name(name, split, shard, num_shards) for split, shard in keys]
    info_names = ["dataset_info.json", "features.json"]

    output = OutputDirectory(output_dir, stage="preprocess", made_from=made_from)
    with output.opened([*tasks, *info_names], overwrite=overwrite) as finished:
        if finished is not None:
            return {**finished, "reused": True}

        num_records = sum(source.split_sizes.values())
        blocks = [
            (first, min(first + _BLOCK_SIZE, num_records))
            for first in range(0, num_records, _BLOCK_SIZE)
        ]

        def build(pipeline: beam.Pipeline) -> None:
            assigned = (
                pipeline
                | "Blocks" >> beam.Create(blocks, reshuffle=True)  # (first, last + 1)
                | "AssignShards" >> beam.ParDo(AssignShards(spec, settings))
            )
            # A shard that no record falls into is a file too, with nothing in it.
            every = pipeline | "EveryShard" >> beam.Create([(key, b"") for key in keys])
            _ = (
                (assigned, every)
                | beam.Flatten()
                | "GroupByShard" >> beam.GroupByKey()  # ((split, shard), [indices])
                | "WriteShard" >> beam.ParDo(WriteShard(spec, settings, output))
            )

        progress = Progress("preprocess", total=len(tasks), unit="shards")
        beam_runner.run(build, options, progress=progress, count_done=output.num_done)
        return _finish(source, output, tasks, splits, num_records)


def _finish(
    source: sources.Source,
    output: OutputDirectory,
    tasks: list[str],
    splits: list[str],
    num_read: int,
) -> dict[str, Any]:
    """Reconciles the counts, and writes the description files and the manifest."""
    markers = dict(zip(tasks, output.markers(tasks), strict=True))
    entries = [entry for marker in markers.values() for entry in marker["entries"]]
    by_split = {split: [e for e in entries if e["split"] == split] for split in splits}
    num_written = sum(entry["num_examples"] for entry in entries)
    if num_read != num_written:
        raise StageError(
            f"{output.directory}: {num_read} records read, {num_written} written; expected all "
            "of them: run the same command again"
        )
    described = shards.tfds_files(
        name=output.made_from["name"], image_shape=source.image_shape, splits=by_split
    )
    files = entries + [
        stage.write_file(output.directory, name, data) for name, data in described.items()
    ]
    identity = {
        "format_version": stage.FORMAT_VERSION,
        "made_from": output.made_from,
        "files": files,
    }
    return output.finish(
        {
            "dataset_id": stage.content_id(identity),
            "name": output.made_from["name"],
            "image_shape": list(source.image_shape),
            "class_names": list(source.class_names),
            "splits": {
                split: sum(entry["num_examples"] for entry in part)
                for split, part in by_split.items()
            },
            "records": {"read": num_read, "written": num_written},
            "files": files,
        },
        markers,
    )
