"""Appends the new records of an image set to a finished data set.

Existing shards do not change. The manifest is replaced last, in one atomic step; until then the
directory is the old data set. tensorflow-datasets reads dataset_info.json, which is replaced
shortly before.
"""

import sys
from collections.abc import Mapping
from typing import Any

from pipeline.cli.errors import StageError
from pipeline.datasets.building import create, finish, new_records, reading
from pipeline.datasets.building.create import Request
from pipeline.datasets.building.shard_writer import Layout
from pipeline.sources import conversion, opened_source
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import is_shard
from pipeline.stages.output_directory import OutputDirectory

# Start of the keys of `made_from` for appended sources.
_APPENDED = "appended-"


def append_records(request: Request) -> dict[str, Any]:
    """Appends the records of an image set that a finished data set does not hold, as new shards.

    Args:
      request: output_dir is the data set's directory. The settings are those of the data set,
        except num_shards, the number of new shards.

    Returns:
      The manifest, with the key "reused" if there was nothing to append.

    Raises:
      StageError: the source or the data set cannot be used, they do not fit together, or an id
        is in the data set with another record.
    """
    output_dir = request.output_dir
    base = manifest_lib.read_manifest(output_dir, "preprocess", "--output_dir")
    request, source = opened(request, base)
    identity = manifest_lib.through_json(create.source_identity(request.source_spec, source))
    directory = OutputDirectory(output_dir, stage="preprocess", made_from=base["made_from"])
    with (
        directory.locked(),
        opened_source.reporting_source_changes(source.check_unchanged, directory.tasks.clear),
    ):
        if manifest_lib.read_manifest(output_dir, "preprocess", "--output_dir") != base:
            raise StageError(
                f"--output_dir={output_dir}: another process has just changed the data set; run "
                "the same command again"
            )
        if request.overwrite:
            directory.undo_append(base)
        # An append rewrites the files that describe the set, so a killed append may have changed
        # them.
        description = [e for e in base["files"] if e["name"] in finish.NAMES]
        if not directory.is_complete(e for e in base["files"] if e not in description):
            raise StageError(
                f"--output_dir={output_dir}: a file of the data set is missing or damaged; find it "
                "with python -m pipeline.verify, and create the data set again with --overwrite "
                "before you append to it"
            )

        def nothing_new() -> dict[str, Any]:
            directory.forget_finished(base)
            if not directory.is_complete(description):
                raise StageError(
                    f"--output_dir={output_dir}: holds all records of the source, but a file that "
                    "describes the data set is damaged or belongs to an unfinished append; find it "
                    "with python -m pipeline.verify, and finish that append, or create the data "
                    "set again with --overwrite"
                )
            return {**base, "reused": True}

        if _is_in(base, identity):
            return nothing_new()
        reading.announce("preprocess", source, request.settings.validation_fraction)
        try:
            blocks, num_new, num_existing = new_records.find(
                source_spec=source.for_workers(),
                num_records=source.num_records,
                base=base,
                tasks=directory.tasks,
                options=request.options,
            )
            layout = _layout(request.settings, base, num_new, source.image_shape)
        except StageError:
            directory.forget_finished(base)
            raise
        if not num_new:
            return nothing_new()
        number = 1 + sum(key.startswith(_APPENDED) for key in base["made_from"])
        appended = {**identity, "num_shards": layout.num_shards}
        made_from = {**base["made_from"], f"{_APPENDED}{number:04d}": appended}
        output = OutputDirectory(output_dir, stage="preprocess", made_from=made_from)
        names = create.file_names(layout)
        output.begin_append(names)
        print(
            f"preprocess: {sum(num_new.values()):,} new records, {num_existing:,} already in the "
            "data set",
            file=sys.stderr,
            flush=True,
        )
        return create.write_dataset(
            request,
            source=source,
            layout=layout,
            blocks=blocks,
            output=output,
            base=base,
            num_existing=num_existing,
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
            "classes: pass the data set's names as --class_names"
        )
    if list(source.image_shape) != base["image_shape"]:
        height, width, channels = base["image_shape"]
        flags = f"--image_size={height}x{width}{' --grayscale' if channels == 1 else ''}"
        raise StageError(
            f"--append: the images are {source.image_shape}, those of {output_dir} are "
            f"{tuple(base['image_shape'])}; expected the same shape: pass {flags}"
        )


def _is_in(base: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether the data set already holds this source with this conversion."""
    for key, earlier in base["made_from"].items():
        if key == create.SOURCE or key.startswith(_APPENDED):
            if {k: v for k, v in earlier.items() if k != "num_shards"} == identity:
                return True
    return False


def _layout(
    settings: create.Settings,
    base: Mapping[str, Any],
    num_new: Mapping[str, int],
    image_shape: tuple[int, ...],
) -> Layout:
    """The new shards, numbered after the existing ones."""
    num_shards = create.num_shards(settings, num_new, image_shape) if num_new else {}
    shard_splits = [entry["split"] for entry in base["files"] if is_shard(entry)]
    return Layout(
        **settings.shared(),
        num_shards=num_shards,
        first_shard={split: shard_splits.count(split) for split in num_shards},
        num_in_names={**num_shards, **base["num_shards"]},
    )
