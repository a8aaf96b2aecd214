"""Creates a data set directory from an image set.

shard_writer.py writes the shards, finish.py describes them and writes the manifest, and append.py
adds records to a finished data set.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli import metrics_file
from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import index, naming, placement
from pipeline.datasets.building import (
    finish,
    reading,
    repair,
    restore,
    rewriting,
    shard_writer,
    taken,
)
from pipeline.datasets.building.shard_writer import Layout
from pipeline.datasets.profile import drift
from pipeline.formats import tfrecord
from pipeline.sources import conversion, opened_source
from pipeline.sources.splits import UNSPLIT
from pipeline.stages import gate, quarantine
from pipeline.stages.output_directory import OutputDirectory
from pipeline.storage import files

# Target of --num_shards=auto, so that shards of a large enough split have 64 to 256 MiB.
_SHARD_BYTES = 128 << 20
# Bytes of a record beside its pixels: id, names of features, TFRecord frame.
_RECORD_OVERHEAD = 80
_VALIDATION_FRACTION = 0.1
# The key of `made_from` for the source of the records.
SOURCE = "source"
# Files of a data set; the shard's number stands in the names of all files that belong to a shard.
_NUMBER = r"-\d{5}-of-\d{5}"
_OWNED = re.compile(
    rf"\w+-\w+\.tfrecord{_NUMBER}(\.gz)?"
    rf"|quarantine/\w+-\w+\.tfrecord{_NUMBER}(\.gz)?(\.removed-\d+)?\.jsonl"
    rf"|index/(\w+-\w+{_NUMBER}\.npy|statistics-\w+\.npz|barred-\d+\.npy|source-[0-9a-f]{{16}}\..+)"
    rf"|{'|'.join(map(re.escape, finish.NAMES))}"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a data set, without its source."""

    name: str | None  # Names of shard files start with it; None to choose, see `resolve`.
    num_shards: int | None  # Shards per split; None to choose by size.
    validation_fraction: float | None  # Share of train that goes to validation; see `resolve`.
    seed: int  # For the order of the records.
    compression: str  # "none" or "gzip".

    def shared(self) -> dict[str, Any]:
        """The settings that all records of a set share; an append must use the same."""
        return {
            "name": self.name,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
            "compression": self.compression,
        }


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of one run of preprocess."""

    source_spec: conversion.SourceSpec  # The source, and how it is converted.
    settings: Settings
    output_dir: str  # Local path or fsspec URL; "" for a dry run without one.
    max_quarantined: quarantine.Limit  # Limit on unreadable records.
    overwrite: bool  # Whether to replace output of other inputs; see OutputDirectory.
    options: PipelineOptions  # Beam's.
    on_changed: str = "fail"  # Or keep, replace: of an append, for a changed record.
    reread: bool = False  # Whether files that have not changed are read again.
    requirements: Sequence[gate.Requirement] = ()  # Bounds on the data set.
    reference: drift.Profile | None = None  # What the records of the job are compared with.


def resolve(settings: Settings, source: conversion.ConvertedSource) -> Settings:
    """Settings with a name, and a share of train that goes to validation.

    Without a name, the set is named after its source. The validation split of a source is official
    and stays as it is.
    """
    name, fraction = settings.name, settings.validation_fraction
    if name is None:
        name = naming.name_of_source(source.source_spec.source)
    if fraction is None:
        fraction = 0.0 if "validation" in source.split_sizes else _VALIDATION_FRACTION
    return dataclasses.replace(settings, name=name, validation_fraction=fraction)


def check(settings: Settings, source: conversion.ConvertedSource) -> None:
    """Raises a UsageError or StageError if the settings do not fit the source."""
    if settings.compression not in tfrecord.COMPRESSIONS:
        raise UsageError(
            f"--compression={settings.compression}: expected {' or '.join(tfrecord.COMPRESSIONS)}"
        )
    limit = 1 - placement.TEST_FRACTION if UNSPLIT in source.split_sizes else 1
    if not 0 <= settings.validation_fraction < limit:
        raise UsageError(
            f"--validation_fraction={settings.validation_fraction}: expected 0 ≤ fraction < "
            f"{limit}, so that train keeps records"
        )
    for split in source.split_sizes:
        if not split.isidentifier():
            raise StageError(
                f"the source names a split {split!r}; expected letters, digits and underscores, "
                "because the name becomes part of file names"
            )


def num_shards(
    settings: Settings, sizes: Mapping[str, float], image_shape: tuple[int, ...]
) -> dict[str, int]:
    """Split -> number of shards."""
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


def source_identity(
    source_spec: conversion.SourceSpec, source: conversion.ConvertedSource
) -> dict[str, Any]:
    """All that determines a source's records; part of `made_from` here and in exports.

    A newer setting appears only where it differs from its default, so that existing ids stay.
    """
    return {
        "fingerprint": source.fingerprint(),
        "image_size": source_spec.image_size,
        "grayscale": source_spec.grayscale,
        "transpose": source_spec.transpose,
        "id_prefix": source_spec.id_prefix,
        "class_names": source_spec.class_names,
        **({"rgb": True} if source_spec.rgb else {}),
        **source_spec.identity(),
    }


def opened(
    request: Request, base: Mapping[str, Any] | None = None
) -> tuple[Request, conversion.ConvertedSource]:
    """Opens the source of a request.

    Args:
      request: the arguments of the run.
      base: the manifest of the data set to append to, if any.

    Returns:
      The request, with settings as `resolve` returns them.
      The open source.

    Raises:
      UsageError: settings that do not fit the source.
      StageError: the source cannot be used.
    """
    settings, source_spec = request.settings, request.source_spec
    if base:
        names = tuple(base["class_names"])
        source_spec = dataclasses.replace(source_spec, base_class_names=names)
        for key in ("name", "validation_fraction"):
            if getattr(settings, key) is None:
                settings = dataclasses.replace(settings, **{key: base["made_from"][key]})
    source = conversion.open_converted(source_spec)
    settings = resolve(settings, source)
    check(settings, source)
    return dataclasses.replace(request, settings=settings), source


def plan(request: Request) -> tuple[Request, conversion.ConvertedSource, Layout, OutputDirectory]:
    """All that `create_dataset` decides before it writes.

    Returns:
      The request, with all settings.
      The open source.
      The shards to write.
      The output directory, untouched.

    Raises:
      UsageError: settings that do not fit the source.
      StageError: the source cannot be used.
    """
    kind, _, path = request.source_spec.source.partition(":")
    if kind == "folder" and request.output_dir and files.is_within(request.output_dir, path):
        raise UsageError(
            f"--output_dir={request.output_dir}: lies inside the source {path}; name a directory "
            "outside of the source"
        )
    settings = request.settings
    if settings.name is None and request.output_dir and not request.overwrite:
        name = naming.existing_name(request.output_dir)
        request = dataclasses.replace(request, settings=dataclasses.replace(settings, name=name))
    request, source = opened(request)
    settings = request.settings
    sizes = placement.expected_sizes(source.split_sizes, settings.validation_fraction)
    counts = num_shards(settings, sizes, source.image_shape)
    made_from = {
        **settings.shared(),
        SOURCE: {**source_identity(request.source_spec, source), "num_shards": counts},
    }
    zeros = dict.fromkeys(counts, 0)
    layout = Layout(**settings.shared(), num_shards=counts, first_shard=zeros, num_in_names=counts)
    output = output_directory(request.output_dir, made_from)
    return request, source, layout, output


def output_directory(directory: str, made_from: Mapping[str, Any]) -> OutputDirectory:
    """A data set's directory, untouched."""
    return OutputDirectory(
        directory,
        stage="preprocess",
        made_from=made_from,
        owned=_OWNED,
        subdirectories=(index.DIRECTORY,),
    )


