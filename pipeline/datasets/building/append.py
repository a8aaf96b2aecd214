"""Appends the new records of an image set to a finished data set.

Existing shards do not change. The manifest is replaced last, in one atomic step; until then the
directory is the old data set. tensorflow-datasets reads dataset_info.json, which is replaced
shortly before.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli import metrics_file
from pipeline.cli.errors import StageError
from pipeline.datasets import index
from pipeline.datasets.building import (
    create,
    new_records,
    reading,
    repair,
    restore,
    rewriting,
    taken,
)
from pipeline.datasets.building.create import Request
from pipeline.datasets.building.shard_writer import Layout
from pipeline.sources import conversion, opened_source
from pipeline.stages import gate
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import is_shard
from pipeline.stages.output_directory import OutputDirectory

# What such a part of `made_from` holds beside the identity of the source.
_OF_A_JOB = ("num_shards", "replaced", "kept")


def append_records(request: Request) -> dict[str, Any]:
    """Appends the records of an image set that a finished data set does not hold, as new shards.

    Args:
      request: output_dir is the data set's directory. The settings are those of the data set,
        or None, except num_shards, the number of new shards.

    Returns:
      The manifest, with the key "reused" if there was nothing to append.

    Raises:
      gate.Rejected: a bound does not hold, and the data set is as it was; or the data set was
        rejected, and there are no bounds.
      StageError: the source or the data set cannot be used, they do not fit together, or an id
        is in the data set with another record and request.on_changed is "fail".
    """
    output_dir = request.output_dir
    base = manifest_lib.read_manifest(output_dir, "preprocess", "--output_dir")
    if not request.requirements:
        gate.refuse(output_dir, base)
    memory = taken.Taken(output_dir, request.source_spec)
    request, source = opened(request, base)
    directory = create.output_directory(output_dir, base["made_from"])
    with (
        directory.locked(),
        opened_source.reporting_source_changes(source.check_unchanged, directory.tasks.clear),
    ):
        if manifest_lib.read_manifest(output_dir, "preprocess", "--output_dir") != base:
            raise StageError(
                f"--output_dir={output_dir}: another process has just changed the data set; run "
                "the same command again"
            )
        directory.complete_finished(base)
        if request.overwrite:
            directory.undo_append(base)
        _restore_lost(request, source, base, directory)
        identity = manifest_lib.through_json(create.source_identity(request.source_spec, source))

        def nothing_new(base: dict[str, Any], num_kept: int) -> dict[str, Any]:
            base = restore.complete(directory, base, options=request.options, checks_all=True)
            directory.forget_finished(base)
            metrics_file.observe_records(written=0, quarantined=0, existing=source.num_records)
            base = restore.judge(directory, base, request.requirements)
            num_changed = {"num_changed": num_kept} if num_kept else {}
            return {**base, "reused": True, **num_changed}

        if _is_in(base, identity):
            hashes = new_records.id_hashes(source, base["made_from"]["seed"])
            barred = index.are_among(hashes, index.read_barred(output_dir, base["files"]))
            base, _ = restore.with_indexes(
                directory, base, request.options, lambda base: memory.report_lost(base, hashes)
            )
            memory.write(source, base["made_from"], hashes[~barred], _named(source, barred))
            return nothing_new(base, 0)
        settings = request.settings
        reading.announce("preprocess", source, settings.name, settings.validation_fraction)
        try:
            base, additions = _additions(request, source, base, directory)
        except StageError:
            directory.forget_finished(base)
            raise
        comparison = additions.comparison
        memory.report_lost(base, comparison.id_hashes)
        not_trusted = [*additions.kept, *_named(source, comparison.is_barred)]
        manifest = base
        if len(comparison.new):
            manifest = _write(request, source, base, additions, identity)
        hashes = comparison.id_hashes[~comparison.is_barred]
        memory.write(source, manifest["made_from"], hashes, not_trusted)
        return manifest if len(comparison.new) else nothing_new(base, len(additions.kept))


def _restore_lost(
    request: Request,
    source: conversion.ConvertedSource,
    base: Mapping[str, Any],
    directory: OutputDirectory,
) -> None:
    """Writes lost shards again, if the source has their records.

    Only the sizes and ends of shards are looked at, so that an append does not read the data set;
    with --reread their contents are compared.

    Raises:
      StageError: a file that is no function of the shards stays lost.
    """
    is_whole = directory.is_complete if request.reread else directory.looks_complete
    files = [entry for entry in base["files"] if not restore.is_made_anew(entry["name"])]
    lost = [entry for entry in files if not is_whole([entry])]
    if lost:
        lost = repair.from_source(directory, base, lost, source, request.options)
    if lost:
        text = repair.lost_text([entry["name"] for entry in lost])
        raise StageError(f"--output_dir={request.output_dir}: {text}")


def _named(source: conversion.ConvertedSource, is_barred: np.ndarray) -> list[int]:
    """The removed records that a memory would name, because each file is a record."""
    return np.flatnonzero(is_barred).tolist() if source.has_a_file_per_record else []


class _Additions(NamedTuple):
    """What an append changes."""

    comparison: new_records.Comparison  # `new` holds the records to replace, too.
    layout: Layout
    rewrites: list[rewriting.Rewrite]
    kept: np.ndarray  # Changed records that the data set keeps as they are, int64.


def _additions(
    request: Request,
    source: conversion.ConvertedSource,
    base: dict[str, Any],
    directory: OutputDirectory,
) -> tuple[dict[str, Any], _Additions]:
    """What to append, and the manifest, with the entries of indexes that were made anew.

    Raises:
      StageError: an id is in the data set with another record.
    """

    def find(base: dict[str, Any]) -> new_records.Comparison:
        return new_records.find(
            source,
            base=base,
            indexes=index.Indexes(directory.directory, base["files"]),
            barred=index.read_barred(directory.directory, base["files"]),
            tasks=directory.tasks,
            options=request.options,
            reuse_results=not request.reread,
        )

    base, comparison = restore.with_indexes(directory, base, request.options, find)
    indexes = index.Indexes(directory.directory, base["files"])
    kept = replaced = np.empty(0, np.int64)
    if len(comparison.changed):
        if request.on_changed == "fail":
            raise _conflict(source, comparison, indexes)
        if request.on_changed == "keep":
            kept = comparison.changed
        else:
            replaced = comparison.changed
    comparison = comparison._replace(new=np.union1d(comparison.new, replaced))
    fraction = base["made_from"]["validation_fraction"]
    num_new = new_records.split_counts(source, comparison.new, fraction)
    layout = _layout(request.settings, base, num_new, source.image_shape)
    free = rewriting.next_numbers(indexes.shards)
    for split, count in layout.num_shards.items():
        free[split] = free.get(split, 0) + count
    places = index.Places(comparison.places.shards[replaced], comparison.places.positions[replaced])
    return base, _Additions(comparison, layout, rewriting.plan(base, indexes, places, free), kept)


def _write(
    request: Request,
    source: conversion.ConvertedSource,
    base: dict[str, Any],
    additions: _Additions,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the new shards and describes the set; the manifest."""
    comparison, layout, rewrites, kept = additions
    number = 1 + sum(key.startswith(taken.APPENDED) for key in base["made_from"])
    appended = {**identity, "num_shards": layout.num_shards}
    if rewrites:
        appended["replaced"] = rewriting.identity(rewrites)
    if len(kept):
        appended["kept"] = len(kept)
    made_from = {**base["made_from"], f"{taken.APPENDED}{number:04d}": appended}
    output = create.output_directory(request.output_dir, made_from)
    splits = {*base["splits"], *layout.num_shards}
    output.begin_append(
        [*create.file_names(layout, splits), *rewriting.file_names(rewrites)],
        rewriting.dropped_names(rewrite.shard["name"] for rewrite in rewrites) or None,
    )
    if rewrites:  # What other sources have brought may be replaced.
        taken.forget_files(output.directory)
    indexes = index.Indexes(output.directory, base["files"])
    num_barred = int(comparison.is_barred.sum())
    num_new, num_replaced = len(comparison.new), sum(len(rewrite.positions) for rewrite in rewrites)
    parts = [f"{num_new - num_replaced:,} new records"]
    if num_replaced:
        parts.append(f"{num_replaced:,} replace others of the same id")
    if num_barred:
        parts.append(f"{num_barred:,} removed from the data set earlier stay out")
    parts.append(f"{comparison.num_existing - num_barred:,} already in the data set")
    print(f"preprocess: {', '.join(parts)}", file=sys.stderr, flush=True)
    try:
        return create.write_dataset(
            request,
            source=source,
            layout=layout,
            blocks=list(new_records.save_blocks(output.tasks, comparison.new)),
            output=output,
            base=base,
            num_existing=comparison.num_existing,
            num_changed=len(kept),
            rewrites=rewrites,
            removed=rewriting.removed(output.directory, indexes, rewrites, source.image_shape),
        )
    except gate.Rejected:
        # Other readers find shards by pattern.
        output.undo_append(base)
        raise


