"""An export directory made from an image set and a model: what job 3 does in all.

What is there from an earlier run is used again as far as it is a function of the same
records and the same model; job.py has the Beam job.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli.errors import StageError, UsageError
from pipeline.embeddings import drift, gate, job, row_sample, rows, summary
from pipeline.embeddings.inputs import Input
from pipeline.embeddings.shard import Making
from pipeline.machine import arithmetic
from pipeline.sources import opened_source
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.stages import tasks as tasks_lib
from pipeline.stages.output_directory import TIMINGS
from pipeline.stages.staged_directory import StagedDirectory
from pipeline.storage import files as files_lib

# Of a shard's marker, what the manifest says of it.
_OF_SHARD = ("made_of", "read", "written", "quarantined", "files")


@dataclasses.dataclass(frozen=True)
class Request:
    """What a run of the command is asked to do."""

    input: Input
    model_dir: str  # As the trainer published it; local path or fsspec URL, like the next two.
    output_dir: str
    reference_dir: str | None  # An export to compare with.
    making: Making
    required: list[gate.Requirement]
    tolerant: bool  # Whether a damaged shard is exported without what cannot be had.
    max_quarantined: quarantine.Limit
    overwrite: bool
    options: PipelineOptions  # Beam's.
    fast_math: bool = False  # On GPUs; see PublishedModel.


def make_export(request: Request) -> dict[str, Any]:
    """Exports embeddings, and pictures of reconstructions.

    Returns:
      The manifest, and what is no part of it: "reused", whether nothing had to be done, and
      "done", task -> {"computed": rows, "reused": rows} of what has been.

    Raises:
      StageError: an input can't be used, does not fit the other, or a bound is not kept.
      UsageError: a bound on a number that there is not.
    """
    input_, making = request.input, request.making
    _check_places(request)
    model_manifest = manifest_lib.read_manifest(request.model_dir, "train", "model_dir")
    shape = tuple(model_manifest["image_shape"])
    if shape != tuple(input_.image_shape):
        raise StageError(
            f"--model_dir={request.model_dir}: is for images of {shape}, and those to export are "
            f"{tuple(input_.image_shape)}; expected the same shape: train a model on this data "
            "set, or name the data set it was trained on"
        )
    of_model = gate.of_model(model_manifest["metrics"])
    of_rows = [*summary.names_of_metrics(making.fields), "written", "quarantined"]
    gate.check_names(request.required, [*of_rows, *of_model])
    gate.check(request.required, of_model, of_model=True)
    reference = None
    if request.reference_dir:
        reference = manifest_lib.read_manifest(request.reference_dir, "export", "reference")
    output = StagedDirectory(
        request.output_dir,
        stage="export",
        settings={**input_.settings, **making._asdict()},
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
        # A shard that lacks records may have been mended since.
        if output.is_finished(base) and not base["records"]["quarantined"]:
            gate.check(request.required, _metrics(base))
            output.tidy(base)
            return {**base, "reused": True, "done": {}}
        output.begin_job()
        embed = job.EmbedShard(
            input_,
            model_dir=request.model_dir,
            model_manifest=model_manifest,
            making=making,
            tasks=output.tasks,
            previous=_previous(output, base),
            tolerant=request.tolerant,
            fast_math=request.fast_math,
        )
        job.embed_shards(embed, input_, tasks=output.tasks, options=request.options)
        made = _finish(request, output, model_manifest, reference)
        # Where records are missing, that was to be seen again.
        is_same = base is not None and base["export_id"] == made["export_id"]
        nothing_done = not any(of_shard["computed"] for of_shard in made["done"].values())
        return {**made, "reused": is_same and nothing_done}


def _check_places(request: Request) -> None:
    """Raises a UsageError for an output directory that is an input as well, or inside one."""
    places = {"the images": request.input.place, "--model_dir": request.model_dir}
    for name, place in places.items():
        if place and files_lib.is_within(request.output_dir, place):
            raise UsageError(
                f"--output_dir={request.output_dir}: lies in {name}, {place}; name a directory "
                "outside of it"
            )
    reference = request.reference_dir
    if reference and files_lib.is_within(reference, request.output_dir):
        raise UsageError(
            f"--reference={reference}: is what --output_dir will replace; name another export"
        )


def _previous(output: StagedDirectory, base: Mapping[str, Any] | None) -> job.Previous:
    """What is there and may be used again."""
    if base is None:
        return job.NOTHING_BEFORE
    files = {entry["name"]: entry for entry in base["files"]}
    try:
        of_shards = summary.read(output.directory, base["files"])["shards"]
    except StageError:
        return job.NOTHING_BEFORE  # It is damaged: all is computed again.
    kinds = _kinds(output.directory)
    found = {
        task: {
            **of,
            "sums": of_shards[task],
            "kinds": kinds.get(task) or {arithmetic.NOT_RECORDED: of["written"]},
        }
        for task, of in base["shards"].items()
    }
    return job.Previous(base["model_id"], files, found)


def _kinds(directory: str) -> dict[str, dict[str, int]]:
    """Task -> kind of arithmetic -> rows of that kind, as far as an export's timings.json says."""
    try:
        timings = json.loads(files_lib.read_bytes(files_lib.join(directory, TIMINGS)))
        return {task: dict(done["kinds"]) for task, done in timings["done"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # Missing or damaged, or an earlier version's.


def _finish(
    request: Request,
    output: StagedDirectory,
    model_manifest: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Reconciles, checks the bounds, and publishes."""
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
        num_rows, num_lost = marker["sums"]["num_rows"], marker["quarantined"]
        is_named = any("num_quarantined" in entry for entry in marker["entries"])
        if marker["read"] != num_rows + num_lost or (num_lost and not is_named):
            raise StageError(
                f"{task}: {marker['read']} records read, {num_rows} rows written and {num_lost} "
                "quarantined; expected all of them, and those in quarantine named: run the same "
                "command with --overwrite"
            )
    of_shards = {task: marker["sums"] for task, marker in markers.items()}
    found = summary.summary(of_shards)
    entries.append(
        manifest_lib.write_file(
            output.tasks.files_directory,
            summary.FILE,
            manifest_lib.readable_json({"summary": found, "shards": of_shards}),
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
        "metrics": {name: v for name, v in found.items() if name not in ("latents", "worst")},
        "shards": {task: {k: m[k] for k in _OF_SHARD} for task, m in markers.items()},
        "files": entries,
    }
    if reference:
        manifest["drift"] = _drift(request, output, manifest, found, reference)
    gate.check(request.required, _metrics(manifest))
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
    written = output.commit(manifest, {**tasks_lib.timings(markers), "done": done})
    return {**written, "done": done}


def _drift(
    request: Request,
    output: StagedDirectory,
    manifest: Mapping[str, Any],
    found: Mapping[str, Any],
    reference: Mapping[str, Any],
) -> dict[str, Any]:
    then = summary.read(request.reference_dir, reference["files"])["summary"]
    ours = row_sample.heads(manifest, output.tasks.directory_of, drift.MAX_ROWS)
    theirs = row_sample.heads(reference, lambda _: request.reference_dir, drift.MAX_ROWS)
    nothing = rows.Rows([], [], [], {})
    compared = drift.compare(
        here=(found, ours.rows if ours else nothing),
        reference=(then, theirs.rows if theirs else nothing),
        same_model=reference["model_id"] == manifest["model_id"],
    )
    return {"reference": reference["export_id"], **compared}


def _metrics(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that can be required of an export."""
    return {**manifest["metrics"], **manifest["records"]}
