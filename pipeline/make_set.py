"""A data set directory, made from an image set or grown by one: what job 1 does in all.

The shards are written by write_shards.py; here is what comes before and after.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline import (
    convert,
    describe_shards,
    find_new,
    finish_set,
    placement,
    quarantine,
    stage,
    tfrecord,
    write_shards,
)
from pipeline.errors import StageError, UsageError
from pipeline.output_directory import OutputDirectory
from pipeline.write_shards import Layout

# --num_shards=auto aims at this, so that shards have 64 to 256 MiB where there is enough.
_SHARD_BYTES = 128 << 20
# What a record takes beside its pixels: id, names of features, frame.
_RECORD_OVERHEAD = 80
_APPENDED = "appended-"


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


def _check(settings: Settings, source: convert.ConvertedSource) -> None:
    """Raises a UsageError for settings that this source cannot have."""
    if settings.compression not in tfrecord.COMPRESSIONS:
        raise UsageError(
            f"--compression={settings.compression}: expected {' or '.join(tfrecord.COMPRESSIONS)}"
        )
    limit = 1 - placement.TEST_FRACTION if placement.UNSPLIT in source.split_sizes else 1
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


def _num_shards(
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


def _of_source(reading: convert.Reading, source: convert.ConvertedSource) -> dict[str, Any]:
    """What shapes a source's records; goes into `made_from`."""
    return {
        "fingerprint": source.fingerprint(),
        "image_size": reading.image_size,
        "grayscale": reading.grayscale,
        "transpose": reading.transpose,
        "id_prefix": reading.id_prefix,
        "class_names": reading.class_names,
    }


def make_set(
    *,
    reading: convert.Reading,
    settings: Settings,
    output_dir: str,
    max_quarantined: quarantine.Limit,
    overwrite: bool,
    options: PipelineOptions,
) -> dict[str, Any]:
    """Turns an image set into a finished data set directory.

    Args:
      reading: the source, and how it is converted.
      settings: of the data set.
      output_dir: local path or fsspec URL.
      max_quarantined: how many records may be bad.
      overwrite: whether output of other inputs may be replaced.
      options: Beam's.

    Returns:
      The manifest, with the key "reused" where nothing had to be done.

    Raises:
      StageError: the source or the output directory cannot be used.
    """
    source = convert.open_reading(reading)
    _check(settings, source)
    sizes = dict(placement.expected_sizes(source.split_sizes, settings.validation_fraction))
    num_shards = _num_shards(settings, sizes, source.image_shape)
    made_from = {
        **settings.shared(),
        "source": {**_of_source(reading, source), "num_shards": num_shards},
    }
    layout = Layout(
        **settings.shared(),
        num_shards=num_shards,
        first=dict.fromkeys(num_shards, 0),
        named=num_shards,
    )
    output = OutputDirectory(output_dir, stage="preprocess", made_from=made_from)
    names = [*layout.tasks(), *map(quarantine.file_name, layout.tasks()), *finish_set.NAMES]
    with output.opened(names, overwrite=overwrite) as finished:
        if finished is not None:
            return {**finished, "reused": True}
        buckets = describe_shards.num_buckets(source.num_records)
        write_shards.write_shards(
            reading=source.for_workers(),
            layout=layout,
            blocks=write_shards.blocks_of(source.num_records),
            there=[],
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
        )


def append(
    *,
    reading: convert.Reading,
    settings: Settings,
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
    _check(settings, source)
    _check_fits(output_dir, base, settings, source)
    appended = stage.through_json(_of_source(reading, source))
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
            if key == "source" or key.startswith(_APPENDED):
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
    settings: Settings,
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
    settings: Settings,
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
        num_shards = _num_shards(settings, num_new, source.image_shape) if num_new else {}
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
