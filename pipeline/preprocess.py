"""Turns an image set into TFRecord shards.

    python -m pipeline.preprocess --source=sample --output_dir=DIR
    python -m pipeline.preprocess --source=idx:DIR --output_dir=DIR [Beam options]

Flags that are not listed here go to Apache Beam (--runner, --direct_num_workers, …).
"""

# This file holds only flags and printed messages; api/data_sets.py begins the job.

import sys
from collections.abc import Sequence

from absl import flags

from pipeline.api import data_sets, keywords, rules
from pipeline.cli import command, flag_parsing, metrics_file
from pipeline.cli.errors import printable
from pipeline.datasets.profile import measures
from pipeline.formats import tfrecord
from pipeline.sources import flags as source_flags

flags.adopt_module_key_flags(source_flags)
_DEFAULTS = keywords.PreprocessKeywords()
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", _DEFAULTS.output_dir, "Directory to write; local or a URL."
)
flags.DEFINE_enum(
    "compression",
    _DEFAULTS.compression,
    tfrecord.COMPRESSIONS,
    "Compression of shard files; tensorflow-datasets reads only 'none'.",
)
flags.DEFINE_string(
    "max_quarantined",
    _DEFAULTS.max_quarantined,
    "Maximum number (25) or share (0.1%) of unreadable records.",
)
_APPEND = flags.DEFINE_bool(
    "append",
    _DEFAULTS.append,
    "Append the source's new records to the finished data set in output_dir.",
)
flags.DEFINE_enum(
    "on_changed",
    _DEFAULTS.on_changed,
    rules.ON_CHANGED,
    "With --append, if an id comes again with another image or label: stop, keep the record of the "
    "data set and warn, or replace it.",
)
flags.DEFINE_bool(
    "reread",
    _DEFAULTS.reread,
    "With --append, read files again that have the size and the time, or the etag, of an earlier "
    "run, and the shards of the data set.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Try some images, print what would be read, and how, and write nothing."
)
flags.DEFINE_bool(
    "overwrite",
    _DEFAULTS.overwrite,
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
flags.DEFINE_string(
    "require",
    _DEFAULTS.require,
    "Reject the data set unless these bounds hold, such as min_class_share>=0.02,duplicates<0.01: "
    "no command trains or exports from a rejected set, and a rejected append leaves the set as it "
    f"was. Metrics: {', '.join(measures.NAMES)}.",
)
_STATUS_ON_REJECTION = flags.DEFINE_integer(
    "status_on_rejection",
    1,
    "Exit status if a bound of --require does not hold; lets a script see that.",
    lower_bound=1,
    upper_bound=125,
)
flags.DEFINE_string(
    "reference",
    _DEFAULTS.reference,
    "A data set to compare the records with; warns if classes, brightness or contrast have "
    "drifted. With --append the new records are compared, and the set itself may be named.",
)
metrics_file.define_flag()
flags.mark_flags_as_required(["source"])
flags.register_multi_flags_validator(
    ["output_dir", "dry_run", "append"],
    lambda values: values["output_dir"] is not None or (values["dry_run"] and not values["append"]),
    message="Flag --output_dir must have a value, except with --dry_run and without --append.",
)
# Flags that are no keywords of the API.
COMMAND_LINE_ONLY = ("dry_run", "status_on_conflict", "status_on_rejection")
_SUBJECTS = {
    **source_flags.SUBJECTS,
    "Output": ("output_dir", "overwrite", "compression", "dry_run"),
    "Append": ("append", "on_changed", "reread"),
    "Bad records, exit status": ("max_quarantined", "status_on_conflict"),
    "Gate, drift, metrics": ("require", "status_on_rejection", "reference", "metrics_file"),
}


def _keywords(beam_args: list[str]) -> keywords.PreprocessKeywords:
    values = flag_parsing.values_of(__name__)
    for name in COMMAND_LINE_ONLY:
        del values[name]
    return keywords.PreprocessKeywords(**values, beam_args=beam_args)


def run(beam_args: list[str]) -> None:
    """Runs the job that the flags describe and prints its results."""
    settings = _keywords(beam_args)
    if _DRY_RUN.value:
        _dry_run(settings)
        return
    from pipeline.stages import gate, output_directory

    try:
        manifest = data_sets.make(settings)
    except gate.Rejected as error:
        _print_warnings(error.warnings)
        error.exit_status = _STATUS_ON_REJECTION.value
        raise
    except output_directory.UnfinishedConflict as error:
        error.exit_status = _STATUS_ON_CONFLICT.value
        raise
    _print_warnings(data_sets.warnings(manifest))
    print(f"preprocess: {_total(manifest)}, {_OUTPUT_DIR.value}")


def _print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"preprocess: warning: {printable(warning)}", file=sys.stderr)


def _dry_run(settings: keywords.PreprocessKeywords) -> None:
    """Prints what the job would read; refuses what the job would refuse before it writes."""
    metrics_file.disable()
    with data_sets.requested(settings) as request:
        from pipeline.datasets.building import append, create, reading

        if _APPEND.value:
            request, source = append.opened(request)
        else:
            request, source, _, output = create.plan(request)
            if request.output_dir and not request.overwrite:
                output.check()
        resolved = request.settings
        lines = reading.lines(source, resolved.name, resolved.validation_fraction)
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
