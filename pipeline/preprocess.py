"""Turns an image set into TFRecord shards.

    python -m pipeline.preprocess --source=sample --output_dir=DIR
    python -m pipeline.preprocess --source=idx:DIR --output_dir=DIR [Beam options]

Flags that are not listed here go to Apache Beam (--runner, --direct_num_workers, …).
This file holds flags and nothing else; the job is in datasets/building/create.py.
"""

import sys

from absl import flags

from pipeline.cli import command, quiet
from pipeline.sources import flags as source_flags

flags.adopt_module_key_flags(source_flags)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory to write; local or a URL.")
_COMPRESSION = flags.DEFINE_enum(
    "compression", "none", ["none", "gzip"], "Packing of shard files; TFDS reads only 'none'."
)
_MAX_QUARANTINED = flags.DEFINE_string(
    "max_quarantined", "0.1%", "Bad records to put up with: a count (25) or a share (0.1%)."
)
_APPEND = flags.DEFINE_bool(
    "append", False, "Add the source's new records to the finished data set in output_dir."
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite",
    False,
    "Replace what another run of this command left in output_dir; with --append, undo an "
    "append that was not finished.",
)
_STATUS_ON_CONFLICT = flags.DEFINE_integer(
    "status_on_conflict",
    1,
    "Exit status if output_dir holds an unfinished run with other inputs; lets a script see that.",
    lower_bound=1,
    upper_bound=125,
)
flags.mark_flags_as_required(["source", "output_dir"])


def run(beam_args: list[str]) -> None:
    """Runs the job that the flags describe and prints what it made."""
    quiet.import_beam()
    from pipeline.datasets.building import append as append_set
    from pipeline.datasets.building import create as create_set
    from pipeline.runners import cluster
    from pipeline.runners import options as beam_options
    from pipeline.stages import output_directory, quarantine

    options = beam_options.parse_options(beam_args)
    reading = source_flags.reading()
    cluster.check_paths(options, source=reading.spec, output_dir=_OUTPUT_DIR.value)
    request = create_set.Request(
        reading=reading,
        settings=create_set.Settings(
            name=source_flags.NAME.value,
            num_shards=source_flags.num_shards(),
            validation_fraction=source_flags.VALIDATION_FRACTION.value,
            seed=source_flags.SEED.value,
            compression=_COMPRESSION.value,
        ),
        output_dir=_OUTPUT_DIR.value,
        max_quarantined=quarantine.parse_limit(_MAX_QUARANTINED.value),
        overwrite=_OVERWRITE.value,
        options=options,
    )
    make = append_set.append if _APPEND.value else create_set.make_set
    try:
        manifest = make(request)
    except output_directory.UnfinishedConflict as error:
        error.exit_status = _STATUS_ON_CONFLICT.value
        raise
    for warning in manifest["warnings"]:
        print(f"preprocess: warning: {warning}", file=sys.stderr)
    print(f"preprocess: {_account(manifest)}, {_OUTPUT_DIR.value}")


def _account(manifest: dict) -> str:
    """What became of every record, in a line."""
    splits = ", ".join(f"{split} {count:,}" for split, count in manifest["splits"].items())
    records = manifest["records"]
    done = "already finished" if manifest.get("reused") else "finished"
    if _APPEND.value and manifest.get("reused"):
        return f"nothing to append: all of it is there ({splits}), {_id(manifest)}"
    if _APPEND.value:
        done, records = "appended", manifest["last_append"]
    account = f"{records['read']:,} read = {records['written']:,} written"
    if records["quarantined"]:
        account += f" + {records['quarantined']:,} quarantined"
    if records.get("there"):
        account += f" + {records['there']:,} there before"
    return f"{done}: {account} ({splits}), {_id(manifest)}"


def _id(manifest: dict) -> str:
    return f"dataset_id {manifest['dataset_id']}"


def main() -> None:
    """Entry point of `vae-preprocess`."""
    command.run(run, name="preprocess", doc=__doc__, module=__name__, beam=True)


if __name__ == "__main__":
    main()
