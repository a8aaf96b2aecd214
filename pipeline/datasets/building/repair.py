"""Mends a data set: from its own files, and from a source that still has lost records.

Functions of the shards are made anew. Where records are lost and no source is at hand, the data set
goes back to what it was before its last append; sources bring the records again.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli.errors import StageError
from pipeline.cli.progress import Progress
from pipeline.datasets import index, placement, reader
from pipeline.datasets.building import new_records, restore, taken
from pipeline.datasets.building.source_records import SourceRecords
from pipeline.formats import tfrecord
from pipeline.runners import run as runner
from pipeline.sources import conversion
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.stages.contracts import FileEntry, is_shard
from pipeline.stages.output_directory import OutputDirectory
from pipeline.storage import files


class Repaired(NamedTuple):
    """What a repair has done."""

    manifest: dict[str, Any]
    went_back: bool  # Whether the set is what it was before its last append.
    set_aside: list[str]  # Files that are in lost/ now.
    num_set_aside: int  # Intact records in them.


def repair(output: OutputDirectory, options: PipelineOptions) -> Repaired:
    """Mends a data set from its own files.

    Args:
      output: the data set's directory.
      options: Beam's.

    Raises:
      StageError: there is no such data set, or its own files do not suffice.
    """
    directory = output.directory
    _readable(directory)  # Before the lock leaves its file in the directory.
    with output.locked(torn=True):
        manifest, previous = _readable(directory)
        lost = _lost(directory, manifest["files"]) if manifest else [manifest_lib.MANIFEST]
        if lost:
            if not previous or _lost(directory, previous["files"]):
                raise StageError(f"--repair: {directory}: {lost_text(lost)}")
            output.go_back(previous)
            manifest = previous
        strays = _strays(output, manifest)
        # If both are equal and no append is unfinished, an earlier repair was killed.
        went_back = strays is not None and manifest == previous
        shape = tuple(manifest["image_shape"])
        num_set_aside = sum(_num_intact(directory, name, shape) for name in strays or ())
        output.set_aside(strays or ())
        manifest = restore.complete(output, manifest, options=options, checks_all=True)
        output.forget_finished(manifest)
        if went_back:
            output.forget_previous()
    return Repaired(manifest, went_back, strays or [], num_set_aside)


def lost_text(names: Sequence[str]) -> str:
    """What is lost, and what to do; `names` are files that are no functions of the shards."""
    more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
    text = f"missing or damaged: {', '.join(names[:3])}{more}; "
    if any(map(index.is_barred, names)):
        return text + (
            "no command can make the list of removed ids anew: restore the file from a copy of the "
            "data set, or make the set again with --overwrite and repeat all removals"
        )
    return text + (
        "expected intact files: append the source of their records with python -m "
        f"pipeline.preprocess --append --reread, go back to {manifest_lib.PREVIOUS}, if there is "
        "an intact one, with python -m pipeline.verify --repair, or make the set again with "
        "--overwrite"
    )


def _readable(directory: str) -> tuple[Any, Any]:
    """The manifest and the one before the last append; None for one that cannot be read."""
    if not files.is_dir(directory):
        raise StageError(f"--repair: {directory}: no such directory; expected a data set")
    manifest, previous = None, manifest_lib.previous_of(directory)
    with contextlib.suppress(StageError):
        manifest = manifest_lib.manifest_of(directory)
    if not (manifest or previous):
        raise StageError(
            f"--repair: {directory}: {manifest_lib.MANIFEST} is missing or damaged, and there is "
            f"no intact {manifest_lib.PREVIOUS}; run the command that made the directory again, "
            "with --overwrite if it asks for that"
        )
    stage = (manifest or previous)["stage"]
    if stage != "preprocess":
        raise StageError(
            f"--repair: {directory}: is output of stage {stage!r}; expected a data set: run the "
            "command that made the directory again, which makes damaged files anew"
        )
    return manifest, previous


def _lost(directory: str, entries: Iterable[FileEntry]) -> list[str]:
    """The missing and damaged files that are no functions of the shards."""
    kept = [entry for entry in entries if not restore.is_made_anew(entry["name"])]
    intact = files.each(directory, lambda e: manifest_lib.intact_entry(directory, e), kept)
    return [e["name"] for e, is_intact in zip(kept, intact, strict=True) if not is_intact]


def _strays(output: OutputDirectory, manifest: Mapping[str, Any]) -> list[str] | None:
    """The files of the set that the manifest does not name; None if a job is unfinished."""
    try:
        job = output.tasks.job()
    except StageError:
        files.remove(output.tasks.path())  # The append begins again.
        job = None
    if job:
        return None
    listed = {entry["name"] for entry in manifest["files"]}
    return [n for n in output.owned_files() if n not in listed and not taken.is_of_source(n)]


def _num_intact(directory: str, name: str, image_shape: tuple[int, ...]) -> int:
    """The number of intact records in a file; 0 for one that is no shard."""
    if ".tfrecord-" not in name or name.startswith(quarantine.DIRECTORY):
        return 0
    path = files.join(directory, name)
    items = reader.parse_records(files.read_bytes(path), path, image_shape)
    return sum(not isinstance(item, tfrecord.Fault) for item in items)


def from_source(
    output: OutputDirectory,
    base: Mapping[str, Any],
    lost: Sequence[FileEntry],
    source: conversion.ConvertedSource,
    options: PipelineOptions,
) -> list[FileEntry]:
    """Writes lost files again, as far as a source has all of their records.

    A file is written only if its bytes have the sha256 in the manifest.

    Args:
      output: the data set's directory, which this process holds.
      base: its manifest.
      lost: entries of missing and damaged files that are no functions of the shards.
      source: the open source.
      options: Beam's.

    Returns:
      The entries of the files that stay lost.
    """
    directory, seed = output.directory, base["made_from"]["seed"]
    indexes = index.Indexes(directory, base["files"])
    hashes = new_records.id_hashes(source, seed)
    groups = list(_groups(indexes, base, source, hashes)) if lost else []
    if shards := list(_records_of(filter(is_shard, lost), indexes, hashes, groups)):
        print("preprocess: writes lost shards again", file=sys.stderr, flush=True)
        write = _WriteShard(source.for_workers(), seed, directory)

        def build(pipeline: beam.Pipeline) -> None:
            work = pipeline | "Lost" >> beam.Create(shards, reshuffle=True)
            _ = work | "WriteShard" >> beam.ParDo(write)

        progress = Progress("preprocess: lost shards", total=len(shards), unit="shards")
        runner.run(build, options, progress=progress, count_done=lambda: 0)
    for entry in lost:
        if "num_quarantined" in entry:
            _write_list(directory, entry, source, seed, groups)
    files.sync(files.join(directory, quarantine.DIRECTORY))
    names = _lost(directory, lost)
    return [entry for entry in lost if entry["name"] in names]


def _groups(
    indexes: index.Indexes,
    base: Mapping[str, Any],
    source: conversion.ConvertedSource,
    hashes: np.ndarray,
) -> Iterator[tuple[str, np.ndarray]]:
    """(split, indices) of records that no index holds, as a job may have put them in a shard.

    The number of shards of that job is one of those in `made_from`; each is tried.
    """
    made_from = base["made_from"]
    is_held = np.zeros(len(hashes), bool)
    with contextlib.suppress(StageError):  # Damaged.
        is_held |= index.are_among(hashes, index.read_barred(indexes.directory, base["files"]))
    for shard in indexes.shards:
        if (shard_index := indexes.read(shard)) is not None:
            is_held |= shard_index.positions_of_ids(hashes) >= 0
    parts = [part["num_shards"] for part in made_from.values() if "num_shards" in _object(part)]
    counts = sorted({item for part in parts for item in part.items()})
    for source_split, indices in source.by_source_split(np.flatnonzero(~is_held)):
        ids = source.ids(indices)
        splits = placement.splits_of(source_split, ids, made_from["validation_fraction"])
        for split, num_shards in counts:
            numbers = hashes[indices][:, 0] % np.uint64(num_shards)
            for number in np.unique(numbers[splits == split]).tolist():
                yield split, indices[(splits == split) & (numbers == number)]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _records_of(
    lost: Iterable[FileEntry],
    indexes: index.Indexes,
    hashes: np.ndarray,
    groups: Iterable[tuple[str, np.ndarray]],
) -> Iterator[tuple[FileEntry, bytes]]:
    """(lost shard, indices of records in the source that may be the shard's).

    The index of a shard names its records. If the index is lost, too, each group is tried.
    """
    order = np.argsort(hashes[:, 0])
    for shard in lost:
        shard_index = indexes.read(shard)
        if shard_index is None:
            for split, indices in groups:
                if split == shard["split"] and len(indices) >= shard["num_examples"]:
                    yield shard, indices.astype("<i8").tobytes()
            continue
        places = index.places_in(hashes[order], shard_index.ids)
        if (places >= 0).all():
            yield shard, order[places].astype("<i8").tobytes()


class _OtherRecords(Exception):
    """A source has other records than a shard."""


class _WriteShard(beam.DoFn):
    """(shard, int64 indices as little-endian bytes) -> the shard's file, if its bytes are right."""

    def __init__(self, source_spec: conversion.SourceSpec, seed: int, directory: str):
        """`seed` and `directory` are the data set's."""
        self._source_spec, self._seed, self._directory = source_spec, seed, directory

    def process(self, element: tuple[FileEntry, bytes]) -> None:
        """Writes one shard; yields nothing."""
        (shard, data), name = element, element[0]["name"]
        indices = np.frombuffer(data, "<i8")
        records = SourceRecords(self._source_spec, self._seed, name, indices)
        with contextlib.suppress(_OtherRecords):
            with manifest_lib.writing(self._directory, name) as file:
                tfrecord.write(file, name, (r for b in records.batches() for r in b.encoded))
                if file.entry()["sha256"] != shard["sha256"]:
                    raise _OtherRecords


def _write_list(
    directory: str,
    entry: FileEntry,
    source: conversion.ConvertedSource,
    seed: int,
    groups: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes a lost list of quarantined records again, if one of the groups has them."""
    for split, indices in groups:
        if split == entry["of_split"]:
            records = SourceRecords(source.for_workers(), seed, "", indices)
            for _ in records.batches():  # A source may hold new records, too.
                pass
            data = quarantine.to_bytes(records.faults)
            if hashlib.sha256(data).hexdigest() == entry["sha256"]:
                manifest_lib.write_file(directory, entry["name"], data)
                return