def _conflict(
    source: conversion.ConvertedSource, comparison: new_records.Comparison, indexes: index.Indexes
) -> StageError:
    """The error for the first record that the data set holds otherwise."""
    first = comparison.changed[:1]
    [record_id], shard = source.ids(first), indexes.shards[comparison.places.shards[first[0]]]
    faults = source.read(first).faults
    reason = f" ({faults[0][1]})" if faults else ""
    more = (
        f"; {len(comparison.changed) - 1:,} more records differ"
        if len(comparison.changed) > 1
        else ""
    )
    return StageError(
        f"--append: the id {record_id.decode()!r} is already in {shard['name']}, with another "
        f"image or label than in {source.where(int(first[0]))}{reason}{more}; expected new records "
        "to have new ids: add a prefix with --id_prefix, or choose --on_changed=keep or replace"
    )


def opened(
    request: Request, base: Mapping[str, Any] | None = None
) -> tuple[Request, conversion.ConvertedSource]:
    """As `create.opened`; raises a StageError too if the source does not fit the data set.

    Args:
      request: as for `append_records`.
      base: the data set's manifest; None to read it.
    """
    base = base or manifest_lib.read_manifest(request.output_dir, "preprocess", "--output_dir")
    spec = taken.remembering(
        request.source_spec, request.output_dir, base["made_from"], reread=request.reread
    )
    request = dataclasses.replace(request, source_spec=spec)
    request, source = create.opened(request, base)
    _check_fits(request.output_dir, base, request.settings, source)
    return request, source


