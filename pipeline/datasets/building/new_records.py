"""Finds the records of a source that a finished data set does not hold.

The command looks up the ids of the source in the set's indexes, and reads no shard. An image of the
source is read only if the set holds its id, to check that both are the same record; workers do
this, and the records of files that have not changed are passed over.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli.progress import Progress
from pipeline.datasets import index, placement
from pipeline.runners import run as runner
from pipeline.sources import conversion
from pipeline.stages import quarantine
from pipeline.stages.tasks import Tasks
from pipeline.storage import files

# Records whose ids are hashed at once, and records that a worker compares.
_BLOCK_SIZE = 65_536
_COMPARED_AT_ONCE = 8_192
_KNOWN_DTYPE = np.dtype([("source", "<i8"), ("image", "<u8", (2,)), ("label", "<i8")])


class Comparison(NamedTuple):
    """The records of a source, as far as a data set holds them."""

    id_hashes: np.ndarray  # uint64 (n, 2): of all records of the source
    new: np.ndarray  # int64: records that the set does not hold
    changed: np.ndarray  # int64: records that the set holds with another image or label
    places: index.Places  # of all records of the source
    is_barred: np.ndarray  # bool (n,): records that were removed from the set, and stay out

    @property
    def num_existing(self) -> int:
        """Number of records that are not new."""
        return len(self.id_hashes) - len(self.new)


def find(
    source: conversion.ConvertedSource,
    *,
    base: Mapping[str, Any],
    indexes: index.Indexes,
    barred: np.ndarray,
    tasks: Tasks,
    options: PipelineOptions,
    reuse_results: bool = True,
) -> Comparison:
    """Finds the records of a source that a data set does not hold.

    Args:
      source: the open source.
      base: the data set's manifest.
      indexes: of the data set.
      barred: hashes of ids that were removed from the set, uint64 (k, 2).
      tasks: of the data set's directory, which this process holds.
      options: Beam's.
      reuse_results: whether to take over comparisons of a killed try.

    Raises:
      index.Damaged: an index is missing or damaged.
      StageError: the source cannot be read.
    """
    hashes = id_hashes(source, base["made_from"]["seed"])
    places = indexes.find(hashes)
    is_new = places.shards < 0
    is_barred = is_new & index.are_among(hashes, barred)
    new = np.flatnonzero(is_new & ~is_barred)
    new = np.setdiff1d(new, _still_unreadable(source, new, _quarantined(tasks.directory, base)))
    known = np.flatnonzero(~is_new)
    known = known[~source.trusted(known)]
    changed = np.empty(0, np.int64)
    if len(known):
        rows = indexes.rows(index.Places(places.shards[known], places.positions[known]))
        changed = _changed(
            source, known, rows, base=base, tasks=tasks, options=options, reuse=reuse_results
        )
    return Comparison(hashes, new, changed, places, is_barred)


def id_hashes(source: conversion.ConvertedSource, seed: int) -> np.ndarray:
    """Hashes of the ids of all records of a source, uint64 (n, 2)."""
    hashes = [np.empty((0, 2), np.uint64)]
    for first in range(0, source.num_records, _BLOCK_SIZE):
        block = np.arange(first, min(first + _BLOCK_SIZE, source.num_records))
        hashes.append(placement.id_hashes(seed, source.ids(block)))
    return np.concatenate(hashes)


def _quarantined(directory: str, base: Mapping[str, Any]) -> frozenset[bytes]:
    """The ids in a data set's quarantine."""
    return frozenset(
        fault["id"].encode() for fault in quarantine.read_all(directory, base["files"])
    )


def _still_unreadable(
    source: conversion.ConvertedSource, new: np.ndarray, quarantined: frozenset[bytes]
) -> np.ndarray:
    """The records in the set's quarantine that are still unreadable."""
    if not quarantined:
        return np.empty(0, np.int64)
    ids = source.ids(new)
    listed = new[[i for i, record_id in enumerate(ids) if record_id in quarantined]]
    step = source.for_workers().records_at_a_time
    faulty = [np.empty(0, np.int64)]
    for first in range(0, len(listed), step):
        faults = source.read(listed[first : first + step]).faults
        faulty.append(listed[[first + place for place, _ in faults]])
    return np.concatenate(faulty)


