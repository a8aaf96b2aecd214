"""Writes the embeddings of an image set, and pictures of its reconstructions.

    python -m pipeline.export --data_dir=DIR --model_dir=WORKDIR/export --output_dir=DIR
    python -m pipeline.export --source=folder:DIR --model_dir=… --output_dir=DIR

For each shard it writes a file with one row for each record, and a PNG of originals above their
reconstructions; then it writes report.html. A rerun computes only new records. Flags that are not
listed here go to Apache Beam.
"""

# This file holds only flags and printed messages; api/exports.py begins the job.

import collections
import sys

from absl import flags

from pipeline.api import exports, keywords, rules
from pipeline.cli import command, flag_parsing, metrics_file
from pipeline.datasets import reader
from pipeline.embeddings import files as row_files
from pipeline.embeddings import flags as export_flags
from pipeline.sources import flags as source_flags

flags.adopt_module_key_flags(source_flags)
flags.adopt_module_key_flags(export_flags)
_DEFAULTS = keywords.ExportKeywords()
flags.DEFINE_string("output_dir", _DEFAULTS.output_dir, "New directory to write; local or a URL.")
flags.DEFINE_string(
    "latest",
    _DEFAULTS.latest,
    "Pointer to the newest export, which moves to output_dir after success: a symbolic link, or "
    "for a URL the object LATEST.json. Rows of the export that it names are taken over.",
)
flags.DEFINE_string(
    "reuse_from",
    _DEFAULTS.reuse_from,
    "An export whose rows are taken over; by default the one --latest names.",
)
flags.DEFINE_list(
    "fields",
    list(_DEFAULTS.fields),
    "Columns of a row beside id, label and record_sha: mean, log_var, z (a sample, seeded by "
    "--z_seed and the record), reconstruction_loss, kl, elbo.",
)
flags.DEFINE_enum(
    "embedding_format",
    _DEFAULTS.embedding_format,
    row_files.FORMATS,
    "Format of the rows: Parquet, an .npy file for each column, or TFRecords of tf.Example.",
)
flags.DEFINE_enum(
    "images",
    _DEFAULTS.images,
    rules.IMAGES,
    "Pictures: a contact sheet for each shard, all pictures in a WebDataset .tar for each shard, "
    "or none.",
)
flags.DEFINE_integer("z_seed", _DEFAULTS.z_seed, "Seed of the noise in z.", lower_bound=0)
flags.DEFINE_string(
    "require",
    _DEFAULTS.require,
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
flags.DEFINE_string(
    "reference",
    _DEFAULTS.reference,
    "An export to compare with; warns if a distribution has drifted.",
)
flags.DEFINE_bool("report", _DEFAULTS.report, "Write report.html, plots/ and projector/.")
flags.DEFINE_bool(
    "overwrite",
    _DEFAULTS.overwrite,
    "Replace the output of another run of this command in output_dir.",
)
flags.DEFINE_enum(
    "on_corrupt",
    _DEFAULTS.on_corrupt,
    reader.ON_CORRUPT,
    "If a shard is damaged: stop, or skip its unreadable records and list them in quarantine/.",
)
flags.DEFINE_bool(
    "fast_math",
    _DEFAULTS.fast_math,
    "On GPUs: faster, but products are rounded to TensorFloat-32 and last digits depend on timing.",
)
flags.DEFINE_string(
    "max_quarantined",
    _DEFAULTS.max_quarantined,
    "Maximum number (25) or share (0.1%) of unreadable records.",
)
metrics_file.define_flag()
flags.mark_flags_as_required(["model_dir", "output_dir"])
flag_parsing.refuse_values(__name__, rules.CHECKS)
# Flags that are no keywords of the API.
COMMAND_LINE_ONLY = ("status_on_rejection", "status_on_conflict")
_SUBJECTS = {
    "Input": ("data_dir", "split", "model_dir", "run_dir", "on_corrupt", "max_quarantined"),
    "Output": (
        *("output_dir", "latest", "reuse_from", "overwrite", "status_on_conflict"),
        *("fields", "embedding_format", "images", "z_seed", "report", "fast_math"),
    ),
    "Gate, drift, metrics": ("require", "status_on_rejection", "reference", "metrics_file"),
    **{f"{subject}, with --source": names for subject, names in source_flags.SUBJECTS.items()},
}


def run(beam_args: list[str]) -> None:
    """Runs the job that the flags describe and prints its results."""
    values = flag_parsing.values_of(__name__)
    for name in COMMAND_LINE_ONLY:
        del values[name]
    settings = keywords.ExportKeywords(**values, beam_args=beam_args)
    from pipeline.stages import gate, output_directory

    try:
        exports.make(settings, on_rows=_print_rows, say=lambda line: print(f"export: {line}"))
    except gate.Rejected as error:
        error.exit_status = _STATUS_ON_REJECTION.value
        raise
    except output_directory.Conflict as error:
        error.exit_status = _STATUS_ON_CONFLICT.value
        raise


def _print_rows(manifest: dict) -> None:
    for line in _shard_lines(manifest):
        print(line)
    if text := _kinds(manifest):
        print(f"export: {text}", file=sys.stderr)
    for warning in manifest.get("drift", {}).get("warnings", ()):
        print(f"export: warning: {warning}", file=sys.stderr)
    export_id, directory = manifest["export_id"], manifest["directory"]
    print(f"export: {_total(manifest)}, export_id {export_id}, {directory}")


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
