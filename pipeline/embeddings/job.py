"""The Beam part of export: shards through the model, a shard at a time.

Not Beam's RunInference, whose loading once a process (`Shared`) this uses: it forms its
batches as the runner happens to bundle elements, while here a row's bits must not depend on
its neighbours; it would have all rows, pictures too, shuffled back together into a shard's
file; and it loads its model whether or not there is anything to compute.
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
from pipeline.embeddings.inputs import Input, Records
from pipeline.embeddings.model import PublishedModel
from pipeline.embeddings.shard import EmbeddedShard, Making
from pipeline.machine import gpus
from pipeline.runners import run as runner
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.tasks import Tasks
from pipeline.storage import files as files_lib


class Previous(NamedTuple):
    """A finished export in the directory that is written to."""

    model_id: str
    files: dict[str, dict[str, Any]]  # File name -> entry.
    shards: dict[str, dict[str, Any]]  # Task -> what EmbeddedShard.make says of it.


NOTHING_BEFORE = Previous("", {}, {})


class EmbedShard(beam.DoFn):
    """(task, what its input needs) -> its files and marker."""

    def __init__(
        self,
        input_: Input,
        *,
        model_dir: str,
        model_manifest: Mapping[str, Any],
        making: Making,
        tasks: Tasks,
        previous: Previous,
        tolerant: bool,
        fast_math: bool,
    ):
        """Takes what is read, the model, what is made, and what was made before.

        Args:
          input_: the image set.
          model_dir: the model directory.
          model_manifest: its manifest.
          making: what is made of each record.
          tasks: of the directory that is written to.
          previous: the finished export there.
          tolerant: whether a shard that lacks records will do.
          fast_math: see PublishedModel.
        """
        self._input, self._model_dir, self._model_manifest = input_, model_dir, model_manifest
        self._making, self._tasks, self._previous = making, tasks, previous
        self._tolerant, self._fast_math = tolerant, fast_math
        outputs = set(rows.needed_outputs(making.fields))
        self._outputs = sorted(outputs | ({"reconstruction"} if making.images != "none" else set()))
        self._shared = shared.Shared()

    def process(self, element: tuple[str, Any]) -> Iterable[None]:
        """(task, what `Input.records` needs of it) -> nothing."""
        task, needed = element
        records = self._input.records(task, needed)
        known = [self._tasks.marker(task), self._previous.shards.get(task)]
        made_of = None
        if any(known):
            # A shard that lacked records may have been mended since, and may not have been.
            lacked = self._tolerant and any(k and k["quarantined"] for k in known)
            made_of = self._made_of(records.digest(as_promised=not lacked))
        self._tasks.make_once(task, lambda: self._make(task, records, made_of), made_of=made_of)
        return ()

    def _made_of(self, digest: str) -> str:
        """Names what the files of a shard are a function of."""
        model_id = self._model_manifest["model_id"]
        return manifest_lib.content_id([digest, model_id, self._making._asdict()])

    def _make(self, task: str, records: Records, made_of: str | None) -> dict[str, Any]:
        before = self._previous.shards.get(task)
        if before and before["made_of"] == made_of:
            entries = [self._previous.files[name] for name in before["files"]]
            if all(self._is_there(entry) for entry in entries):
                # What waits under their names is of another try, which was not published.
                for entry in entries:
                    files_lib.remove(files_lib.join(self._tasks.files_directory, entry["name"]))
                return {**before, "entries": entries, "secs": {}, "computed": 0}
        known, kinds = self._known(task), before["kinds"] if before else {}
        shard = EmbeddedShard(task, records, self._making, known, kinds, self._tasks)
        made = shard.make(self._model, self._outputs, self._model_manifest)
        return {**made, "made_of": self._made_of(records.found)}

    def _is_there(self, entry: Mapping[str, Any]) -> bool:
        """Whether a file is there at its size; who reads it checks what it holds."""
        try:
            path = files_lib.join(self._tasks.directory, entry["name"])
            return files_lib.num_bytes(path) == entry["bytes"]
        except FileNotFoundError:
            return False

    def _known(self, task: str) -> tuple[rows.Rows | None, bytes | None]:
        """The rows and the contact sheet of a shard in the finished export, if of this model."""
        before = self._previous.shards.get(task)
        if not before or self._previous.model_id != self._model_manifest["model_id"]:
            return None, None
        directory, files = self._tasks.directory, self._previous.files
        entries = [files[name] for name in before["files"]]
        sheet = files.get(f"{row_files.stem(task)}.png")
        try:
            there = row_files.read(directory, task, entries)
            return there, manifest_lib.read_file(directory, sheet) if sheet else None
        except StageError:
            return None, None  # Damaged: they are computed again.

    def _model(self) -> PublishedModel:
        """The model, loaded once in a process and shared by its threads."""

        def load() -> PublishedModel:
            model = PublishedModel(self._model_dir, self._model_manifest, fast_math=self._fast_math)
            return model.prepared(self._outputs)

        return self._shared.acquire(load, tag=self._model_manifest["model_id"])


def embed_shards(
    embed: EmbedShard, input_: Input, *, tasks: Tasks, options: PipelineOptions
) -> None:
    """Runs the pipeline: afterwards each shard has its marker, or says why it failed.

    Args:
      embed: what is done with each shard.
      input_: the image set.
      tasks: of the directory that is written to.
      options: Beam's.
    """

    def build(pipeline: beam.Pipeline) -> None:
        _ = input_.elements(pipeline) | "EmbedShard" >> beam.ParDo(embed)

    num_workers = runner.num_worker_processes(options)
    own_gpus = [gpus.environment_of(number, num_workers) for number in range(num_workers)]
    if any(own_gpus):
        names = ", ".join(f"{number}: {own[gpus.VISIBLE]}" for number, own in enumerate(own_gpus))
        print(f"export: GPUs of the worker processes: {names}", file=sys.stderr)
    progress = Progress("export", total=sum(input_.sizes.values()), unit="records")
    runner.run(
        build,
        options,
        progress=progress,
        count_done=lambda: tasks.num_records_done(input_.sizes),
    )