def create_dataset(request: Request) -> dict[str, Any]:
    """Creates a data set directory from an image set.

    Returns:
      The manifest, with the key "reused" if the data set was already finished.

    Raises:
      gate.Rejected: the data set is finished and breaks a bound.
      UsageError: settings that do not fit the source.
      StageError: the source or the output directory cannot be used.
    """
    request, source, layout, output = plan(request)

    def mend(manifest: dict[str, Any]) -> dict[str, Any]:
        lost = [e for e in manifest["files"] if not restore.is_made_anew(e["name"])]
        lost = [entry for entry in lost if not output.is_complete([entry])]
        if lost and repair.from_source(output, manifest, lost, source, request.options):
            return manifest  # All is made again.
        return restore.complete(output, manifest, options=request.options, checks_all=True)

    names = file_names(layout, layout.num_shards)
    with output.opened(names, overwrite=request.overwrite, mend=mend) as finished:
        if finished is not None:
            records = finished["records"]
            metrics_file.observe_records(
                written=0, quarantined=records["quarantined"], existing=records["written"]
            )
            memory = taken.Taken(output.directory, request.source_spec)
            if memory.memory(finished["made_from"]) is None:  # A kill came after the manifest.
                with contextlib.suppress(index.Damaged):  # An earlier version made no indexes.
                    hashes = index.Indexes(output.directory, finished["files"]).ids()
                    memory.write(source, finished["made_from"], hashes)
            manifest = restore.judge(output, finished, request.requirements, request.reference)
            return {**manifest, "reused": True}
        reading.announce("preprocess", source, layout.name, request.settings.validation_fraction)
        taken.forget_all(output.directory)
        blocks = shard_writer.index_blocks(source.num_records)
        with opened_source.reporting_source_changes(source.check_unchanged, output.tasks.clear):
            manifest = write_dataset(
                request, source=source, layout=layout, blocks=blocks, output=output
            )
        hashes = index.Indexes(output.directory, manifest["files"]).ids()
        memory = taken.Taken(output.directory, request.source_spec)
        memory.write(source, manifest["made_from"], hashes)
        gate.refuse(output.directory, manifest)
        return manifest


