"""Writes the embeddings of an image set, and pictures of its reconstructions.

    python -m pipeline.export --data_dir=DIR --model_dir=WORKDIR/export --output_dir=DIR
    python -m pipeline.export --source=folder:DIR --model_dir=… --output_dir=DIR

For each shard it writes a file with one row for each record, and a PNG of originals above their
reconstructions; then it writes report.html. A rerun computes only new records. Flags that are not
listed here go to Apache Beam.
"""

# This file holds only flags and printed messages; the job is in embeddings/create.py.

import collections
import sys

from absl import flags

from pipeline.cli import command, quiet
from pipeline.cli.errors import UsageError
from pipeline.datasets import reader
from pipeline.embeddings import files as row_files
from pipeline.embeddings import flags as export_flags
from pipeline.embeddings import rows
from pipeline.sources import flags as source_flags

flags.adopt_module_key_flags(source_flags)
flags.adopt_module_key_flags(export_flags)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "New directory to write; local or a URL.")
_LATEST = flags.DEFINE_string(
    "latest",
    None,
    "Pointer to the newest export, which moves to output_dir after success: a symbolic link, or "
    "for a URL the object LATEST.json. Rows of the export that it names are taken over.",
)
_REUSE_FROM = flags.DEFINE_string(
    "reuse_from", None, "An export whose rows are taken over; by default the one --latest names."
)
_FIELDS = flags.DEFINE_list(
    "fields",
    "mean,log_var,reconstruction_loss,kl",
    "Columns of a row beside id, label and record_sha: mean, log_var, z (a sample, seeded by "
    "--z_seed and the record), reconstruction_loss, kl, elbo.",
)
_EMBEDDING_FORMAT = flags.DEFINE_enum(
    "embedding_format",
    "parquet",
    row_files.FORMATS,
    "Format of the rows: Parquet, an .npy file for each column, or TFRecords of tf.Example.",
)
_IMAGES = flags.DEFINE_enum(
    "images",
    "sheets",
    ["sheets", "all", "none"],
    "Pictures: a contact sheet for each shard, all pictures in a WebDataset .tar for each shard, "
    "or none.",
)
_Z_SEED = flags.DEFINE_integer("z_seed", 0, "Seed of the noise in z.", lower_bound=0)
_REQUIRE = flags.DEFINE_string(
    "require",
    None,
    "Reject the export unless these bounds hold, such as elbo>-110,active_units>=8; --latest does "
    "not move to a rejected export. Metrics of the export: "
    "elbo, reconstruction_loss, kl, active_units, written, quarantined; of the model: "
    "model.SPLIT.NAME.",
)
_STATUS_ON_REJECTION = flags.DEFINE_integer(
    "status_on_rejection",
    1,
    "Exit status if a bound of --require does not hold; lets a script see that.",
    lower_bound=1,
    upper_bound=125,
)
_STATUS_ON_CONFLICT = flags.DEFINE_integer(
    "status_on_conflict",
    1,
    "Exit status if output_dir holds a run with other inputs; lets a script see that.",
    lower_bound=1,
    upper_bound=125,
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "An export to compare with; warns if a distribution has drifted."
)
_REPORT = flags.DEFINE_bool("report", True, "Write report.html, plots/ and projector/.")
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace the output of another run of this command in output_dir."
)
_ON_CORRUPT = flags.DEFINE_enum(
    "on_corrupt",
    "fail",
    reader.ON_CORRUPT,
    "If a shard is damaged: stop, or skip its unreadable records and list them in quarantine/.",
)
_FAST_MATH = flags.DEFINE_bool(
    "fast_math",
    False,
    "On GPUs: faster, but products are rounded to TensorFloat-32 and last digits depend on timing.",
)
_MAX_QUARANTINED = flags.DEFINE_string(
    "max_quarantined", "0.1%", "Maximum number (25) or share (0.1%) of unreadable records."
)
flags.mark_flags_as_required(["model_dir", "output_dir"])
flags.register_validator(
    "fields",
    lambda names: len(set(names)) == len(names) > 0 and set(names) <= set(rows.FIELDS),
    message=f"expected some of {', '.join(rows.FIELDS)}, none of them twice",
)
_SUBJECTS = {
    "Input": ("data_dir", "split", "model_dir", "run_dir", "on_corrupt", "max_quarantined"),
    "Output": (
        *("output_dir", "latest", "reuse_from", "overwrite", "status_on_conflict"),
        *("fields", "embedding_format", "images", "z_seed", "report", "fast_math"),
    ),
    "Gate and drift": ("require", "status_on_rejection", "reference"),
    **{f"{subject}, with --source": names for subject, names in source_flags.SUBJECTS.items()},
}


