"""A finished data set grown by the records of an image set that it doesn't hold yet.

Shards that are there stay as they are; until the manifest is replaced, in one step at
the end, the directory is the set that it was (tensorflow-datasets, which goes by
dataset_info.json, sees the new records a moment earlier).
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from pipeline.cli.errors import StageError
from pipeline.datasets.building import create as create_set
from pipeline.datasets.building import finish as finish_set
from pipeline.datasets.building import new_records
from pipeline.datasets.building.create import Request
from pipeline.datasets.building.shard_writer import Layout
from pipeline.sources import conversion, opened_source
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.output_directory import OutputDirectory

# Keys of `made_from` that say what was appended begin so.
_APPENDED = "appended-"


def append(request: Request) -> dict[str, Any]:
    """Adds the records of an image set that a finished data set doesn't hold, as new shards.

    Args:
      request: its output_dir is the data set's; its settings are those that the set was made
        with, but for num_shards, which is that of the new shards.

    Returns:
      The manifest, with the key "reused" where there was nothing to add.

    Raises:
      StageError: the source or the data set cannot be used, they don't fit together, or an id
        is there already with other content.
    """
    output_dir = request.output_dir
    base = manifest_lib.read_manifest(output_dir, "preprocess", "output_dir")
    numbered_as = tuple(base["class_names"])
    source = conversion.open_converted(dataclasses.replace(request.reading, numbered_as=numbered_as))
    create_set.check(request.settings, source)
    _check_fits(output_dir, base, request.settings, source)
    appended = manifest_lib.through_json(create_set.source_identity(request.reading, source))
    held = OutputDirectory(output_dir, stage="preprocess", made_from=base["made_from"])
    with (
        held.held(),
        opened_source.reporting_source_changes(source.check_unchanged, held.tasks.clear),
    ):
        if manifest_lib.read_manifest(output_dir, "preprocess", "output_dir") != base:
            raise StageError(
                f"--output_dir={output_dir}: another process has changed it just now; run the same "
                "command again"
            )
        if request.overwrite:
            held.undo_append(base)
        # What describes the set is written anew, and an append that was killed may have begun to.
        described = [e for e in base["files"] if e["name"] in finish_set.NAMES]
        if not held.is_complete(e for e in base["files"] if e not in described):
            raise StageError(
                f"--output_dir={output_dir}: a file of the data set is missing or damaged; see "
                "python -m pipeline.verify, and make the set again with --overwrite before you "
                "append to it"
            )

        def nothing_new() -> dict[str, Any]:
            held.forget_finished(base)
            if not held.is_complete(described):
                raise StageError(
                    f"--output_dir={output_dir}: has all records of the source, but a file that "
                    "describes it is damaged, or of an append that was not finished; see python -m "
                    "pipeline.verify, and finish that append, or make the set again with "
                    "--overwrite"
                )
            return {**base, "reused": True}

        if _is_in(base, appended):
            return nothing_new()
        try:
            blocks, num_new, num_there = new_records.find(
                reading=source.for_workers(),
                num_records=source.num_records,
                base=base,
                tasks=held.tasks,
                options=request.options,
            )
            layout = _layout(request.settings, base, num_new, source.image_shape)
        except StageError:
            held.forget_finished(base)
            raise
        if not num_new:
            return nothing_new()
        number = 1 + sum(key.startswith(_APPENDED) for key in base["made_from"])
        of_append = {**appended, "num_shards": layout.num_shards}
        made_from = {**base["made_from"], f"{_APPENDED}{number:04d}": of_append}
        output = OutputDirectory(output_dir, stage="preprocess", made_from=made_from)
        names = create_set.file_names(layout)
        output.begin_append(names)
        print(
            f"preprocess: {sum(num_new.values()):,} new records, {num_there:,} are there already",
            file=sys.stderr,
            flush=True,
        )
        return create_set.write_set(
            request,
            source=source,
            layout=layout,
            blocks=blocks,
            output=output,
            base=base,
            num_there=num_there,
        )


def _check_fits(
    output_dir: str,
    base: Mapping[str, Any],
    settings: create_set.Settings,
    source: conversion.ConvertedSource,
) -> None:
    """Raises a StageError if a source cannot be added to a data set."""
    shared = {key: base["made_from"][key] for key in settings.shared()}
    differ = manifest_lib.differences(shared, settings.shared())
    if differ:
        raise StageError(
            f"--append: {output_dir} was made with other settings ({'; '.join(differ)}); pass the "
            "same, or make a new data set"
        )
    if not set(source.class_names[: len(base["class_names"])]) & set(source.own_class_names):
        raise StageError(
            f"--append: the classes are {', '.join(source.own_class_names[:5])}, …, those of "
            f"{output_dir} are {', '.join(base['class_names'][:5])}, …; expected some of the same: "
            "pass their names as --class_names"
        )
    if list(source.image_shape) != base["image_shape"]:
        height, width, channels = base["image_shape"]
        flags = f"--image_size={height}x{width}" + " --grayscale" * (channels == 1)
        raise StageError(
            f"--append: the images are {source.image_shape}, those of {output_dir} are "
            f"{tuple(base['image_shape'])}; expected the same shape: pass {flags}"
        )


def _is_in(base: Mapping[str, Any], appended: Mapping[str, Any]) -> bool:
    """Whether this very source, converted so, is in the set already."""
    for key, earlier in base["made_from"].items():
        if key == create_set.SOURCE or key.startswith(_APPENDED):
            if {k: v for k, v in earlier.items() if k != "num_shards"} == appended:
                return True
    return False


def _layout(
    settings: create_set.Settings,
    base: Mapping[str, Any],
    num_new: Mapping[str, int],
    image_shape: tuple[int, ...],
) -> Layout:
    """The shards that the new records go to, numbered on from those that are there."""
    num_shards = create_set.num_shards(settings, num_new, image_shape) if num_new else {}
    there = [entry["split"] for entry in base["files"] if "split" in entry]
    return Layout(
        **settings.shared(),
        num_shards=num_shards,
        first={split: there.count(split) for split in num_shards},
        named={**num_shards, **base["num_shards"]},
    )
