"""A finished data set grown by the records of an image set that it doesn't hold yet.

Shards that are there stay as they are; until the manifest is replaced, in one step at
the end, the directory is the set that it was.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline import (
    convert,
    describe_shards,
    find_new,
    finish_set,
    make_set,
    quarantine,
    stage,
    write_shards,
)
from pipeline.errors import StageError
from pipeline.output_directory import OutputDirectory
from pipeline.write_shards import Layout

# Keys of `made_from` that say what was appended begin so.
_APPENDED = "appended-"


def append(
    *,
    reading: convert.Reading,
    settings: make_set.Settings,
    output_dir: str,
    max_quarantined: quarantine.Limit,
    overwrite: bool,
    options: PipelineOptions,
) -> dict[str, Any]:
    """Adds the records of an image set that a finished data set doesn't hold, as new shards.

    Args:
      reading: the source; its records that are there already are left out.
      settings: as the data set was made; num_shards is that of the new shards.
      output_dir: the data set's directory.
      max_quarantined: how many records may be bad.
      overwrite: whether what an unfinished append of other inputs has written may go.
      options: Beam's.

    Returns:
      The manifest, with the key "reused" where there was nothing to add.

    Raises:
      StageError: the source or the data set cannot be used, they don't fit together, or an id
        is there already with other content.
    """
    base = stage.read_manifest(output_dir, "preprocess", "output_dir")
    reading = dataclasses.replace(reading, numbered_as=tuple(base["class_names"]))
    source = convert.open_reading(reading)
    make_set.check(settings, source)
    _check_fits(output_dir, base, settings, source)
    appended = stage.through_json(make_set.of_source(reading, source))
    output = OutputDirectory(output_dir, stage="preprocess", made_from=base["made_from"])
    with output.held():
        base = stage.read_manifest(output_dir, "preprocess", "output_dir")
        # An append that was killed may have changed what describes the set.
        shards_alone = [e for e in base["files"] if e["name"] not in finish_set.NAMES]
        if not output.is_complete({"files": shards_alone}):
            raise StageError(
                f"--output_dir={output_dir}: a file of the data set is missing or cut; see python "
                "-m pipeline.verify, and make it again before you append to it"
            )
        for key, earlier in base["made_from"].items():
            if key == make_set.SOURCE or key.startswith(_APPENDED):
                if {k: v for k, v in earlier.items() if k != "num_shards"} == appended:
                    output.forget_finished(base)
                    return {**base, "reused": True}
        return _append_held(
            source=source,
            settings=settings,
            base=base,
            appended=appended,
            output_dir=output_dir,
            max_quarantined=max_quarantined,
            overwrite=overwrite,
            options=options,
        )


def _check_fits(
    output_dir: str,
    base: Mapping[str, Any],
    settings: make_set.Settings,
    source: convert.ConvertedSource,
) -> None:
    """Raises a StageError if a source cannot be added to a data set."""
    shared = {key: base["made_from"][key] for key in settings.shared()}
    differ = stage.differences(shared, settings.shared())
    if differ:
        raise StageError(
            f"--append: {output_dir} was made with other settings ({'; '.join(differ)}); pass the "
            "same, or make a new data set"
        )
    if list(source.image_shape) != base["image_shape"]:
        height, width, channels = base["image_shape"]
        flags = f"--image_size={height}x{width}" + " --grayscale" * (channels == 1)
        raise StageError(
            f"--append: the images are {source.image_shape}, those of {output_dir} are "
            f"{tuple(base['image_shape'])}; expected the same shape: pass {flags}"
        )


def _append_held(
    *,
    source: convert.ConvertedSource,
    settings: make_set.Settings,
    base: dict[str, Any],
    appended: dict[str, Any],
    output_dir: str,
    max_quarantined: quarantine.Limit,
    overwrite: bool,
    options: PipelineOptions,
) -> dict[str, Any]:
    """Appends to a directory that this process holds."""
    held = OutputDirectory(output_dir, stage="preprocess", made_from=base["made_from"])
    try:
        blocks, num_new, num_there = find_new.find_new(
            reading=source.for_workers(),
            num_records=source.num_records,
            base=base,
            output=held,
            options=options,
        )
        num_shards = make_set.num_shards(settings, num_new, source.image_shape) if num_new else {}
    except StageError:
        held.forget_finished(base)
        raise
    if not num_new:
        held.forget_finished(base)
        return {**base, "reused": True}
    there = [entry for entry in base["files"] if "split" in entry]
    first = {s: sum(entry["split"] == s for entry in there) for s in num_shards}
    named = {**num_shards, **base["num_shards"]}
    layout = Layout(**settings.shared(), num_shards=num_shards, first=first, named=named)
    number = 1 + sum(key.startswith(_APPENDED) for key in base["made_from"])
    made_from = {
        **base["made_from"],
        f"{_APPENDED}{number:04d}": {**appended, "num_shards": num_shards},
    }
    output = OutputDirectory(output_dir, stage="preprocess", made_from=made_from)
    names = [*layout.tasks(), *map(quarantine.file_name, layout.tasks()), *finish_set.NAMES]
    output.begin_append(names, base, overwrite=overwrite)
    print(
        f"preprocess: {sum(num_new.values()):,} new records, {num_there:,} are there already",
        file=sys.stderr,
        flush=True,
    )
    buckets = describe_shards.num_buckets(source.num_records + base["records"]["written"])
    write_shards.write_shards(
        reading=source.for_workers(),
        layout=layout,
        blocks=blocks,
        there=there,
        num_buckets=buckets,
        output=output,
        options=options,
    )
    return finish_set.finish(
        source=source,
        layout=layout,
        output=output,
        max_quarantined=max_quarantined,
        num_buckets=buckets,
        base=base,
        num_there=num_there,
    )
