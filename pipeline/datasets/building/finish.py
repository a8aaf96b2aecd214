"""The end of a job on a data set: reconciles counts, describes the set, writes the manifest."""

import collections
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.cli import metrics_file
from pipeline.cli.errors import StageError
from pipeline.datasets import croissant, index, reader, tfds_metadata
from pipeline.datasets.building import rewriting
from pipeline.datasets.building.rewriting import NOTHING_REMOVED, Removed
from pipeline.datasets.building.shard_writer import Layout
from pipeline.datasets.profile import describe, drift, duplicates, measures
from pipeline.datasets.profile import page as stats_page
from pipeline.datasets.profile import warnings as set_warnings
from pipeline.datasets.profile.statistics import Statistics
from pipeline.sources import conversion
from pipeline.stages import gate, quarantine
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import FileEntry, is_shard
from pipeline.stages.output_directory import OutputDirectory

_PAGE = "stats.html"
# Files that describe the whole set, without the manifest and the statistics of splits.
NAMES = (drift.STATISTICS, duplicates.FILE, _PAGE, croissant.FILE, *tfds_metadata.NAMES)
# Sample images on the page for each split.
_NUM_SAMPLES = 48
# Number of quarantine reasons that are listed.
_MAX_REASONS = 20


def descriptions(splits: Collection[str]) -> list[str]:
    """All files that describe the whole set: each job writes them anew."""
    return [*NAMES, *map(index.statistics_name, splits)]


def finish_dataset(
    *,
    source: conversion.ConvertedSource,
    layout: Layout,
    output: OutputDirectory,
    max_quarantined: quarantine.Limit,
    base: Mapping[str, Any] | None = None,
    num_existing: int = 0,
    num_changed: int = 0,
    removed: Removed = NOTHING_REMOVED,
    requirements: Sequence[gate.Requirement] = (),
    reference: drift.Profile | None = None,
) -> dict[str, Any]:
    """Describes a set with the records of a source, and writes its manifest.

    Args:
      source: the source that was read.
      layout: the shards that were written.
      output: the output directory.
      max_quarantined: limit on unreadable records.
      base: the manifest of the data set that was appended to.
      num_existing: records of the source that were skipped because `base` holds them.
      num_changed: how many of these have another image or label in the source.
      removed: the records of `base` that were replaced.
      requirements: bounds on the whole set; see `publish`.
      reference: what the records of this job are compared with.

    Returns:
      The manifest as written.

    Raises:
      gate.Rejected: see `publish`.
      StageError: a shard failed, records are missing, or too many are unreadable.
      SourceChanged: the source has changed.
    """
    tasks = [*layout.tasks(), *removed.rewritten.values()]
    markers = dict(zip(tasks, output.tasks.markers(tasks), strict=True))
    new = [entry for task in layout.tasks() for entry in markers[task]["entries"]]
    written = sum(entry.get("num_examples", 0) for entry in new)
    quarantined = sum(entry.get("num_quarantined", 0) for entry in new)
    metrics_file.observe_records(written=written, quarantined=quarantined, existing=num_existing)
    quarantine.check(
        max_quarantined,
        quarantine.read_all(output.directory, new),
        num_quarantined=quarantined,
        num_records=source.num_records,
    )
    counts = {"read": source.num_records, "written": written, "quarantined": quarantined}
    if source.num_records != written + quarantined + num_existing:
        raise StageError(
            f"{output.directory}: {source.num_records} records read, but {written} written + "
            f"{quarantined} quarantined + {num_existing} already in the data set; expected the sum "
            "to match: run the same command again"
        )
    ignored = {"ignored": dict(source.ignored)} if source.ignored else {}
    total = {**counts, **ignored}
    further: dict[str, Any] = {}
    if base:
        added = {key: base["records"][key] + count for key, count in counts.items()}
        total = {**base["records"], **added, "read": added["read"] - num_existing}
        num_removed = removed.num_records  # Replaced, so read and written again.
        for key in ("read", "written"):
            total[key] -= num_removed
        last = {**counts, "there": num_existing, **ignored}
        if num_changed:
            last["changed"] = num_changed
        further["last_append"] = last
    if reference:
        further["drift"] = _drift(output, new, layout.num_shards, source, reference)
    try:
        return publish(
            output,
            name=layout.name,
            image_shape=source.image_shape,
            class_names=list(source.class_names),
            num_in_names=layout.num_in_names,
            markers=markers,
            base=base,
            removed=removed,
            records=total,
            further=further,
            requirements=requirements,
            dropped=rewriting.dropped_names(removed.rewritten),
            check=source.check_unchanged,
        )
    except gate.Rejected:
        metrics_file.observe_records(written=0, rejected=written)
        raise


def _drift(
    output: OutputDirectory,
    new: Sequence[FileEntry],
    splits: Collection[str],
    source: conversion.ConvertedSource,
    reference: drift.Profile,
) -> dict[str, Any]:
    """Compares the records in the new shards, of these splits, with a reference."""
    parts = {s: describe.read_statistics(describe.job_directory(output.tasks), s) for s in splits}
    summaries = {s: p.summary(list(source.class_names)) for s, p in parts.items() if p}
    shards = [entry for entry in new if is_shard(entry)]
    current = drift.profile(output.directory, shards, summaries, source.image_shape)
    comparison = drift.compare(current, reference)
    drift.observe(comparison)
    return comparison