def file_names(layout: Layout, splits: Collection[str]) -> list[str]:
    """Every file that a job may write, without the manifest.

    Args:
      layout: the shards that the job writes.
      splits: all splits of the data set.
    """
    tasks = layout.tasks()
    return [
        *tasks,
        *map(index.file_name, tasks),
        *map(quarantine.file_name, tasks),
        *finish.descriptions(splits),
    ]


def write_dataset(
    request: Request,
    *,
    source: conversion.ConvertedSource,
    layout: Layout,
    blocks: Sequence[shard_writer.IndexBlock],
    output: OutputDirectory,
    base: Mapping[str, Any] | None = None,
    num_existing: int = 0,
    num_changed: int = 0,
    rewrites: Sequence[rewriting.Rewrite] = (),
    removed: rewriting.Removed = rewriting.NOTHING_REMOVED,
) -> dict[str, Any]:
    """Writes shards and the files that describe the set, last its manifest.

    Args:
      request: the arguments of the run.
      source: the open source.
      layout: the shards to write.
      blocks: the indices of the records to write.
      output: the directory, held by this process and ready for the job.
      base: the manifest of the data set to append to.
      num_existing: records of the source that are skipped because `base` holds them.
      num_changed: how many of these have another image or label in the source.
      rewrites: shards of `base` that are written again without some records.
      removed: these records.

    Returns:
      The manifest.
    """
    shard_writer.write_shards(
        source_spec=source.for_workers(),
        layout=layout,
        blocks=blocks,
        rewrites=rewrites,
        tasks=output.tasks,
        options=request.options,
    )
    return finish.finish_dataset(
        source=source,
        layout=layout,
        output=output,
        max_quarantined=request.max_quarantined,
        base=base,
        num_existing=num_existing,
        num_changed=num_changed,
        removed=removed,
        requirements=request.requirements,
        reference=request.reference,
    )
