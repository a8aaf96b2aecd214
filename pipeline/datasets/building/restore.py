"""Makes files of a finished data set anew that are missing or damaged.

Indexes, statistics, duplicates and pages are functions of the shards. Sets of earlier versions have
not all of them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli.progress import Progress
from pipeline.datasets import index
from pipeline.datasets.building import finish
from pipeline.datasets.profile import describe, drift, duplicates, measures
from pipeline.datasets.profile.statistics import Statistics
from pipeline.runners import run as runner
from pipeline.stages import gate
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import FileEntry
from pipeline.stages.output_directory import OutputDirectory
from pipeline.storage import files as files_lib

_T = TypeVar("_T")


def with_indexes(
    output: OutputDirectory,
    base: dict[str, Any],
    options: PipelineOptions,
    work: Callable[[dict[str, Any]], _T],
) -> tuple[dict[str, Any], _T]:
    """Calls a function of the manifest, once more if an index proves to be damaged.

    Returns:
      The manifest, with the entries of files that were made anew, and the function's result.
    """
    base = complete(output, base, options=options)
    try:
        return base, work(base)
    except index.Damaged as error:
        base = complete(output, base, options=options, damaged=error.shards)
    return base, work(base)


def complete(
    output: OutputDirectory,
    base: dict[str, Any],
    *,
    options: PipelineOptions,
    damaged: Sequence[FileEntry] = (),
    checks_all: bool = False,
) -> dict[str, Any]:
    """Makes what a data set lacks; the shards stay.

    Args:
      output: the data set's directory, which this process holds.
      base: its manifest.
      options: Beam's.
      damaged: entries of the shards whose indexes are damaged. Those that the manifest does not
        name are made anyway.
      checks_all: whether to look at all indexes, and at the pages and metadata of the set, too. An
        append writes the latter anyway.

    Returns:
      The manifest, written anew if entries have changed.

    Raises:
      StageError: a shard or a quarantine list is damaged.
    """
    files = {entry["name"]: entry for entry in base["files"]}
    indexes = index.Indexes(output.directory, base["files"])
    had_none = not any(index.entry_of(files, shard) for shard in indexes.shards)
    splits = [
        split
        for split in base["splits"]
        if describe.kept_statistics(output.directory, files, split) is None
    ]
    has_duplicates = output.is_complete([files[duplicates.FILE]])
    if checks_all or not has_duplicates:  # Duplicates are made from all indexes.
        damaged = [
            shard
            for shard in indexes.shards
            if (entry := index.entry_of(files, shard)) is None or not output.is_complete([entry])
        ]
    damaged_names = {shard["name"] for shard in damaged}
    shards = [
        shard
        for shard in indexes.shards
        if shard["name"] in damaged_names
        or shard["split"] in splits
        or index.file_name(shard["name"]) not in files
    ]
    made = _describe(output, base, shards, splits, options) if shards else []
    files |= {entry["name"]: entry for entry in made}
    # Earlier versions made neither indexes, nor this file with labels.
    if not has_duplicates or (shards and had_none):
        indexes = index.Indexes(output.directory, files.values())
        counts = finish.write_duplicates(output.directory, indexes, is_new=lambda shard: True)
        made.append(counts.entry)
        files[duplicates.FILE] = counts.entry
    if checks_all:
        output.forget_previous(damaged=True)
        names = [n for n in finish.NAMES if n in files and not output.is_complete([files[n]])]
        if names:
            print(f"preprocess: makes {', '.join(names)} anew", file=sys.stderr, flush=True)
            described = _describe_set(output, base, files)
            made += described
            files |= {entry["name"]: entry for entry in described}
    if not made:
        return base
    return output.replace_manifest({**base, "files": list(files.values())})


def _describe_set(
    output: OutputDirectory, base: Mapping[str, Any], files: Mapping[str, FileEntry]
) -> list[FileEntry]:
    """Makes the files that describe the whole set; their entries.

    All are made, so that those of an earlier version are not mixed with those of this one.
    """
    directory = output.directory
    contents, _ = finish.describe_set(
        directory,
        name=base["name"],
        dataset_id=base["dataset_id"],
        image_shape=tuple(base["image_shape"]),
        class_names=base["class_names"],
        num_shards=base["num_shards"],
        compression=base["made_from"]["compression"],
        entries=list(files.values()),
        statistics={
            split: describe.kept_statistics(directory, files, split) for split in base["splits"]
        },
        counts=finish.read_duplicates(directory, files),
        comparison=base.get("drift"),
        is_rejected="rejected" in base,
    )
    return [manifest_lib.write_file(directory, name, data) for name, data in contents.items()]


def judge(
    output: OutputDirectory,
    base: Mapping[str, Any],
    requirements: Sequence[gate.Requirement],
    reference: drift.Profile | None = None,
) -> dict[str, Any]:
    """Compares a finished, complete data set with a reference, and applies bounds to it.

    A set that was rejected is so no more if it keeps the bounds. Another set stays what it is.

    Args:
      output: the data set's directory, which this process holds.
      base: its manifest.
      requirements: the bounds.
      reference: what all records of the set are compared with.

    Returns:
      The manifest, written anew if it has changed.

    Raises:
      gate.Rejected: a bound does not hold; or the set was rejected, and there are no bounds.
    """
    directory, manifest, failed = output.directory, dict(base), []
    files = {entry["name"]: entry for entry in base["files"]}
    if reference:
        manifest["drift"] = drift.compare(drift.read(directory, base), reference)
    if "drift" in manifest:
        drift.observe(manifest["drift"])
    if requirements:
        splits = drift.summaries(directory, base["files"])
        counts = finish.read_duplicates(directory, files)
        metrics = measures.measures(splits, counts, base["records"])
        failed = gate.failures(requirements, metrics, lacking="labels")
        if not failed:
            manifest.pop("rejected", None)
    if manifest != base:
        described = _describe_set(output, manifest, files)
        names = {entry["name"] for entry in described}
        others = [entry for name, entry in files.items() if name not in names]
        place = list(files).index(drift.STATISTICS)  # As `finish.publish` orders the files.
        manifest["files"] = [*others[:place], *described, *others[place:]]
        manifest = output.replace_manifest(manifest)
        output.forget_finished(manifest)  # Waits for the disk.
    if failed:
        remedy = "the set was accepted before and stays so: look at the source, or set other bounds"
        if "rejected" in base:
            remedy = gate.REMEDY
        raise gate.Rejected(
            f"--require: {', '.join(failed)} does not hold for the data set in {directory}; "
            f"{remedy}",
            gate.warnings(manifest),
        )
    gate.refuse(directory, manifest)
    return manifest


def _describe(
    output: OutputDirectory,
    base: Mapping[str, Any],
    shards: Sequence[FileEntry],
    splits: Sequence[str],
    options: PipelineOptions,
) -> list[FileEntry]:
    """Makes the indexes of some shards and the statistics of some splits; their entries."""
    print(
        f"preprocess: makes what is missing or damaged of the indexes and statistics of "
        f"{len(shards)} shards",
        file=sys.stderr,
        flush=True,
    )
    directory, scratch = output.directory, output.tasks.path("restore")
    work = describe.DescribeShard(directory, tuple(base["image_shape"]), base["made_from"]["seed"])

    def build(pipeline: beam.Pipeline) -> None:
        _ = (
            pipeline
            | "Shards" >> beam.Create(shards, reshuffle=True)
            | "DescribeShard" >> beam.ParDo(work)
            | "WriteStatistics" >> describe.WriteStatistics(scratch)
        )

    names = [index.file_name(shard["name"]) for shard in shards]
    for path in (scratch, files_lib.join(directory, index.DIRECTORY)):
        files_lib.make_dirs(path)
    progress = Progress("preprocess: indexes", total=len(shards), unit="shards")
    runner.run(build, options, progress=progress, count_done=lambda: 0)
    entries = [
        manifest_lib.file_entry(name, files_lib.read_bytes(files_lib.join(directory, name)))
        for name in names
    ]
    for split in splits:
        total = describe.read_statistics(scratch, split) or Statistics(base["image_shape"])
        name = index.statistics_name(split)
        entries.append(manifest_lib.write_file(directory, name, total.to_bytes()))
    files_lib.remove(scratch)
    return entries


def is_made_anew(name: str) -> bool:
    """Whether a file of a data set is a function of the shards."""
    is_index = name.startswith(f"{index.DIRECTORY}/") and not index.is_barred(name)
    return is_index or name in finish.NAMES