def publish(
    output: OutputDirectory,
    *,
    name: str,
    image_shape: Sequence[int],
    class_names: list[str],
    num_in_names: Mapping[str, int],
    markers: Mapping[str, Mapping[str, Any]],
    base: Mapping[str, Any] | None,
    removed: Removed,
    records: Mapping[str, Any],
    further: Mapping[str, Any],
    requirements: Sequence[gate.Requirement] = (),
    files: Sequence[FileEntry] = (),
    dropped: Collection[str] = (),
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Describes a data set as it is now, and writes its manifest.

    A new set that breaks a bound is written, and its manifest has the key "rejected".

    Args:
      output: the output directory.
      name: the data set's name.
      image_shape: (H, W, C).
      class_names: class_names[i] is the name of label i.
      num_in_names: split -> number of shards in the file names of the first job.
      markers: new shard -> its marker.
      base: the manifest of the set before this job; None of a new set.
      removed: records that are not in the set any more.
      records: the account of the whole set.
      further: further keys of the manifest.
      requirements: bounds on the set.
      files: entries of further files, already written.
      dropped: files of the set that go with this job.
      check: called before the manifest is written; raises if the job must not succeed.

    Returns:
      The manifest as written.

    Raises:
      gate.Rejected: the set of `base` breaks a bound with the new records; no file that `base`
        lists has changed.
    """
    directory = output.directory
    old_files = {entry["name"]: entry for entry in base["files"]} if base else {}
    gone = {*dropped, *descriptions(base["splits"] if base else ())}
    entries = [entry for entry in old_files.values() if entry["name"] not in gone]
    entries += [entry for marker in markers.values() for entry in marker["entries"]]
    indexes = index.Indexes(directory, entries)
    new_shards = markers.keys() - set(removed.rewritten.values())
    by_split = indexes.by_split()
    num_shards = {s: num_in_names.get(s) or base["num_shards"][s] for s in by_split}

    earlier_duplicates, statistics = [], {}
    if base:  # `restore` has made sure that these files are the manifest's.
        duplicates_entry = old_files[duplicates.FILE]
        earlier_duplicates = manifest_lib.read_file(directory, duplicates_entry).splitlines(True)
    for split in by_split:
        total = Statistics(image_shape)
        if base and split in base["splits"]:
            total += describe.kept_statistics(directory, old_files, split)
        if part := describe.read_statistics(describe.job_directory(output.tasks), split):
            total += part
        if split in removed.statistics:
            total -= removed.statistics[split]
            total.minimum, total.maximum = _extremes(indexes, by_split[split])
        statistics[split] = total
    summaries = {split: total.summary(class_names) for split, total in statistics.items()}

    def failures(counts: set_warnings.Duplicates) -> list[str]:
        return gate.failures(
            requirements, measures.measures(summaries, counts, records), lacking="labels"
        )

    def check_append(counts: set_warnings.Duplicates) -> None:
        if base and (failed := failures(counts)):
            raise gate.Rejected(
                f"--require: {', '.join(failed)} does not hold with the new records, so they are "
                f"rejected, and the data set in {directory} stays as it was; look at the source, "
                "or set other bounds",
                further.get("drift", {}).get("warnings", ()),
            )

    counts = write_duplicates(
        directory,
        indexes,
        is_new=lambda shard: shard["name"] in new_shards,
        removed=removed.images,
        earlier=earlier_duplicates,
        check=check_append,
    )
    identity = {
        "format_version": manifest_lib.FORMAT_VERSION,
        "made_from": output.made_from,
        # Without crc32c, which earlier versions did not write.
        "shards": [{k: v for k, v in e.items() if k != "crc32c"} for e in indexes.shards],
    }
    dataset_id = manifest_lib.content_id(identity)
    if failed := failures(counts):
        further = {**further, "rejected": failed}
    contents, warnings = describe_set(
        directory,
        name=name,
        dataset_id=dataset_id,
        image_shape=image_shape,
        class_names=class_names,
        num_shards=num_shards,
        compression=output.made_from["compression"],
        entries=entries,
        statistics=statistics,
        counts=counts,
        comparison=further.get("drift"),
        is_rejected="rejected" in further,
    )
    contents |= {index.statistics_name(s): total.to_bytes() for s, total in statistics.items()}
    described = [manifest_lib.write_file(directory, n, data) for n, data in contents.items()]
    check()
    return output.finish(
        {
            "dataset_id": dataset_id,
            "name": name,
            "image_shape": list(image_shape),
            "class_names": class_names,
            "num_shards": num_shards,
            "splits": {split: total.num_examples for split, total in statistics.items()},
            "records": dict(records),
            **further,
            "warnings": warnings,
            "files": [*entries, *files, *described, counts.entry],
        },
        markers,
    )


def describe_set(
    directory: str,
    *,
    name: str,
    dataset_id: str,
    image_shape: Sequence[int],
    class_names: list[str],
    num_shards: Mapping[str, int],
    compression: str,
    entries: Sequence[FileEntry],
    statistics: Mapping[str, Statistics],
    counts: set_warnings.Duplicates,
    comparison: Mapping[str, Any] | None,
    is_rejected: bool,
) -> tuple[dict[str, bytes], list[str]]:
    """The files of NAMES without duplicates.jsonl.

    Args:
      directory: the data set's.
      name: the data set's name.
      dataset_id: 16 hex digits.
      image_shape: (H, W, C).
      class_names: class_names[i] is the name of label i.
      num_shards: split -> number of shards in the file names of the first job.
      compression: of the shards.
      entries: of all shards and quarantine lists.
      statistics: split -> statistics.
      counts: of duplicates.jsonl.
      comparison: the result of `drift.compare`, if there is one.
      is_rejected: whether the set was rejected: then no other library must read it.

    Returns:
      File name -> contents.
      The warnings about the set.

    Raises:
      StageError: a quarantine list is missing or damaged.
    """
    warnings = set_warnings.find(statistics, counts, class_names)
    by_split = index.Indexes(directory, entries).by_split()
    description = {
        "splits": {
            split: {
                **statistics[split].summary(class_names),
                "num_duplicates": counts.repeated[split],
                "num_quarantined": sum(
                    e["num_quarantined"] for e in entries if e.get("of_split") == split
                ),
            }
            for split in by_split
        },
        "quarantined": _reasons(directory, entries),
        "duplicates_between": {
            f"{a}, {b}": shared.count for (a, b), shared in sorted(counts.shared.items())
        },
        "warnings": warnings,
    }
    page = stats_page.render(
        name=name,
        description=description,
        comparison=comparison,
        statistics=statistics,
        class_names=class_names,
        samples={s: _samples(directory, shards, image_shape) for s, shards in by_split.items()},
    )
    contents = {drift.STATISTICS: manifest_lib.readable_json(description), _PAGE: page}
    if not is_rejected:
        contents[croissant.FILE] = croissant.croissant_json(
            name=name,
            dataset_id=dataset_id,
            image_shape=image_shape,
            class_names=class_names,
            splits=by_split,
            compression=compression,
        )
    if compression == "none" and not is_rejected:  # tensorflow-datasets reads no other.
        contents |= tfds_metadata.tfds_files(
            name=name,
            image_shape=image_shape,
            class_names=class_names,
            splits=by_split,
            num_shards=num_shards,
        )
    return contents, warnings


def _extremes(indexes: index.Indexes, shards: Sequence[FileEntry]) -> tuple[int, int]:
    """The smallest and the largest value of a pixel; (255, 0) without records."""
    lowest, highest = 255, 0
    for shard in shards:
        if len(rows := indexes[shard].rows):
            lowest = min(lowest, int(rows["lowest"].min()))
            highest = max(highest, int(rows["highest"].max()))
    return lowest, highest


def write_duplicates(
    directory: str,
    indexes: index.Indexes,
    *,
    is_new: Callable[[FileEntry], bool],
    removed: np.ndarray = duplicates.NO_IMAGES,
    earlier: Iterable[bytes] = (),
    check: Callable[[set_warnings.Duplicates], None] = lambda counts: None,
) -> set_warnings.Duplicates:
    """Writes duplicates.jsonl, and returns its counts; arguments as of `duplicates.lines`.

    If `check` raises an error because of the counts, the old file stays.
    """
    counts = set_warnings.Duplicates()

    def lines() -> Iterator[bytes]:
        for line in duplicates.lines(
            directory, indexes, is_new=is_new, removed=removed, earlier=earlier
        ):
            counts.add(json.loads(line))
            yield line
        check(counts)

    counts.entry = manifest_lib.write_lines(directory, duplicates.FILE, lines())
    return counts


def read_duplicates(directory: str, files: Mapping[str, FileEntry]) -> set_warnings.Duplicates:
    """The counts of a finished set's duplicates.jsonl.

    Args:
      directory: the data set's.
      files: name -> manifest entry.

    Raises:
      StageError: the file is damaged.
    """
    counts = set_warnings.Duplicates()
    for line in manifest_lib.read_file(directory, files[duplicates.FILE]).splitlines():
        counts.add(json.loads(line))
    return counts


def _reasons(directory: str, entries: list[dict[str, Any]]) -> dict[str, int]:
    """The most frequent reasons in quarantine -> number of records."""
    counts = collections.Counter(
        fault["reason"] for fault in quarantine.read_all(directory, entries)
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_REASONS])


def _samples(directory: str, entries: Sequence[FileEntry], shape: Sequence[int]) -> list[Any]:
    """The first records of a split: a random sample, since a hash of the ids orders them."""
    samples: list[Any] = []
    for entry in entries:
        samples += reader.read_head(directory, entry, _NUM_SAMPLES - len(samples), shape)
        if len(samples) == _NUM_SAMPLES:
            break
    return samples
