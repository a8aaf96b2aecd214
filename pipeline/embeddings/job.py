"""The Beam part of export: embeds shards, each in one task.

This does not use Beam's RunInference, for three reasons. Its batches depend on how the runner
bundles elements, while here the bits of a row must not depend on other rows. All rows and
pictures would be shuffled to bring them back together in a shard's file. And it loads the model
even if there is nothing to compute. As in RunInference, `Shared` loads the model once a process.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils import shared

from pipeline.cli.errors import StageError
from pipeline.cli.progress import Progress
from pipeline.embeddings import files as row_files
from pipeline.embeddings import rows, shard
from pipeline.embeddings.inputs import Input, ShardRecords
from pipeline.embeddings.model import PublishedModel
from pipeline.embeddings.shard import ExportSettings
from pipeline.formats.tf_example import UNLABELLED
from pipeline.machine import gpus
from pipeline.runners import run as runner
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.tasks import Tasks
from pipeline.storage import files as files_lib

# What the runner's own page shows. Beam's distributions hold integers.
_NAMESPACE = "vae-export"
_MODEL_CALL_MSECS = Metrics.distribution(_NAMESPACE, "model_call_msecs")
_NUM_COMPUTED = Metrics.counter(_NAMESPACE, "records_computed")
_NUM_REUSED = Metrics.counter(_NAMESPACE, "records_reused")
_NUM_QUARANTINED = Metrics.counter(_NAMESPACE, "records_quarantined")


class PreviousExport(NamedTuple):
    """A finished export whose rows are taken over; it stays as it is."""

    directory: str
    export_id: str
    model_id: str
    class_names: Sequence[str] | None  # None of an earlier version's export, which lists none.
    made_from: dict[str, Any]
    files: dict[str, dict[str, Any]]  # File name -> entry.
    shards: dict[str, dict[str, Any]]  # Task -> its part of the marker of shard.write.
    splits: dict[str, str]  # Task -> split.

    def has_classes(self, class_names: Sequence[str]) -> bool:
        """Whether each of its classes has the same name in a list, which may be longer."""
        names = self.class_names
        return names is not None and list(names) == list(class_names[: len(names)])

    def entries(self, task: str) -> list[dict[str, Any]]:
        """The entries of all files of a shard."""
        return [self.files[name] for name in self.shards[task]["files"]]


NO_PREVIOUS_EXPORT = PreviousExport("", "", "", None, {}, {}, {}, {})


def made_of(digest: str, model_id: str, settings: ExportSettings) -> str:
    """A hash of everything that determines the files of a shard.

    Args:
      digest: of the shard's contents.
      model_id: of the model.
      settings: what to export of each record.
    """
    return manifest_lib.content_id([row_files.VERSION, digest, model_id, settings._asdict()])


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
          previous: the export whose rows are taken over.
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
        self._likelihood = model_manifest["config"].get("likelihood", shard.BERNOULLI)
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
        marker = self._tasks.make_once(
            task, lambda: self._make(task, records, made_of), made_of=made_of
        )
        if marker is not None:
            _NUM_COMPUTED.inc(marker["computed"])
            _NUM_REUSED.inc(marker["written"] - marker["computed"])
            _NUM_QUARANTINED.inc(marker["quarantined"])
        return ()

    def _made_of(self, digest: str) -> str:
        return made_of(digest, self._model_manifest["model_id"], self._settings)

    def _make(self, task: str, records: ShardRecords, made_of: str | None) -> dict[str, Any]:
        if marker := self._link_shard(task, made_of):
            return marker
        started = time.perf_counter()
        contents = records.read()
        reading = {"read": time.perf_counter() - started}
        embedded = shard.embed(
            contents,
            self._settings,
            self._previous_shard(task),
            load_model=self._model,
            outputs=self._outputs,
            latent_dim=self._model_manifest["config"]["latent_dim"],
            note=lambda count: self._tasks.note(task, count),
            note_call=lambda secs: _MODEL_CALL_MSECS.update(round(1000 * secs)),
        )
        class_names = self._input.class_names
        marker = shard.write(
            self._tasks.directory,
            task,
            contents,
            embedded,
            self._settings,
            class_names=class_names,
            split=self._input.splits[task],
            model_id=self._model_manifest["model_id"],
            likelihood=self._likelihood,
        )
        known = (contents.labels < len(class_names)) | (contents.labels == UNLABELLED)
        return {
            **marker,
            "secs": {**reading, **marker["secs"]},
            "made_of": self._made_of(contents.digest),
            "outside_classes": int((~known).sum()),
        }

    def _link_shard(self, task: str, made_of: str | None) -> dict[str, Any] | None:
        """Takes over all files of an equal shard of the previous export; its marker, or None."""
        previous = self._previous
        previous_shard = previous.shards.get(task)
        if not previous_shard or previous_shard["made_of"] != made_of:
            return None
        # Earlier versions ranked by the loss; the rows stay, and their ranks are made anew.
        ranks = previous_shard["sums"].get("worst", ())
        if self._likelihood == shard.BERNOULLI and any(len(rank) == 3 for rank in ranks):
            return None
        names = self._input.class_names
        has_same_classes = previous.has_classes(names) and (
            len(names) == len(previous.class_names) or not previous_shard.get("outside_classes")
        )
        if not has_same_classes:
            return None
        entries = []
        for listed in previous.entries(task):
            entry = manifest_lib.intact_entry(previous.directory, listed)
            if entry is None:
                return None
            entries.append(entry)
        directory = self._tasks.directory
        for entry in entries:
            parent = entry["name"].rpartition("/")[0]
            files_lib.make_dirs(files_lib.join(directory, parent) if parent else directory)
            try:
                files_lib.link(
                    files_lib.join(previous.directory, entry["name"]),
                    files_lib.join(directory, entry["name"]),
                )
            except FileNotFoundError:
                return None  # Removed just now.
        return {**previous_shard, "entries": entries, "secs": {}, "computed": 0}

    def _previous_shard(self, task: str) -> shard.PreviousShard:
        """The rows and the contact sheet of a shard in the previous export of the same model.

        What is damaged is left out, and computed again.
        """
        previous, nothing = self._previous, shard.PreviousShard(None, None, {})
        names = [task, *self._input.earlier_names.get(task, ())]
        task = next((name for name in names if name in previous.shards), "")
        if not task or previous.model_id != self._model_manifest["model_id"]:
            return nothing
        same = ("fields", "z_seed")
        settings = manifest_lib.through_json(self._settings._asdict())
        if any(previous.made_from.get(key) != settings[key] for key in same):
            return nothing
        entries = previous.entries(task)
        sheets = [entry for entry in entries if entry["name"].endswith(".png")]
        try:
            previous_rows = row_files.read(previous.directory, task, entries)
        except StageError:
            return nothing
        sheet = None
        with contextlib.suppress(StageError, OSError):
            sheet = manifest_lib.read_file(previous.directory, sheets[0]) if sheets else None
        return shard.PreviousShard(previous_rows, sheet, previous.shards[task]["kinds"])

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
