"""Turns an image set into TFRecord shards.

    python -m pipeline.preprocess --source=sample --output_dir=DIR
    python -m pipeline.preprocess --source=idx:DIR --output_dir=DIR [Beam options]

Flags that are not listed here go to Apache Beam (--runner, --direct_num_workers, …).
"""

# This file holds only flags and printed messages; the job is in datasets/building/create.py.

import sys

from absl import flags

from pipeline.cli import command, quiet
from pipeline.formats import tfrecord
from pipeline.sources import flags as source_flags

flags.adopt_module_key_flags(source_flags)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory to write; local or a URL.")
_COMPRESSION = flags.DEFINE_enum(
    "compression",
    "none",
    tfrecord.COMPRESSIONS,
    "Compression of shard files; tensorflow-datasets reads only 'none'.",
)
_MAX_QUARANTINED = flags.DEFINE_string(
    "max_quarantined", "0.1%", "Maximum number (25) or share (0.1%) of unreadable records."
)
_APPEND = flags.DEFINE_bool(
    "append", False, "Append the source's new records to the finished data set in output_dir."
)
_ON_CHANGED = flags.DEFINE_enum(
    "on_changed",
    "fail",
    ["fail", "keep", "replace"],
    "With --append, if an id comes again with another image or label: stop, keep the record of the "
    "data set and warn, or replace it.",
)
_REREAD = flags.DEFINE_bool(
    "reread",
    False,
    "With --append, read files again that have the size and the time, or the etag, of an earlier "
    "run, and the shards of the data set.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Try some images, print what would be read, and how, and write nothing."
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite",
    False,
    "Replace the output of another run of this command in output_dir; with --append, undo an "
    "unfinished append.",
)
_STATUS_ON_CONFLICT = flags.DEFINE_integer(
    "status_on_conflict",
    1,
    "Exit status if output_dir holds an unfinished run with other inputs; lets a script see that.",
    lower_bound=1,
    upper_bound=125,
)
flags.mark_flags_as_required(["source"])
flags.register_multi_flags_validator(
    ["output_dir", "dry_run", "append"],
    lambda values: values["output_dir"] is not None or (values["dry_run"] and not values["append"]),
    message="Flag --output_dir must have a value, except with --dry_run and without --append.",
)
_SUBJECTS = {
    **source_flags.SUBJECTS,
    "Output": ("output_dir", "overwrite", "compression", "dry_run"),
    "Append": ("append", "on_changed", "reread"),
    "Bad records and exit status": ("max_quarantined", "status_on_conflict"),
}


def run(beam_args: list[str]) -> None:
    """Runs the job that the flags describe and prints its results."""
    quiet.import_beam()
    from pipeline.datasets.building import append as append_set
    from pipeline.datasets.building import create as create_set
    from pipeline.runners import cluster
    from pipeline.runners import options as beam_options
    from pipeline.stages import output_directory, quarantine

    options = beam_options.parse_options(beam_args)
    source_spec = source_flags.source_spec()
    cluster.check_paths(options, source=source_spec.source, output_dir=_OUTPUT_DIR.value)
    request = create_set.Request(
        source_spec=source_spec,
        settings=create_set.Settings(
            name=source_flags.NAME.value,
            num_shards=source_flags.num_shards(),
            validation_fraction=source_flags.VALIDATION_FRACTION.value,
            seed=source_flags.SEED.value,
            compression=_COMPRESSION.value,
        ),
        output_dir=_OUTPUT_DIR.value or "",
        max_quarantined=quarantine.parse_limit(_MAX_QUARANTINED.value),
        overwrite=_OVERWRITE.value,
        options=options,
        on_changed=_ON_CHANGED.value,
        reread=_REREAD.value,
    )
    if _DRY_RUN.value:
        _dry_run(request)
        return
    make = append_set.append_records if _APPEND.value else create_set.create_dataset
    try:
        manifest = make(request)
    except output_directory.UnfinishedConflict as error:
        error.exit_status = _STATUS_ON_CONFLICT.value
        raise
    for warning in manifest["warnings"]:
        print(f"preprocess: warning: {warning}", file=sys.stderr)
    num_changed = manifest.get("num_changed", 0)
    if not manifest.get("reused"):
        num_changed = manifest.get("last_append", {}).get("changed", 0)
    if num_changed:
        print(
            f"preprocess: warning: {num_changed:,} records have another image or label in the "
            "source than in the data set, which keeps its own: --on_changed=replace takes the new "
            "ones",
            file=sys.stderr,
        )
    print(f"preprocess: {_total(manifest)}, {_OUTPUT_DIR.value}")


def _dry_run(request) -> None:
    """Prints what the job would read; refuses what the job would refuse before it writes."""
    from pipeline.datasets.building import append, create, reading

    if _APPEND.value:
        request, source = append.opened(request)
    else:
        request, source, _, output = create.plan(request)
        if request.output_dir and not request.overwrite:
            output.check()
    settings = request.settings
    lines = reading.lines(source, settings.name, settings.validation_fraction)
    for line in [*lines, *reading.unreadable(source)]:
        print(f"preprocess: {line}")
    ending = "records are compared with those of the data set when they are appended"
    print(f"preprocess: --dry_run: nothing is written{f'; {ending}' if _APPEND.value else ''}")


def _total(manifest: dict) -> str:
    """The number of records by outcome, in one line."""
    from pipeline.datasets.building.reading import ignored_text

    splits = ", ".join(f"{split} {count:,}" for split, count in manifest["splits"].items())
    records = manifest["records"]
    state = "already finished" if manifest.get("reused") else "finished"
    if _APPEND.value and manifest.get("reused"):
        text = "nothing to append: every record is already in the data set"
        return f"{text} ({splits}), {_id(manifest)}"
    if _APPEND.value:
        state, records = "appended", manifest["last_append"]
    counts = f"{records['read']:,} read = {records['written']:,} written"
    if records["quarantined"]:
        counts += f" + {records['quarantined']:,} quarantined"
    if records.get("there"):
        counts += f" + {records['there']:,} already in the data set"
    if records.get("ignored"):
        counts += f"; ignored {ignored_text(records['ignored'])}"
    return f"{state}: {counts} ({splits}), {_id(manifest)}"


def _id(manifest: dict) -> str:
    return f"dataset_id {manifest['dataset_id']}"


def main() -> None:
    """Entry point of `vae-preprocess`."""
    command.run(run, name="preprocess", doc=__doc__, module=__name__, subjects=_SUBJECTS, beam=True)


if __name__ == "__main__":
    main()