def run(beam_args: list[str]) -> None:
    """Runs the job that the flags describe and prints its results."""
    quiet.import_beam()
    from pipeline.embeddings import create as create_export
    from pipeline.embeddings import gate
    from pipeline.embeddings.shard import ExportSettings
    from pipeline.reports import create as create_report
    from pipeline.runners import cluster
    from pipeline.runners import options as beam_options
    from pipeline.stages import output_directory, pointer, quarantine

    options = beam_options.parse_options(beam_args)
    cluster.check_paths(options, **export_flags.paths(), output_dir=_OUTPUT_DIR.value)
    latest, seen = _LATEST.value, None
    if latest:
        pointer.check(latest, _OUTPUT_DIR.value)
        seen = pointer.read(latest)
        _check_unpublished(seen)
    reuse_dir = _reuse_dir(seen)
    exports = [] if _OVERWRITE.value else [_OUTPUT_DIR.value]
    exports += [reuse_dir] if reuse_dir else []
    request = create_export.Request(
        input=export_flags.image_set(_ON_CORRUPT.value, exports),
        model_dir=export_flags.MODEL_DIR.value,
        output_dir=_OUTPUT_DIR.value,
        reuse_dir=reuse_dir,
        reference_dir=_REFERENCE.value and pointer.resolve(_REFERENCE.value),
        settings=ExportSettings(
            fields=tuple(_FIELDS.value),
            embedding_format=_EMBEDDING_FORMAT.value,
            images=_IMAGES.value,
            z_seed=_Z_SEED.value,
        ),
        requirements=gate.parse(_REQUIRE.value),
        allow_missing=_ON_CORRUPT.value == "quarantine" or export_flags.is_source(),
        max_quarantined=quarantine.parse_limit(_MAX_QUARANTINED.value),
        overwrite=_OVERWRITE.value,
        options=options,
        fast_math=_FAST_MATH.value,
        only_if_new=seen is not None and _REUSE_FROM.value is None,
    )
    try:
        manifest = create_export.make_export(request)
    except gate.Rejected as error:
        error.exit_status = _STATUS_ON_REJECTION.value
        raise
    except output_directory.Conflict as error:
        error.exit_status = _STATUS_ON_CONFLICT.value
        raise
    directory = manifest["directory"]
    for line in _shard_lines(manifest):
        print(line)
    if text := _kinds(manifest):
        print(f"export: {text}", file=sys.stderr)
    for warning in manifest.get("drift", {}).get("warnings", ()):
        print(f"export: warning: {warning}", file=sys.stderr)
    print(f"export: {_total(manifest)}, export_id {manifest['export_id']}, {directory}")
    create_report.remove_stale(directory, manifest["export_id"])  # After --overwrite.
    if _REPORT.value and not create_report.is_current(directory, manifest["export_id"]):
        page = create_report.make_report(
            directory,
            input_=request.input,
            model_dir=request.model_dir,
            run_dir=export_flags.RUN_DIR.value,
        )
        print(f"export: {page}")
    if latest:
        moved = pointer.move(latest, directory, seen=seen, is_new=True)
        print(f"export: {latest} {'names' if moved else 'still names'} {directory}")


def _check_unpublished(seen) -> None:
    """Raises a UsageError if --overwrite would change the export that --latest names."""
    from pipeline.stages import manifest as manifest_lib
    from pipeline.storage import files

    if seen is None or not _OVERWRITE.value:
        return
    is_there = files.exists(files.join(seen.directory, manifest_lib.MANIFEST))
    if is_there and files.is_within(_OUTPUT_DIR.value, seen.directory):
        raise UsageError(
            f"--overwrite: --latest={_LATEST.value} names {seen.directory}, and its readers would "
            "find it half-written; export into a new directory"
        )


def _reuse_dir(seen) -> str | None:
    """The export whose rows are taken over, if any."""
    from pipeline.stages import pointer

    if _REUSE_FROM.value:
        return pointer.resolve(_REUSE_FROM.value)
    # Without an id, what --latest names is gone or damaged.
    return seen.directory if seen and seen.export_id else None


def _counts(counts: dict) -> str:
    return (
        f"{counts['read']:,} read = {counts['written']:,} written + "
        f"{counts['quarantined']:,} quarantined"
    )


def _shard_lines(manifest: dict) -> list[str]:
    """A line for each shard with computed or quarantined records, and one for all other shards."""
    lines, num_other_shards = [], 0
    other_counts = {"read": 0, "written": 0, "quarantined": 0}
    for task, shard_manifest in manifest["shards"].items():
        num_computed = manifest["done"].get(task, {"computed": 0})["computed"]
        if num_computed or shard_manifest["quarantined"]:
            lines.append(f"{task}: {_counts(shard_manifest)}, {num_computed:,} computed")
        else:
            num_other_shards += 1
            other_counts = {key: count + shard_manifest[key] for key, count in other_counts.items()}
    if num_other_shards and not manifest["reused"]:
        lines.append(f"{num_other_shards:,} other shards: {_counts(other_counts)}, 0 computed")
    return lines


def _total(manifest: dict) -> str:
    """The number of records by outcome, in one line."""
    state = "already finished" if manifest["reused"] else "finished"
    done = manifest["done"].values()
    num_computed = sum(counts["computed"] for counts in done)
    num_reused = manifest["records"]["written"] - num_computed
    text = f"{state}: {_counts(manifest['records'])}"
    text += f" ({num_computed:,} computed, {num_reused:,} reused)"
    num_earlier = sum(counts["computed"] for counts in done if counts["earlier_try"])
    if num_earlier:
        text += f", {num_earlier:,} of the computed ones by an earlier, interrupted run"
    return text


def _kinds(manifest: dict) -> str:
    """The number of rows by kind of machine, if there are several; see machine/arithmetic.py."""
    from pipeline.machine import arithmetic

    num_rows = collections.Counter()
    for counts in manifest["done"].values():
        num_rows.update(counts["kinds"])
    if len(num_rows.keys() - {arithmetic.NOT_RECORDED}) < 2:
        return ""
    shown = "; ".join(f"{kind}: {count:,} rows" for kind, count in sorted(num_rows.items()))
    return f"rows were computed on different kinds of machine, so last digits differ ({shown})"


def main() -> None:
    """Entry point of `vae-export`."""
    command.run(run, name="export", doc=__doc__, module=__name__, subjects=_SUBJECTS, beam=True)


if __name__ == "__main__":
    main()
