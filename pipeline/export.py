"""Writes the embeddings of an image set, and pictures of its reconstructions.

    python -m pipeline.export --data_dir=DIR --model_dir=WORKDIR/export --output_dir=DIR
    python -m pipeline.export --source=folder:DIR --model_dir=… --output_dir=DIR

For each shard a file of rows, one a record, and a PNG of originals above their
reconstructions; in the end report.html. Run again it computes what is new and nothing
else. Flags that are not listed here go to Apache Beam.
This file holds flags and nothing else; the job is in embeddings/create.py.
"""

import collections
import sys

from absl import flags

from pipeline.cli import command, quiet
from pipeline.datasets import reader
from pipeline.embeddings import files as row_files
from pipeline.embeddings import flags as export_flags
from pipeline.embeddings import rows
from pipeline.sources import flags as source_flags

flags.adopt_module_key_flags(source_flags)
flags.adopt_module_key_flags(export_flags)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory to write; local or a URL.")
_FIELDS = flags.DEFINE_list(
    "fields",
    "mean,log_var,reconstruction_loss,kl",
    "What a row holds beside id, label and record_sha: mean, log_var, z (sampled, with a seed of "
    "the record), reconstruction_loss, kl, elbo.",
)
_EMBEDDING_FORMAT = flags.DEFINE_enum(
    "embedding_format",
    "parquet",
    row_files.FORMATS,
    "Files of rows: Parquet, an .npy array a column, or tf.Examples.",
)
_IMAGES = flags.DEFINE_enum(
    "images",
    "sheets",
    ["sheets", "all", "none"],
    "Pictures: a contact sheet a shard, all of them in a WebDataset .tar a shard, or none.",
)
_Z_SEED = flags.DEFINE_integer("z_seed", 0, "Seed of the noise in z.", lower_bound=0)
_REQUIRE = flags.DEFINE_string(
    "require",
    None,
    "Bounds without which nothing is published, such as elbo>-110,active_units>=8: on elbo, "
    "reconstruction_loss, kl, active_units, written, quarantined of this job, or on the "
    "model's, as model.SPLIT.NAME.",
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "An export to compare distributions with; warns if they have drifted."
)
_REPORT = flags.DEFINE_bool("report", True, "Make report.html, plots/ and projector/.")
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Compute all anew, and replace what was made with other settings."
)
_ON_CORRUPT = flags.DEFINE_enum(
    "on_corrupt",
    "fail",
    reader.ON_CORRUPT,
    "Where a shard is damaged: stop, or export without the records that cannot be had.",
)
_FAST_MATH = flags.DEFINE_bool(
    "fast_math",
    False,
    "On GPUs: round products to TensorFloat-32, and let last digits depend on timing; faster.",
)
_MAX_QUARANTINED = flags.DEFINE_string(
    "max_quarantined", "0.1%", "Such records to put up with: a count (25) or a share (0.1%)."
)
flags.mark_flags_as_required(["model_dir", "output_dir"])
flags.register_validator(
    "fields",
    lambda names: len(set(names)) == len(names) > 0 and set(names) <= set(rows.FIELDS),
    message=f"expected some of {', '.join(rows.FIELDS)}, none of them twice",
)


def run(beam_args: list[str]) -> None:
    """Runs the job that the flags describe and prints what it made."""
    quiet.import_beam()
    from pipeline.embeddings import create as create_export
    from pipeline.embeddings import gate
    from pipeline.embeddings.shard import Making
    from pipeline.reports import create as create_report
    from pipeline.runners import cluster
    from pipeline.runners import options as beam_options
    from pipeline.stages import quarantine

    options = beam_options.parse_options(beam_args)
    cluster.check_paths(options, **export_flags.paths(), output_dir=_OUTPUT_DIR.value)
    request = create_export.Request(
        input=export_flags.image_set(_ON_CORRUPT.value),
        model_dir=export_flags.MODEL_DIR.value,
        output_dir=_OUTPUT_DIR.value,
        reference_dir=_REFERENCE.value,
        making=Making(
            fields=tuple(_FIELDS.value),
            embedding_format=_EMBEDDING_FORMAT.value,
            images=_IMAGES.value,
            z_seed=_Z_SEED.value,
        ),
        required=gate.parse(_REQUIRE.value),
        tolerant=_ON_CORRUPT.value == "quarantine" or export_flags.is_source(),
        max_quarantined=quarantine.parse_limit(_MAX_QUARANTINED.value),
        overwrite=_OVERWRITE.value,
        options=options,
        fast_math=_FAST_MATH.value,
    )
    manifest = create_export.make_export(request)
    print(*_account(manifest), sep="\n")
    if kinds := _kinds(manifest):
        print(f"export: {kinds}", file=sys.stderr)
    for warning in manifest.get("drift", {}).get("warnings", ()):
        print(f"export: warning: {warning}", file=sys.stderr)
    print(f"export: {_in_all(manifest)}, export_id {manifest['export_id']}, {_OUTPUT_DIR.value}")
    create_report.remove_other(_OUTPUT_DIR.value, manifest["export_id"])
    if _REPORT.value and not create_report.is_current(_OUTPUT_DIR.value, manifest["export_id"]):
        page = create_report.make_report(
            _OUTPUT_DIR.value,
            input_=request.input,
            model_dir=request.model_dir,
            run_dir=export_flags.RUN_DIR.value,
        )
        print(f"export: {page}")


def _counts(counts: dict) -> str:
    return (
        f"{counts['read']:,} read = {counts['written']:,} written + "
        f"{counts['quarantined']:,} quarantined"
    )


def _account(manifest: dict) -> list[str]:
    """A line for each shard of which anything was computed or is missing, and one for the rest."""
    lines, rest = [], {"read": 0, "written": 0, "quarantined": 0}
    num_rest = 0
    for task, of_shard in manifest["shards"].items():
        done = manifest["done"].get(task, {"computed": 0})
        if done["computed"] or of_shard["quarantined"]:
            lines.append(f"{task}: {_counts(of_shard)}, {done['computed']:,} computed")
        else:
            num_rest += 1
            rest = {key: rest[key] + of_shard[key] for key in rest}
    if num_rest and not manifest["reused"]:
        lines.append(f"{num_rest:,} other shards: {_counts(rest)}, 0 computed")
    return lines


def _in_all(manifest: dict) -> str:
    """What became of every record, in a line."""
    state = "already finished" if manifest["reused"] else "finished"
    done = manifest["done"].values()
    computed = sum(of_shard["computed"] for of_shard in done)
    text = f"{state}: {_counts(manifest['records'])}"
    text += f" ({computed:,} computed, {manifest['records']['written'] - computed:,} reused)"
    earlier = sum(of_shard["computed"] for of_shard in done if of_shard["earlier_try"])
    return text + (f", {earlier:,} of them by a try that was stopped" if earlier else "")


def _kinds(manifest: dict) -> str:
    """How many rows are of which kind of machine, if of several; see machine/arithmetic.py."""
    from pipeline.machine import arithmetic

    num_rows = collections.Counter()
    for done in manifest["done"].values():
        num_rows.update(done["kinds"])
    if len(num_rows.keys() - {arithmetic.NOT_RECORDED}) < 2:
        return ""
    shown = "; ".join(f"{kind}: {count:,} rows" for kind, count in sorted(num_rows.items()))
    return f"rows were computed on different kinds of machine, so last digits differ ({shown})"


def main() -> None:
    """Entry point of `vae-export`."""
    command.run(run, name="export", doc=__doc__, module=__name__, beam=True)


if __name__ == "__main__":
    main()