def split_counts(
    source: conversion.ConvertedSource, indices: np.ndarray, validation_fraction: float
) -> dict[str, int]:
    """Split of the data set -> number of the records at `indices`."""
    counts: dict[str, int] = {}
    for source_split, split_indices in source.by_source_split(indices):
        for first in range(0, len(split_indices), _BLOCK_SIZE):
            ids = source.ids(split_indices[first : first + _BLOCK_SIZE])
            splits = placement.splits_of(source_split, ids, validation_fraction)
            for name, count in zip(*np.unique(splits, return_counts=True), strict=True):
                counts[str(name)] = counts.get(str(name), 0) + int(count)
    return counts


class _Compare(beam.DoFn):
    """Name of a file of known records -> a file with those that the source has otherwise."""

    def __init__(self, source_spec: conversion.SourceSpec, tasks: Tasks):
        """`tasks` of the data set's directory."""
        self._source_spec, self._tasks = source_spec, tasks

    def process(self, name: str) -> None:
        """Takes the name of a file; yields nothing."""
        known = np.load(io.BytesIO(files.read_bytes(self._tasks.path(name))))
        source = conversion.open_converted(self._source_spec)
        step = self._source_spec.records_at_a_time
        is_same = np.zeros(len(known), bool)  # An unreadable image is another one.
        for first in range(0, len(known), step):
            expected = known[first : first + step]
            records = source.read(expected["source"])
            readable = expected[records.places]
            is_same[first + records.places] = (readable["label"] == records.labels) & (
                readable["image"] == index.image_hashes(records.images)
            ).all(axis=1)
        _save(self._tasks, _result_of(name), known["source"][~is_same])


def _save(tasks: Tasks, name: str, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    files.write_bytes(tasks.path(name), buffer.getvalue())


def _result_of(name: str) -> str:
    return name.replace("known", "changed")


def _changed(
    source: conversion.ConvertedSource,
    known: np.ndarray,
    rows: np.ndarray,
    *,
    base: Mapping[str, Any],
    tasks: Tasks,
    options: PipelineOptions,
    reuse: bool,
) -> np.ndarray:
    """The records that differ from the rows of the index, int64, in order."""
    expected = np.empty(len(known), _KNOWN_DTYPE)
    expected["source"], expected["image"], expected["label"] = known, rows["image"], rows["label"]
    # A result stays valid for a later try with the same records of the same source.
    spec = source.for_workers()
    state = f"{base['dataset_id']} {source.fingerprint()}".encode() + expected.tobytes()
    prefix = f"known-{hashlib.sha256(state).hexdigest()[:16]}"
    files.make_dirs(tasks.path())
    existing = set(files.list_names(tasks.path())) if reuse else set()
    names = []
    for number, first in enumerate(range(0, len(known), _COMPARED_AT_ONCE)):
        names.append(f"{prefix}-{number:05d}.npy")
        if _result_of(names[-1]) not in existing:
            _save(tasks, names[-1], expected[first : first + _COMPARED_AT_ONCE])
    work = [name for name in names if _result_of(name) not in existing]
    compare = _Compare(spec, tasks)

    def build(pipeline: beam.Pipeline) -> None:
        _ = (
            pipeline
            | "Known" >> beam.Create(work, reshuffle=True)
            | "Compare" >> beam.ParDo(compare)
        )

    def num_compared() -> int:
        return sum(name.startswith("changed-") for name in files.list_names(tasks.path()))

    if work:
        progress = Progress("preprocess: comparing", total=len(names), unit="parts")
        runner.run(build, options, progress=progress, count_done=num_compared)
    return np.concatenate([load_indices(tasks, _result_of(name)) for name in names])


def save_blocks(tasks: Tasks, indices: np.ndarray) -> Iterator[str]:
    """Writes indices of records to files; yields their names, for `load_indices`."""
    for number, first in enumerate(range(0, len(indices), _BLOCK_SIZE)):
        name = f"new-{number:05d}.npy"
        _save(tasks, name, indices[first : first + _BLOCK_SIZE].astype("<i8"))
        yield name


def load_indices(tasks: Tasks, name: str) -> np.ndarray:
    """The int64 indices in a file of `save_blocks`."""
    return np.load(io.BytesIO(files.read_bytes(tasks.path(name))))
