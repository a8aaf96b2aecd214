"""The end of job 1: counts reconciled, the set described, the manifest written."""

import collections
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.cli.errors import StageError
from pipeline.datasets import reader, tfds_metadata
from pipeline.datasets.building.shard_writer import Layout
from pipeline.datasets.profile import describe
from pipeline.datasets.profile import page as stats_page
from pipeline.datasets.profile import warnings as set_warnings
from pipeline.sources import conversion
from pipeline.sources.splits import in_order
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.stages.output_directory import OutputDirectory

_STATISTICS = "statistics.json"
DUPLICATES = "duplicates.jsonl"
_PAGE = "stats.html"
# All that is written here beside the manifest.
NAMES = (_STATISTICS, DUPLICATES, _PAGE, "dataset_info.json", "features.json")
# Records on the page's sample grid, for each split.
_NUM_SAMPLES = 48
# Reasons of quarantine that are counted one by one.
_MAX_REASONS = 20


def finish(
    *,
    source: conversion.ConvertedSource,
    layout: Layout,
    output: OutputDirectory,
    max_quarantined: quarantine.Limit,
    num_buckets: int,
    base: Mapping[str, Any] | None = None,
    num_there: int = 0,
) -> dict[str, Any]:
    """Describes the set and writes its manifest.

    Args:
      source: what was read.
      layout: the shards that were written.
      output: the directory.
      max_quarantined: how many records may be bad.
      num_buckets: as the shards were written with.
      base: the manifest of the set that was appended to.
      num_there: records of the source that were left out because they are in `base`.

    Returns:
      The manifest as written.

    Raises:
      StageError: a shard failed, records are missing, too many are bad, or the source changed.
    """
    tasks = layout.tasks()
    markers = dict(zip(tasks, output.tasks.markers(tasks), strict=True))
    new = [entry for marker in markers.values() for entry in marker["entries"]]
    written = sum(entry.get("num_examples", 0) for entry in new)
    quarantined = sum(entry.get("num_quarantined", 0) for entry in new)
    quarantine.check(
        max_quarantined,
        quarantine.read_all(output.directory, new),
        num_quarantined=quarantined,
        num_records=source.num_records,
    )
    counts = {"read": source.num_records, "written": written, "quarantined": quarantined}
    if source.num_records != written + quarantined + num_there:
        raise StageError(
            f"{output.directory}: {source.num_records} records read, {written} written, "
            f"{quarantined} quarantined, {num_there} there before; expected all of them: run the "
            "same command again"
        )
    entries = [e for e in base["files"] if e["name"] not in NAMES] if base else []
    entries += new
    splits = in_order({e["split"] for e in entries if "split" in e})
    by_split = {split: [e for e in entries if e.get("split") == split] for split in splits}
    named = {split: layout.named.get(split) or base["num_shards"][split] for split in splits}

    statistics = {s: describe.read_statistics(output.tasks, s) for s in splits}
    duplicates = _write_duplicates(output, num_buckets)
    class_names = list(source.class_names)
    warnings = set_warnings.find(statistics, duplicates, class_names)
    described = {
        "splits": {
            split: {
                **statistics[split].summary(class_names),
                "num_duplicates": duplicates.within[split],
                "num_quarantined": sum(
                    e["num_quarantined"] for e in entries if e.get("of_split") == split
                ),
            }
            for split in splits
        },
        "quarantined": _reasons(output.directory, entries),
        "duplicates_between": {
            f"{a}, {b}": found.count for (a, b), found in sorted(duplicates.between.items())
        },
        "warnings": warnings,
    }
    page = stats_page.page(
        name=layout.name,
        described=described,
        statistics=statistics,
        class_names=class_names,
        samples={s: _samples(output.directory, by_split[s], source.image_shape) for s in splits},
    )
    texts = {_STATISTICS: manifest_lib.readable_json(described), _PAGE: page}
    if layout.compression == "none":  # tensorflow-datasets reads no packed TFRecords.
        texts |= tfds_metadata.tfds_files(
            name=layout.name,
            image_shape=source.image_shape,
            splits=by_split,
            num_shards=named,
        )
    files = [manifest_lib.write_file(output.directory, name, data) for name, data in texts.items()]
    files.append(duplicates.entry)
    identity = {
        "format_version": manifest_lib.FORMAT_VERSION,
        "made_from": output.made_from,
        "shards": [entry for entry in entries if "split" in entry],
    }
    whole = dict(counts)
    if base:
        earlier = base["records"]
        whole = {
            "read": earlier["read"] + counts["read"] - num_there,
            "written": earlier["written"] + written,
            "quarantined": earlier["quarantined"] + quarantined,
        }
    source.check_unchanged()
    return output.finish(
        {
            "dataset_id": manifest_lib.content_id(identity),
            "name": layout.name,
            "image_shape": list(source.image_shape),
            "class_names": class_names,
            "num_shards": named,
            "splits": {split: statistics[split].num_examples for split in splits},
            "records": whole,
            **({"last_append": {**counts, "there": num_there}} if base else {}),
            "warnings": warnings,
            "files": entries + files,
        },
        markers,
    )


def _write_duplicates(output: OutputDirectory, num_buckets: int) -> set_warnings.Duplicates:
    """Writes duplicates.jsonl, and returns what it says in numbers."""
    found = set_warnings.Duplicates()

    def lines() -> Iterator[bytes]:
        for line in describe.read_duplicates(output.tasks, num_buckets):
            found.add(json.loads(line)["ids"])
            yield line

    found.entry = manifest_lib.write_lines(output.directory, DUPLICATES, lines())
    return found


def _reasons(directory: str, entries: list[dict[str, Any]]) -> dict[str, int]:
    """How many records are in quarantine for which reason, the most frequent reasons."""
    counts = collections.Counter(
        fault["reason"] for fault in quarantine.read_all(directory, entries)
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_REASONS])


def _samples(directory: str, entries: list[dict[str, Any]], shape: tuple[int, ...]) -> list[Any]:
    """The first records of a split: a fair sample, since their order is a hash of the ids."""
    samples: list[Any] = []
    for entry in entries:
        samples += reader.read_head(directory, entry, _NUM_SAMPLES - len(samples), shape)
        if len(samples) == _NUM_SAMPLES:
            break
    return samples
