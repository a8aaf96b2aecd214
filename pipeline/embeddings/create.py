"""Creates or updates an export directory from an image set and a model.

Results of an earlier run are reused if they come from the same records and the same model.
The Beam job is in job.py.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli.errors import StageError, UsageError
from pipeline.embeddings import drift, gate, job, row_sample, rows, summary
from pipeline.embeddings.inputs import Input
from pipeline.embeddings.shard import ExportSettings
from pipeline.machine import arithmetic
from pipeline.sources import opened_source
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.stages import tasks as tasks_lib
from pipeline.stages.output_directory import TIMINGS
from pipeline.stages.staged_directory import StagedDirectory
from pipeline.storage import files as files_lib

# Keys of a shard's marker that the manifest repeats.
_SHARD_KEYS = ("made_of", "read", "written", "quarantined", "files")


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of one export."""

    input: Input
    model_dir: str  # Published by the trainer; local path or fsspec URL, like the next two.
    output_dir: str
    reference_dir: str | None  # An export to compare with.
    settings: ExportSettings
    requirements: list[gate.Requirement]
    allow_missing: bool  # Whether a damaged shard is exported without its unreadable records.
    max_quarantined: quarantine.Limit
    overwrite: bool
    options: PipelineOptions  # Beam's.
    fast_math: bool = False  # On GPUs; see PublishedModel.


def make_export(request: Request) -> dict[str, Any]:
    """Exports embeddings, and pictures of reconstructions.

    Returns:
      The manifest with two more keys: "reused", whether there was nothing to do, and "done",
      task -> {"computed": rows, "reused": rows}.

    Raises:
      StageError: an input is unusable, or images and model do not match.
      gate.Rejected: a requirement does not hold.
      UsageError: a requirement names an unknown metric, or directories overlap.
    """
    input_, settings = request.input, request.settings
    _check_directories(request)
    model_manifest = manifest_lib.read_manifest(request.model_dir, "train", "--model_dir")
    shape = tuple(model_manifest["image_shape"])
    if shape != tuple(input_.image_shape):
        raise StageError(
            f"--model_dir={request.model_dir}: the model takes images of shape {shape}, but the "
            f"images to export are {tuple(input_.image_shape)}; expected the same shape: train a "
            "model on this data set, or name the data set the model was trained on"
        )
    model_metrics = gate.model_metrics(model_manifest["metrics"])
    export_metrics = [*summary.metric_names(settings.fields), "written", "quarantined"]
    gate.check_names(request.requirements, [*export_metrics, *model_metrics])
    gate.check(request.requirements, model_metrics, on_model=True)
    reference = None
    if request.reference_dir:
        reference = manifest_lib.read_manifest(request.reference_dir, "export", "--reference")
    output = StagedDirectory(
        request.output_dir,
        stage="export",
        settings={**input_.settings, **settings._asdict()},
        inputs={
            **input_.identity,
            "model_id": model_manifest["model_id"],
            "reference": reference["export_id"] if reference else None,
        },
    )
    with (
        output.begun(overwrite=request.overwrite) as base,
        opened_source.reporting_source_changes(input_.check_unchanged, output.tasks.clear),
    ):
        # If records were quarantined, their shards may have been repaired since.
        if output.is_finished(base) and not base["records"]["quarantined"]:
            gate.check(request.requirements, _metrics(base))
            output.tidy(base)
            return {**base, "reused": True, "done": {}}
        output.begin_job()
        for note in input_.notes:
            print(f"export: {note}", file=sys.stderr, flush=True)
        embed = job.EmbedShard(
            input_,
            model_dir=request.model_dir,
            model_manifest=model_manifest,
            settings=settings,
            tasks=output.tasks,
            previous=_previous_export(output, base),
            allow_missing=request.allow_missing,
            fast_math=request.fast_math,
        )
        job.embed_shards(embed, input_, tasks=output.tasks, options=request.options)
        manifest = _finish(request, output, model_manifest, reference)
        # Shards with quarantined records were read again, perhaps with the same result.
        is_same = base is not None and base["export_id"] == manifest["export_id"]
        num_computed = sum(counts["computed"] for counts in manifest["done"].values())
        return {**manifest, "reused": is_same and not num_computed}


def _check_directories(request: Request) -> None:
    """Raises a UsageError if the output directory is an input, or inside an input."""
    inputs = {"the images": request.input.directory, "--model_dir": request.model_dir}
    for name, directory in inputs.items():
        if directory and files_lib.is_within(request.output_dir, directory):
            raise UsageError(
                f"--output_dir={request.output_dir}: lies in {name}, {directory}; name a "
                "directory outside of it"
            )
    reference = request.reference_dir
    if reference and files_lib.is_within(reference, request.output_dir):
        raise UsageError(
            f"--reference={reference}: is what --output_dir will replace; name another export"
        )


