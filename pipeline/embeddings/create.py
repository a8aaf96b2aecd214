"""Creates an export directory from an image set and a model.

Rows of an earlier export are taken over if they come from the same records and the same model.
The Beam job is in job.py.
"""

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli import metrics_file
from pipeline.cli.errors import StageError, UsageError
from pipeline.embeddings import files as row_files
from pipeline.embeddings import job, rows, summary
from pipeline.embeddings.comparison import changes, drift, row_sample
from pipeline.embeddings.inputs import Input
from pipeline.embeddings.shard import ExportSettings
from pipeline.machine import arithmetic
from pipeline.sources import opened_source
from pipeline.stages import gate, output_directory, quarantine
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contents import TIMINGS
from pipeline.stages.output_directory import OutputDirectory
from pipeline.storage import files as files_lib

# Keys of a shard's marker that the manifest repeats.
_SHARD_KEYS = ("made_of", "read", "written", "quarantined", "files", "outside_classes")
# Files of an export, and of its report.
_NUMBER = r"-\d{5}-of-\d{5}(\.gz)?"
_REPORT_DIRECTORIES = ("plots", "projector")
_OWNED = re.compile(
    rf"{row_files.ROWS_DIRECTORY}/\w+-\w+{_NUMBER}\.(parquet|tfrecord|\w+\.npy)"
    rf"|{row_files.IMAGES_DIRECTORY}/\w+-\w+{_NUMBER}\.(png|tar)"
    rf"|quarantine/\w+-\w+\.tfrecord{_NUMBER}\.jsonl"
    rf"|{re.escape(summary.FILE)}|{re.escape(changes.FILE)}|report\.(html|json)"
    r"|plots/\w+\.png|projector/(sprite\.png|projector_config\.pbtxt|\w+\.tsv)"
)


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of one export."""

    input: Input
    model_dir: str  # Published by the trainer; local path or fsspec URL, like the next three.
    output_dir: str
    reuse_dir: str | None  # An export whose rows are taken over.
    reference_dir: str | None  # An export to compare with.
    settings: ExportSettings
    requirements: list[gate.Requirement]
    allow_missing: bool  # Whether a damaged shard is exported without its unreadable records.
    max_quarantined: quarantine.Limit
    overwrite: bool
    options: PipelineOptions  # Beam's.
    fast_math: bool = False  # On GPUs; see PublishedModel.
    # Whether to make no directory if the export would equal that in `reuse_dir`.
    only_if_new: bool = False

    @property
    def reuse_flag(self) -> str:
        """The flag that names `reuse_dir`, for messages."""
        return "--latest" if self.only_if_new else "--reuse_from"


def make_export(request: Request) -> dict[str, Any]:
    """Exports embeddings, and pictures of reconstructions.

    Returns:
      The manifest with three more keys: "reused", whether there was nothing to do, "done",
      task -> {"computed": rows, "reused": rows}, and "directory", which holds the export.

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
    model_metrics = summary.model_metrics(model_manifest["metrics"])
    export_metrics = [*summary.metric_names(settings.fields), "written", "quarantined"]
    gate.check_names(
        request.requirements,
        [*export_metrics, *model_metrics],
        " (metrics of rows need the fields they are made of, see --fields)",
    )
    if failed := _failures(request, model_metrics, checks_model=True):
        raise _rejected(failed)
    reference = None
    if request.reference_dir:
        reference = manifest_lib.read_manifest(request.reference_dir, "export", "--reference")
    made_from = {
        **input_.settings,
        **settings._asdict(),
        **input_.identity,
        "model_id": model_manifest["model_id"],
        "reference": reference["export_id"] if reference else None,
    }
    base = None
    if request.reuse_dir:
        base = manifest_lib.read_manifest(request.reuse_dir, "export", request.reuse_flag)
    output = OutputDirectory(
        request.output_dir,
        stage="export",
        made_from=made_from,
        owned=_OWNED,
        subdirectories=(
            row_files.ROWS_DIRECTORY,
            row_files.IMAGES_DIRECTORY,
            *_REPORT_DIRECTORIES,
        ),
        remedy="name a new directory, and this one as --reuse_from, or let --latest name it, so "
        "that its rows are taken over; or pass --overwrite",
    )
    if request.only_if_new and base and _is_same(output, base, request.reuse_dir):
        return _finished(request, base, request.reuse_dir)
    reuses = files_lib.place(request.reuse_dir) if request.reuse_dir else ""
    with (
        output.opened(_file_names(request), overwrite=request.overwrite, reuses=reuses) as finished,
        opened_source.reporting_source_changes(input_.check_unchanged, output.tasks.clear),
    ):
        if finished is not None:
            _check_unrepaired(request, finished)
            return _finished(request, finished, request.output_dir)
        for note in input_.notes:
            print(f"export: {note}", file=sys.stderr, flush=True)
        previous = _previous_export(request.reuse_dir, base)
        embed = job.EmbedShard(
            input_,
            model_dir=request.model_dir,
            model_manifest=model_manifest,
            settings=settings,
            tasks=output.tasks,
            previous=previous,
            allow_missing=request.allow_missing,
            fast_math=request.fast_math,
        )
        job.embed_shards(embed, input_, tasks=output.tasks, options=request.options)
        return _finish(request, output, model_manifest, reference, previous)


