"""The end of preprocess: reconciles counts, describes the set, writes the manifest."""

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
from pipeline.stages.contracts import is_shard
from pipeline.stages.output_directory import OutputDirectory

_STATISTICS = "statistics.json"
DUPLICATES = "duplicates.jsonl"
_PAGE = "stats.html"
# All files written here, without the manifest.
NAMES = (_STATISTICS, DUPLICATES, _PAGE, "dataset_info.json", "features.json")
# Sample images on the page for each split.
_NUM_SAMPLES = 48
# Number of quarantine reasons that are listed.
_MAX_REASONS = 20


def finish_dataset(
    *,
    source: conversion.ConvertedSource,
    layout: Layout,
    output: OutputDirectory,
    max_quarantined: quarantine.Limit,
    num_buckets: int,
    base: Mapping[str, Any] | None = None,
    num_existing: int = 0,
) -> dict[str, Any]:
    """Describes the set and writes its manifest.

    Args:
      source: the source that was read.
      layout: the shards that were written.
      output: the output directory.
      max_quarantined: limit on unreadable records.
      num_buckets: the number of buckets that the shards were written with.
      base: the manifest of the data set that was appended to.
      num_existing: records of the source that were skipped because `base` holds them.

    Returns:
      The manifest as written.

    Raises:
      StageError: a shard failed, records are missing, or too many are unreadable.
      SourceChanged: the source has changed.
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
    if source.num_records != written + quarantined + num_existing:
        raise StageError(
            f"{output.directory}: {source.num_records} records read, but {written} written + "
            f"{quarantined} quarantined + {num_existing} already in the data set; expected the sum "
            "to match: run the same command again"
        )
    entries = [e for e in base["files"] if e["name"] not in NAMES] if base else []
    entries += new
    splits = in_order({entry["split"] for entry in entries if is_shard(entry)})
    by_split = {split: [e for e in entries if e.get("split") == split] for split in splits}
    num_in_names = {
        split: layout.num_in_names.get(split) or base["num_shards"][split] for split in splits
    }

    statistics = {s: describe.read_statistics(output.tasks, s) for s in splits}
    duplicates = _write_duplicates(output, num_buckets)
    class_names = list(source.class_names)
    warnings = set_warnings.find(statistics, duplicates, class_names)
    description = {
        "splits": {
            split: {
                **statistics[split].summary(class_names),
                "num_duplicates": duplicates.repeated[split],
                "num_quarantined": sum(
                    e["num_quarantined"] for e in entries if e.get("of_split") == split
                ),
            }
            for split in splits
        },
        "quarantined": _reasons(output.directory, entries),
        "duplicates_between": {
            f"{a}, {b}": shared.count for (a, b), shared in sorted(duplicates.shared.items())
        },
        "warnings": warnings,
    }
    page = stats_page.render(
        name=layout.name,
        description=description,
        statistics=statistics,
        class_names=class_names,
        samples={s: _samples(output.directory, by_split[s], source.image_shape) for s in splits},
    )
    texts = {_STATISTICS: manifest_lib.readable_json(description), _PAGE: page}
    if layout.compression == "none":  # tensorflow-datasets cannot read compressed TFRecords.
        texts |= tfds_metadata.tfds_files(
            name=layout.name,
            image_shape=source.image_shape,
            splits=by_split,
            num_shards=num_in_names,
        )
    files = [manifest_lib.write_file(output.directory, name, data) for name, data in texts.items()]
    files.append(duplicates.entry)
    identity = {
        "format_version": manifest_lib.FORMAT_VERSION,
        "made_from": output.made_from,
        "shards": [entry for entry in entries if is_shard(entry)],
    }
    ignored = {"ignored": dict(source.ignored)} if source.ignored else {}
    total = {**counts, **ignored}
    if base:
        added = {key: base["records"][key] + count for key, count in counts.items()}
        total = {**base["records"], **added, "read": added["read"] - num_existing}
    source.check_unchanged()
    return output.finish(
        {
            "dataset_id": manifest_lib.content_id(identity),
            "name": layout.name,
            "image_shape": list(source.image_shape),
            "class_names": class_names,
            "num_shards": num_in_names,
            "splits": {split: statistics[split].num_examples for split in splits},
            "records": total,
            **({"last_append": {**counts, "there": num_existing, **ignored}} if base else {}),
            "warnings": warnings,
            "files": entries + files,
        },
        markers,
    )


def _write_duplicates(output: OutputDirectory, num_buckets: int) -> set_warnings.Duplicates:
    """Writes duplicates.jsonl, and returns its counts."""
    duplicates = set_warnings.Duplicates()

    def lines() -> Iterator[bytes]:
        for line in describe.read_duplicates(output.tasks, num_buckets):
            duplicates.add(json.loads(line)["ids"])
            yield line

    duplicates.entry = manifest_lib.write_lines(output.directory, DUPLICATES, lines())
    return duplicates


def _reasons(directory: str, entries: list[dict[str, Any]]) -> dict[str, int]:
    """The most frequent reasons in quarantine -> number of records."""
    counts = collections.Counter(
        fault["reason"] for fault in quarantine.read_all(directory, entries)
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MAX_REASONS])


def _samples(directory: str, entries: list[dict[str, Any]], shape: tuple[int, ...]) -> list[Any]:
    """The first records of a split: a random sample, since a hash of the ids orders them."""
    samples: list[Any] = []
    for entry in entries:
        samples += reader.read_head(directory, entry, _NUM_SAMPLES - len(samples), shape)
        if len(samples) == _NUM_SAMPLES:
            break
    return samples
