"""The Beam part of export: embeds shards, each in one task.

This does not use Beam's RunInference, for three reasons. Its batches depend on how the runner
bundles elements, while here the bits of a row must not depend on other rows. All rows and
pictures would be shuffled to bring them back together in a shard's file. And it loads the model
even if there is nothing to compute. As in RunInference, `Shared` loads the model once a process.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils import shared

from pipeline.cli.errors import StageError
from pipeline.cli.progress import Progress
from pipeline.embeddings import files as row_files
from pipeline.embeddings import rows
from pipeline.embeddings.inputs import Input, ShardRecords
from pipeline.embeddings.model import PublishedModel
from pipeline.embeddings.shard import EmbeddedShard, ExportSettings
from pipeline.machine import gpus
from pipeline.runners import run as runner
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.tasks import Tasks
from pipeline.storage import files as files_lib


class PreviousExport(NamedTuple):
    """The finished export in the output directory."""

    model_id: str
    files: dict[str, dict[str, Any]]  # File name -> entry.
    shards: dict[str, dict[str, Any]]  # Task -> its part of EmbeddedShard.make's marker.


NO_PREVIOUS_EXPORT = PreviousExport("", {}, {})


class EmbedShard(beam.DoFn):
    """Embeds a shard: writes its files and its marker."""

    def __init__(
        self,
        input_: Input,
        *,
        model_dir: str,
        model_manifest: Mapping[str, Any],
        settings: ExportSettings,
        tasks: Tasks,
        previous: PreviousExport,
        allow_missing: bool,
        fast_math: bool,
    ):
        """Prepares the work; it is pickled and sent to the workers.

        Args:
          input_: the image set.
          model_dir: the model directory.
          model_manifest: its manifest.
          settings: what to export of each record.
          tasks: of the output directory.
          previous: the finished export in the output directory.
          allow_missing: whether a shard may be exported without its unreadable records.
          fast_math: see PublishedModel.
        """
        self._input, self._model_dir, self._model_manifest = input_, model_dir, model_manifest
        self._settings, self._tasks, self._previous = settings, tasks, previous
        self._allow_missing, self._fast_math = allow_missing, fast_math
        outputs = set(rows.model_outputs(settings.fields))
        if settings.images != "none":
            outputs.add("reconstruction")
        self._outputs = sorted(outputs)
        self._shared = shared.Shared()

    def process(self, element: tuple[str, Any]) -> Iterable[None]:
        """Embeds the shard of one element of `Input.elements`; yields nothing."""
        task, element_data = element
        records = self._input.records(task, element_data)
        earlier_results = [self._tasks.marker(task), self._previous.shards.get(task)]
        made_of = None
        if any(earlier_results):
            # A shard that had unreadable records may have been repaired since.
            had_missing = self._allow_missing and any(
                result and result["quarantined"] for result in earlier_results
            )
            made_of = self._made_of(records.digest(trust_manifest=not had_missing))
        self._tasks.make_once(task, lambda: self._make(task, records, made_of), made_of=made_of)
        return ()

    def _made_of(self, digest: str) -> str:
        """A hash of everything that determines the files of a shard."""
        model_id = self._model_manifest["model_id"]
        return manifest_lib.content_id([digest, model_id, self._settings._asdict()])

    def _make(self, task: str, records: ShardRecords, made_of: str | None) -> dict[str, Any]:
        previous_shard = self._previous.shards.get(task)
        if previous_shard and previous_shard["made_of"] == made_of:
            entries = [self._previous.files[name] for name in previous_shard["files"]]
            if all(self._is_complete(entry) for entry in entries):
                # Staged files of the same names are from a try that was not published.
                for entry in entries:
                    files_lib.remove(files_lib.join(self._tasks.files_directory, entry["name"]))
                return {**previous_shard, "entries": entries, "secs": {}, "computed": 0}
        previous_output = self._previous_output(task)
        previous_kinds = previous_shard["kinds"] if previous_shard else {}
        shard = EmbeddedShard(
            task, records, self._settings, previous_output, previous_kinds, self._tasks
        )
        marker = shard.make(self._model, self._outputs, self._model_manifest)
        return {**marker, "made_of": self._made_of(records.content_digest)}

    def _is_complete(self, entry: Mapping[str, Any]) -> bool:
        """Whether a file exists with its expected size; readers check its contents."""
        try:
            path = files_lib.join(self._tasks.directory, entry["name"])
            return files_lib.num_bytes(path) == entry["bytes"]
        except FileNotFoundError:
            return False

    def _previous_output(self, task: str) -> tuple[rows.Rows | None, bytes | None]:
        """Rows and contact sheet of a shard in the previous export; None if of another model."""
        shard = self._previous.shards.get(task)
        if not shard or self._previous.model_id != self._model_manifest["model_id"]:
            return None, None
        directory, files = self._tasks.directory, self._previous.files
        entries = [files[name] for name in shard["files"]]
        sheet = files.get(f"{row_files.stem(task)}.png")
        try:
            shard_rows = row_files.read(directory, task, entries)
            return shard_rows, manifest_lib.read_file(directory, sheet) if sheet else None
        except StageError:
            return None, None  # Damaged: the rows are computed again.

    def _model(self) -> PublishedModel:
        """The model, loaded once in a process and shared by its threads."""

        def load() -> PublishedModel:
            model = PublishedModel(self._model_dir, self._model_manifest, fast_math=self._fast_math)
            return model.prepared(self._outputs)

        return self._shared.acquire(load, tag=self._model_manifest["model_id"])


def embed_shards(
    embed: EmbedShard, input_: Input, *, tasks: Tasks, options: PipelineOptions
) -> None:
    """Runs the pipeline; afterwards each shard has a marker, which may name a failure.

    Args:
      embed: the work on each shard.
      input_: the image set.
      tasks: of the output directory.
      options: Beam's.
    """

    def build(pipeline: beam.Pipeline) -> None:
        _ = input_.elements(pipeline) | "EmbedShard" >> beam.ParDo(embed)

    num_workers = runner.num_worker_processes(options)
    environments = [gpus.environment_of(number, num_workers) for number in range(num_workers)]
    if any(environments):
        names = ", ".join(
            f"{i}: {variables[gpus.VISIBLE]}" for i, variables in enumerate(environments)
        )
        print(f"export: GPUs of the worker processes: {names}", file=sys.stderr)
    progress = Progress("export", total=sum(input_.sizes.values()), unit="records")
    runner.run(
        build,
        options,
        progress=progress,
        count_done=lambda: tasks.num_records_done(input_.sizes),
    )