def _is_same(output: OutputDirectory, base: Mapping[str, Any], directory: str) -> bool:
    """Whether this job would make the export of `base`, and that export is complete.

    If records were quarantined, their shards may have been repaired since.
    """
    return (
        base["made_from"] == output.made_from
        and not base["records"]["quarantined"]
        and output_directory.are_complete(directory, base["files"])
    )


def _finished(request: Request, manifest: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """The result of a job whose export is there; raises Rejected as the job that made it did.

    Raises:
      Conflict: the export was rejected, but the bounds of this job hold.
    """
    rejection, records = gate.rejection(directory, manifest), manifest["records"]
    metrics_file.observe_records(
        computed=0, reused=records["written"], quarantined=records["quarantined"]
    )
    drift.observe(manifest.get("drift", {}))
    if failed := _failures(request, _metrics(manifest)):
        if rejection:
            raise gate.Rejected(f"{rejection}; look at the model and the data")
        raise _rejected(failed)
    if rejection:
        raise output_directory.Conflict(
            f"{rejection}, and the bounds of this command hold; export into a new directory with "
            f"--reuse_from={directory}, which computes nothing twice"
        )
    return {**manifest, "reused": True, "done": {}, "directory": directory}


def _failures(
    request: Request, metrics: Mapping[str, float], *, checks_model: bool = False
) -> list[str]:
    """The bounds on metrics of the model, or on all others, that do not hold."""
    requirements = [
        requirement
        for requirement in request.requirements
        if requirement.name.startswith(summary.MODEL_PREFIX) == checks_model
    ]
    return gate.failures(requirements, metrics, lacking="rows")


def _rejected(failed: list[str]) -> gate.Rejected:
    return gate.Rejected(
        f"--require: {', '.join(failed)} does not hold, so the export is rejected, and --latest "
        "stays where it is; look at the model and the data"
    )


def _check_unrepaired(request: Request, manifest: Mapping[str, Any]) -> None:
    """Raises a Conflict if a shard with quarantined records has changed since the export."""
    for task, account in manifest["shards"].items():
        digest = request.input.digest_again(task) if account["quarantined"] else None
        if digest is None:
            continue
        if job.made_of(digest, manifest["model_id"], request.settings) != account["made_of"]:
            raise output_directory.Conflict(
                f"--output_dir={request.output_dir}: has {account['quarantined']:,} quarantined "
                f"records of {task}, which was repaired or has changed since; a finished export "
                "stays as it is: name a new directory, or pass --overwrite"
            )


def _file_names(request: Request) -> list[str]:
    """Every file that the job may write, without manifest and timings."""
    settings, names = request.settings, [summary.FILE, changes.FILE]
    for task in request.input.sizes:
        names += row_files.row_names(task, settings.embedding_format, settings.fields)
        if settings.images != "none":
            names.append(row_files.picture_name(task, settings.images))
        names.append(quarantine.file_name(task))
    return names


def _check_directories(request: Request) -> None:
    """Raises a UsageError if the output directory is an input, or inside an input."""
    inputs = {
        "the images": request.input.directory,
        "--model_dir": request.model_dir,
    }
    reuse_dir = request.reuse_dir
    # A finished directory is not written to; `opened` refuses other inputs.
    if reuse_dir and not files_lib.is_same_place(reuse_dir, request.output_dir):
        inputs[request.reuse_flag] = reuse_dir
    for name, directory in inputs.items():
        if directory and files_lib.is_within(request.output_dir, directory):
            raise UsageError(
                f"--output_dir={request.output_dir}: lies in {name}, {directory}; name a "
                "directory outside of it"
            )
    reference = request.reference_dir
    if reference and files_lib.is_within(reference, request.output_dir):
        raise UsageError(f"--reference={reference}: is the directory to write; name another export")


def _previous_export(directory: str | None, base: Mapping[str, Any] | None) -> job.PreviousExport:
    """The export to take rows from, as far as it can be read."""
    if directory is None or base is None:
        return job.NO_PREVIOUS_EXPORT
    files = {entry["name"]: entry for entry in base["files"]}
    try:
        splits = {task: _split_of(task, base["made_from"], directory) for task in base["shards"]}
    except StageError:
        return job.NO_PREVIOUS_EXPORT  # Damaged: all shards are computed again.
    sums_by_shard = None
    with contextlib.suppress(StageError, OSError):
        sums_by_shard = summary.read(directory, base["files"])["shards"]
    kinds = _kinds(directory)
    shards = {
        task: {
            **shard_manifest,
            # Without sums no shard equals one of this job: its rows are read one by one.
            **({"sums": sums_by_shard[task]} if sums_by_shard else {"made_of": ""}),
            "kinds": kinds.get(task) or {arithmetic.NOT_RECORDED: shard_manifest["written"]},
        }
        for task, shard_manifest in base["shards"].items()
    }
    return job.PreviousExport(
        directory,
        base["export_id"],
        base["model_id"],
        base.get("class_names"),
        base["made_from"],
        files,
        shards,
        splits,
    )


def _kinds(directory: str) -> dict[str, dict[str, int]]:
    """Task -> kind of arithmetic -> number of rows, from an export's timings.json."""
    try:
        timings = json.loads(files_lib.read_bytes(files_lib.join(directory, TIMINGS)))
        return {task: dict(counts["kinds"]) for task, counts in timings["done"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # The file is missing, damaged, or of an earlier version.


def _finish(
    request: Request,
    output: OutputDirectory,
    model_manifest: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
    previous: job.PreviousExport,
) -> dict[str, Any]:
    """Reconciles the counts, compares, judges, and writes the manifest."""
    tasks = list(request.input.sizes)
    markers = dict(zip(tasks, output.tasks.markers(tasks), strict=True))
    entries = [entry for marker in markers.values() for entry in marker["entries"]]
    records = _reconciled(request, markers, entries)
    sums_by_shard = {task: marker["sums"] for task, marker in markers.items()}
    totals = summary.summary(sums_by_shard)
    entries.append(
        manifest_lib.write_file(
            output.directory,
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
        "class_names": list(request.input.class_names),
        "records": records,
        "metrics": {name: v for name, v in totals.items() if name not in ("latents", "worst")},
        "shards": {
            task: {key: marker[key] for key in _SHARD_KEYS if key in marker}
            for task, marker in markers.items()
        },
        "files": entries,
    }
    request.input.check_unchanged()
    is_other = not files_lib.is_same_place(previous.directory, output.directory)
    if request.only_if_new and manifest["export_id"] == previous.export_id and is_other:
        base = manifest_lib.read_manifest(previous.directory, "export", "--latest")
        if output_directory.are_complete(previous.directory, base["files"]):
            output.discard()  # Shards with quarantined records gave the same result again.
            return _finished(request, base, previous.directory)
    if reference:
        manifest["drift"] = _drift(request, output, manifest, totals, reference)
    if failed := _failures(request, _metrics(manifest)):
        manifest["rejected"] = failed
    done = {
        task: {
            "computed": marker["computed"],
            "reused": marker["written"] - marker["computed"],
            "earlier_try": marker["reused"],
            "kinds": marker.get("kinds", {arithmetic.NOT_RECORDED: marker["written"]}),
        }
        for task, marker in markers.items()
    }
    changed = _changes(request, output, manifest, markers, previous)
    finished = output.finish(manifest, markers, done=done, changes=changed)
    if failed:
        raise _rejected(failed)
    return {**finished, "reused": False, "done": done, "directory": output.directory}


def _reconciled(
    request: Request, markers: Mapping[str, Mapping[str, Any]], entries: list[dict[str, Any]]
) -> dict[str, int]:
    """The account of all shards.

    Raises:
      StageError: a record is missing, or too many are quarantined.
    """
    records = {
        key: sum(marker[key] for marker in markers.values())
        for key in ("read", "written", "quarantined")
    }
    num_computed = sum(marker["computed"] for marker in markers.values())
    metrics_file.observe_records(
        computed=num_computed,
        reused=records["written"] - num_computed,
        quarantined=records["quarantined"],
    )
    quarantine.check(
        request.max_quarantined,
        quarantine.read_all(request.output_dir, entries),
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
    return records


def _changes(
    request: Request,
    output: OutputDirectory,
    manifest: Mapping[str, Any],
    markers: Mapping[str, Mapping[str, Any]],
    previous: job.PreviousExport,
) -> dict[str, Any]:
    """Writes changes.parquet; its entry and counts, and the export that it compares with.

    An export that is made again in place keeps its changes.parquet, if the file is intact.
    """
    if files_lib.is_same_place(previous.directory, output.directory):
        if kept := _intact_changes(output.directory):
            return kept
        previous = job.NO_PREVIOUS_EXPORT
    old_entries = {task: previous.entries(task) for task in previous.shards}
    new_entries = {task: marker["entries"] for task, marker in markers.items()}
    # An earlier try of this job may have linked files of another export.
    old_contents = {task: _contents(entries) for task, entries in old_entries.items()}
    same = {t for t, entries in new_entries.items() if _contents(entries) == old_contents.get(t)}
    old = changes.Side(
        previous.directory,
        previous.class_names or (),
        previous.splits,
        {task: entries for task, entries in old_entries.items() if task not in same},
    )
    new = changes.Side(
        output.directory,
        request.input.class_names,
        request.input.splits,
        {task: entries for task, entries in new_entries.items() if task not in same},
    )
    settings = manifest_lib.through_json(request.settings._asdict())
    is_same_model = previous.model_id == manifest["model_id"] and all(
        previous.made_from.get(key) == settings[key] for key in ("fields", "z_seed")
    )
    counts = changes.write(output.directory, new, old, is_same_model=is_same_model)
    if unreadable := counts["unreadable"]:
        print(
            f"export: warning: cannot read {len(unreadable):,} of the changed shards of "
            f"{previous.directory}; in changes.parquet their rows count as added, and none as "
            "removed",
            file=sys.stderr,
        )
    return {"against": previous.export_id or None, **counts}


def _intact_changes(directory: str) -> dict[str, Any] | None:
    """What timings.json says of changes.parquet; None if either file is missing or damaged."""
    try:
        timings = json.loads(files_lib.read_bytes(files_lib.join(directory, TIMINGS)))
        changed = timings["changes"]
        entry = {**changed["entry"], "name": changes.FILE}
        return changed if manifest_lib.intact_entry(directory, entry) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _contents(entries: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What tells whether files are equal; entries of earlier versions have fewer keys."""
    return [(entry["name"], entry["sha256"]) for entry in entries]


def _split_of(task: str, made_from: Mapping[str, Any], directory: str) -> str:
    """The split of a shard, which its name holds."""
    for split in made_from["split"]:
        if task.startswith(f"{made_from['name']}-{split}."):
            return split
    raise StageError(
        f"{directory}: has a shard {task} of no split; expected {made_from['name']}-SPLIT.… with "
        f"one of {', '.join(made_from['split'])}: make the export again"
    )


def _drift(
    request: Request,
    output: OutputDirectory,
    manifest: Mapping[str, Any],
    totals: Mapping[str, Any],
    reference: Mapping[str, Any],
) -> dict[str, Any]:
    reference_totals = summary.read(request.reference_dir, reference["files"])["summary"]
    sample = row_sample.heads(output.directory, manifest, drift.MAX_ROWS)
    reference_sample = row_sample.heads(request.reference_dir, reference, drift.MAX_ROWS)
    no_rows = rows.Rows([], [], [], {})
    result = drift.compare(
        current=(totals, sample.rows if sample else no_rows),
        reference=(reference_totals, reference_sample.rows if reference_sample else no_rows),
        same_model=reference["model_id"] == manifest["model_id"],
    )
    drift.observe(result)
    return {"reference": reference["export_id"], **result}


def _metrics(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an export that --require can bound."""
    return {**manifest["metrics"], **manifest["records"]}
