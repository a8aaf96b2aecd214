"""A data set directory made from an image set: what job 1 does in all.

The shards are written by shard_writer.py and described by finish.py; a set that is
there already grows by append.py.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline import sources
from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import placement
from pipeline.datasets.building import finish as finish_set
from pipeline.datasets.building import shard_writer
from pipeline.datasets.building.shard_writer import Layout
from pipeline.datasets.profile import describe
from pipeline.formats import tfrecord
from pipeline.sources import conversion, opened_source
from pipeline.sources.splits import UNSPLIT
from pipeline.stages import quarantine
from pipeline.stages.output_directory import OutputDirectory
from pipeline.storage import files

# --num_shards=auto aims at this, so that shards have 64 to 256 MiB where there is enough.
_SHARD_BYTES = 128 << 20
# What a record takes beside its pixels: id, names of features, frame.
_RECORD_OVERHEAD = 80
# The key of `made_from` that says what the records come from.
SOURCE = "source"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What shapes a data set beside its source."""

    name: str  # Shard files begin with it.
    num_shards: int | None  # Shards per split; None to choose by size.
    validation_fraction: float  # Share of train that goes to validation.
    seed: int  # Of the order of the records.
    compression: str  # "none" or "gzip".

    def shared(self) -> dict[str, Any]:
        """What all records of a set have in common, whichever source they are of."""
        return {
            "name": self.name,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
            "compression": self.compression,
        }


@dataclasses.dataclass(frozen=True)
class Request:
    """What a run of the command is asked to do."""

    reading: conversion.SourceSpec  # The source, and how it is converted.
    settings: Settings
    output_dir: str  # Local path or fsspec URL.
    max_quarantined: quarantine.Limit  # How many records may be bad.
    overwrite: bool  # Whether output of other inputs may go; see OutputDirectory.
    options: PipelineOptions  # Beam's.


def check(settings: Settings, source: conversion.ConvertedSource) -> None:
    """Raises a UsageError for settings that this source cannot have."""
    if settings.compression not in tfrecord.COMPRESSIONS:
        raise UsageError(
            f"--compression={settings.compression}: expected {' or '.join(tfrecord.COMPRESSIONS)}"
        )
    limit = 1 - placement.TEST_FRACTION if UNSPLIT in source.split_sizes else 1
    if not 0 <= settings.validation_fraction < limit:
        raise UsageError(
            f"--validation_fraction={settings.validation_fraction}: expected 0 ≤ fraction < "
            f"{limit}, so that records are left for train"
        )
    for split in source.split_sizes:
        if not split.isidentifier():
            raise StageError(
                f"the source names a split {split!r}; expected letters, digits and underscores, "
                "since it becomes part of file names"
            )


def num_shards(
    settings: Settings, sizes: Mapping[str, float], image_shape: tuple[int, ...]
) -> dict[str, int]:
    """How many shards each split gets."""
    num_records = round(sum(sizes.values()))
    if settings.num_shards is not None:
        if settings.num_shards > num_records:
            raise UsageError(
                f"--num_shards={settings.num_shards}: more shards than the {num_records} records; "
                f"expected 1 to {num_records}, or auto"
            )
        return dict.fromkeys(sizes, settings.num_shards)
    record_bytes = math.prod(image_shape) + _RECORD_OVERHEAD
    return {
        split: max(1, math.floor(size * record_bytes / _SHARD_BYTES + 0.5))
        for split, size in sizes.items()
    }


def of_source(reading: conversion.SourceSpec, source: conversion.ConvertedSource) -> dict[str, Any]:
    """What shapes a source's records; goes into `made_from`."""
    limit = reading.max_image_pixels
    return {
        "fingerprint": source.fingerprint(),
        "image_size": reading.image_size,
        "grayscale": reading.grayscale,
        "transpose": reading.transpose,
        "id_prefix": reading.id_prefix,
        "class_names": reading.class_names,
        **({"max_image_pixels": limit} if limit != sources.MAX_IMAGE_PIXELS else {}),
    }


def make_set(request: Request) -> dict[str, Any]:
    """Turns an image set into a finished data set directory.

    Returns:
      The manifest, with the key "reused" where nothing had to be done.

    Raises:
      UsageError: settings that this source cannot have.
      StageError: the source or the output directory cannot be used.
    """
    kind, _, place = request.reading.spec.partition(":")
    if kind == "folder" and files.is_within(request.output_dir, place):
        raise UsageError(
            f"--output_dir={request.output_dir}: lies in the source, {place}; name a directory "
            "outside of the source"
        )
    settings, source = request.settings, conversion.open_converted(request.reading)
    check(settings, source)
    sizes = dict(placement.expected_sizes(source.split_sizes, settings.validation_fraction))
    counts = num_shards(settings, sizes, source.image_shape)
    made_from = {
        **settings.shared(),
        SOURCE: {**of_source(request.reading, source), "num_shards": counts},
    }
    zeros = dict.fromkeys(counts, 0)
    layout = Layout(**settings.shared(), num_shards=counts, first=zeros, named=counts)
    output = OutputDirectory(request.output_dir, stage="preprocess", made_from=made_from)
    with output.opened(file_names(layout), overwrite=request.overwrite) as finished:
        if finished is not None:
            return {**finished, "reused": True}
        blocks = shard_writer.index_blocks(source.num_records)
        with opened_source.reporting_source_changes(source.check_unchanged, output.tasks.clear):
            return write_set(request, source=source, layout=layout, blocks=blocks, output=output)


def file_names(layout: Layout) -> list[str]:
    """Every file that a job may make beside the manifest."""
    tasks = layout.tasks()
    return [*tasks, *map(quarantine.file_name, tasks), *finish_set.NAMES]


def write_set(
    request: Request,
    *,
    source: conversion.ConvertedSource,
    layout: Layout,
    blocks: Sequence[shard_writer.Block],
    output: OutputDirectory,
    base: Mapping[str, Any] | None = None,
    num_there: int = 0,
) -> dict[str, Any]:
    """Writes shards into a directory that this process holds, and finishes the set.

    Args:
      request: what is asked for.
      source: what is read.
      layout: the shards to write.
      blocks: the indices of the records that go into them.
      output: the directory, made ready.
      base: the manifest of the set that is appended to.
      num_there: records of the source that are left out because they are in `base`.

    Returns:
      The manifest.
    """
    there = [entry for entry in base["files"] if "split" in entry] if base else []
    num_records = source.num_records + sum(entry["num_examples"] for entry in there)
    buckets = describe.num_buckets(num_records)
    shard_writer.write_shards(
        reading=source.for_workers(),
        layout=layout,
        blocks=blocks,
        there=there,
        num_buckets=buckets,
        tasks=output.tasks,
        options=request.options,
    )
    return finish_set.finish(
        source=source,
        layout=layout,
        output=output,
        max_quarantined=request.max_quarantined,
        num_buckets=buckets,
        base=base,
        num_there=num_there,
    )