def _check_fits(
    output_dir: str,
    base: Mapping[str, Any],
    settings: create.Settings,
    source: conversion.ConvertedSource,
) -> None:
    """Raises a StageError if a source cannot be appended to a data set."""
    shared = {key: base["made_from"][key] for key in settings.shared()}
    differ = manifest_lib.differences(shared, settings.shared())
    if differ:
        raise StageError(
            f"--append: {output_dir} was created with other settings ({'; '.join(differ)}); pass "
            "the same settings, or create a new data set"
        )
    is_labelled = base["class_names"] and source.source_class_names
    if is_labelled and not set(base["class_names"]) & set(source.source_class_names):
        raise StageError(
            f"--append: the classes are {', '.join(source.source_class_names[:5])}, …, those of "
            f"{output_dir} are {', '.join(base['class_names'][:5])}, …; expected common "
            f"classes: pass the data set's names by --class_names=@{output_dir}"
        )
    if list(source.image_shape) != base["image_shape"]:
        height, width, channels = base["image_shape"]
        flags = f"--image_size={height}x{width}{' --grayscale' if channels == 1 else ''}"
        raise StageError(
            f"--append: the images are {source.image_shape}, those of {output_dir} are "
            f"{tuple(base['image_shape'])}; expected the same shape: pass {flags}"
        )


def _is_in(base: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether the data set holds all records of this source with this conversion."""
    made_from, holds = base["made_from"], False
    for key in (create.SOURCE, *sorted(key for key in made_from if key.startswith(taken.APPENDED))):
        # An append that replaces records may have replaced those of this source.
        holds = holds and "replaced" not in made_from[key]
        earlier = {k: v for k, v in made_from[key].items() if k not in _OF_A_JOB}
        holds |= earlier == identity and "kept" not in made_from[key]
    return holds


def _layout(
    settings: create.Settings,
    base: Mapping[str, Any],
    num_new: Mapping[str, int],
    image_shape: tuple[int, ...],
) -> Layout:
    """The new shards, numbered after the existing ones."""
    if settings.num_shards is not None:  # A night may bring fewer records than that.
        at_most = max(1, sum(num_new.values()))
        settings = dataclasses.replace(settings, num_shards=min(settings.num_shards, at_most))
    num_shards = create.num_shards(settings, num_new, image_shape) if num_new else {}
    numbers = rewriting.next_numbers([entry for entry in base["files"] if is_shard(entry)])
    return Layout(
        **settings.shared(),
        num_shards=num_shards,
        first_shard={split: numbers.get(split, 0) for split in num_shards},
        num_in_names={**num_shards, **base["num_shards"]},
    )