def _previous_export(output: StagedDirectory, base: Mapping[str, Any] | None) -> job.PreviousExport:
    """The finished export in the output directory, as far as it can be reused."""
    if base is None:
        return job.NO_PREVIOUS_EXPORT
    files = {entry["name"]: entry for entry in base["files"]}
    try:
        sums_by_shard = summary.read(output.directory, base["files"])["shards"]
    except StageError:
        return job.NO_PREVIOUS_EXPORT  # Damaged: all shards are computed again.
    kinds = _kinds(output.directory)
    shards = {
        task: {
            **shard_manifest,
            "sums": sums_by_shard[task],
            "kinds": kinds.get(task) or {arithmetic.NOT_RECORDED: shard_manifest["written"]},
        }
        for task, shard_manifest in base["shards"].items()
    }
    return job.PreviousExport(base["model_id"], files, shards)


def _kinds(directory: str) -> dict[str, dict[str, int]]:
    """Task -> kind of arithmetic -> number of rows, from an export's timings.json."""
    try:
        timings = json.loads(files_lib.read_bytes(files_lib.join(directory, TIMINGS)))
        return {task: dict(counts["kinds"]) for task, counts in timings["done"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # The file is missing, damaged, or of an earlier version.


def _finish(
    request: Request,
    output: StagedDirectory,
    model_manifest: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Reconciles the counts, checks the requirements, and publishes the export."""
    tasks = list(request.input.sizes)
    markers = dict(zip(tasks, output.tasks.markers(tasks), strict=True))
    records = {
        key: sum(marker[key] for marker in markers.values())
        for key in ("read", "written", "quarantined")
    }
    entries = [entry for marker in markers.values() for entry in marker["entries"]]
    faults = (
        fault
        for entry in entries
        for fault in quarantine.read_all(output.tasks.directory_of(entry), [entry])
    )
    quarantine.check(
        request.max_quarantined,
        faults,
        num_quarantined=records["quarantined"],
        num_records=records["read"],
    )
    for task, marker in markers.items():
        num_rows, num_missing = marker["sums"]["num_rows"], marker["quarantined"]
        has_quarantine_file = any("num_quarantined" in entry for entry in marker["entries"])
        if marker["read"] != num_rows + num_missing or (num_missing and not has_quarantine_file):
            raise StageError(
                f"{task}: {marker['read']} records read, {num_rows} rows written and {num_missing} "
                "quarantined; expected every record to be a row or to be listed in quarantine/: "
                "run the same command with --overwrite"
            )
    sums_by_shard = {task: marker["sums"] for task, marker in markers.items()}
    totals = summary.summary(sums_by_shard)
    entries.append(
        manifest_lib.write_file(
            output.tasks.files_directory,
            summary.FILE,
            manifest_lib.readable_json({"summary": totals, "shards": sums_by_shard}),
        )
    )
    identity = {
        "format_version": manifest_lib.FORMAT_VERSION,
        "made_from": output.made_from,
        "shards": {task: marker["made_of"] for task, marker in markers.items()},
    }
    manifest = {
        "export_id": manifest_lib.content_id(identity),
        "dataset_id": request.input.identity.get("dataset_id"),
        "model_id": model_manifest["model_id"],
        "records": records,
        "metrics": {name: v for name, v in totals.items() if name not in ("latents", "worst")},
        "shards": {task: {k: m[k] for k in _SHARD_KEYS} for task, m in markers.items()},
        "files": entries,
    }
    if reference:
        manifest["drift"] = _drift(request, output, manifest, totals, reference)
    gate.check(request.requirements, _metrics(manifest))
    done = {
        task: {
            "computed": marker["computed"],
            "reused": marker["written"] - marker["computed"],
            "earlier_try": marker["reused"],
            "kinds": marker.get("kinds", {arithmetic.NOT_RECORDED: marker["written"]}),
        }
        for task, marker in markers.items()
    }
    request.input.check_unchanged()
    published = output.commit(manifest, {**tasks_lib.timings(markers), "done": done})
    return {**published, "done": done}


def _drift(
    request: Request,
    output: StagedDirectory,
    manifest: Mapping[str, Any],
    totals: Mapping[str, Any],
    reference: Mapping[str, Any],
) -> dict[str, Any]:
    reference_totals = summary.read(request.reference_dir, reference["files"])["summary"]
    sample = row_sample.heads(manifest, output.tasks.directory_of, drift.MAX_ROWS)
    reference_sample = row_sample.heads(reference, lambda _: request.reference_dir, drift.MAX_ROWS)
    no_rows = rows.Rows([], [], [], {})
    result = drift.compare(
        current=(totals, sample.rows if sample else no_rows),
        reference=(reference_totals, reference_sample.rows if reference_sample else no_rows),
        same_model=reference["model_id"] == manifest["model_id"],
    )
    return {"reference": reference["export_id"], **result}


def _metrics(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an export that --require can bound."""
    return {**manifest["metrics"], **manifest["records"]}
