"""Job 3: shards and a model to embeddings and contact sheets, as a Beam pipeline.

One input shard is one element: its worker reads it, runs the model over it, and
writes its Parquet file and its contact sheet. A row is a function of the record's
bytes and the model.
"""

import functools
import time
from collections.abc import Iterable
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline import (
    beam_runner,
    command,
    embeddings,
    examples,
    quarantine,
    shards,
    sheets,
    stage,
    storage,
)
from pipeline.errors import StageError
from pipeline.output_directory import OutputDirectory
from pipeline.progress import Progress
from pipeline.tasks import Tasks

# Images in one call of the model. Every call has exactly this shape, the last one
# padded, so that a row does not depend on how many records stand beside it.
_BATCH_SIZE = 256
# Pairs on a contact sheet. The order within a shard is a hash of the ids, so the
# first records are a fair sample of it.
_SHEET_PAIRS = 96
_SIGNATURE = "embed"


class Model:
    """A published model directory, loaded."""

    def __init__(self, model_dir: str, manifest: dict[str, Any]):
        """Checks the files against the manifest and loads the SavedModel.

        Args:
          model_dir: local path or fsspec URL.
          manifest: the directory's, which the worker may have been sent.

        Raises:
          StageError: a file is missing or damaged.
        """
        command.import_tensorflow()
        import tensorflow as tf

        for entry in manifest["files"]:
            stage.read_file(model_dir, entry)
        with storage.local_copy(model_dir) as directory:
            self._loaded = tf.saved_model.load(directory)
        self._embed = self._loaded.signatures[_SIGNATURE]

    def embed(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs the model over any number of images.

        Args:
          images: uint8 (n, H, W, C).

        Returns:
          float32: mean and log_var (n, latent_dim), reconstruction (n, H, W, C) in [0, 1],
          reconstruction_loss and kl (n,) in nats per image.
        """
        import tensorflow as tf

        parts = []
        # An empty shard still runs one padded batch, for the shapes of its columns.
        for first in range(0, max(1, len(images)), _BATCH_SIZE):
            chunk = images[first : first + _BATCH_SIZE]
            padding = [(0, _BATCH_SIZE - len(chunk))] + [(0, 0)] * 3
            outputs = self._embed(images=tf.constant(np.pad(chunk, padding)))
            parts.append({name: value.numpy()[: len(chunk)] for name, value in outputs.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@functools.lru_cache(maxsize=1)
def _load_model(model_dir: str, manifest_json: bytes) -> Model:
    """The model, loaded once in a process and shared by its threads."""
    import json

    return Model(model_dir, json.loads(manifest_json))


class EmbedShard(beam.DoFn):
    """Entry of an input shard -> its Parquet file, contact sheet and marker."""

    def __init__(
        self,
        data_dir: str,
        model_dir: str,
        model_manifest: dict[str, Any],
        tasks: Tasks,
        on_corrupt: str,
    ):
        """Takes where to read from, the model's manifest, and where to write."""
        self._data_dir, self._model_dir, self._on_corrupt = data_dir, model_dir, on_corrupt
        self._model_manifest, self._tasks = model_manifest, tasks

    def process(self, entry: dict[str, Any]) -> Iterable[None]:
        """Manifest entry of a shard -> nothing."""
        self._tasks.make_once(entry["name"], lambda: self._make(entry))
        return ()

    def _make(self, entry: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        started = time.perf_counter()
        dataset = shards.Dataset(self._data_dir, on_corrupt=self._on_corrupt)
        shard = dataset.read_shard(entry)
        read = time.perf_counter()
        model = _load_model(self._model_dir, stage.canonical_json(self._model_manifest))
        loaded = time.perf_counter()
        outputs = model.embed(shard.images)
        computed = time.perf_counter()
        table = embeddings.parquet(
            shard,
            outputs,
            model_id=self._model_manifest["model_id"],
            dataset_id=dataset.dataset_id,
        )
        table_name, sheet_name = embeddings.file_names(entry["name"])
        directory, about = self._tasks.directory, {"num_examples": len(shard.ids)}
        entries = [{**stage.write_file(directory, table_name, table), **about}]
        if shard.ids:
            sheet = sheets.contact_sheet(
                shard.images[:_SHEET_PAIRS],
                examples.to_pixels(outputs["reconstruction"][:_SHEET_PAIRS]),
            )
            entries.append(stage.write_file(directory, sheet_name, sheet))
        loss = shards.Loss(entry["name"], entry["num_examples"] - len(shard.ids), shard.faults)
        entries += quarantine.write(
            directory,
            entry["name"],
            loss.lines(self._data_dir),
            num_quarantined=loss.num_records,
        )
        secs = {
            "read": read - started,
            "load_model": loaded - read,
            "compute": computed - loaded,
            "write": time.perf_counter() - computed,
        }
        return entries, secs


def _check_reusable(output_dir: str, finished: dict[str, Any], on_corrupt: str) -> None:
    """Raises a StageError if a finished export lacks records, and all are asked for."""
    missing = finished["records"]["quarantined"]
    if missing and on_corrupt == "fail":
        raise StageError(
            f"--output_dir={output_dir}: finished without {missing} records, which were "
            "quarantined, and --on_corrupt=fail asks for all; mend the data set and pass "
            "--overwrite, or pass --on_corrupt=quarantine"
        )


def embed_shards(
    *,
    data_dir: str,
    model_dir: str,
    output_dir: str,
    split: str,
    overwrite: bool,
    options: PipelineOptions,
    on_corrupt: str = "fail",
    max_quarantined: quarantine.Limit = quarantine.DEFAULT_LIMIT,
) -> dict[str, Any]:
    """Exports the embeddings and contact sheets of a split.

    Args:
      data_dir: output directory of preprocess.
      model_dir: model directory that the trainer published.
      output_dir: where to write. All three may be fsspec URLs.
      split: which split.
      overwrite: whether output of other inputs may be replaced.
      options: Beam's.
      on_corrupt: what to do where a shard is damaged, see shards.Dataset.
      max_quarantined: how many records may be missing for that reason.

    Returns:
      The manifest, with the key "reused" where nothing had to be done.

    Raises:
      StageError: an input can't be used, or does not fit the other.
    """
    dataset = shards.Dataset(data_dir, on_corrupt=on_corrupt)
    entries = dataset.shards(split)
    model_manifest = stage.read_manifest(model_dir, "train", "model_dir")
    if model_manifest["image_shape"] != list(dataset.image_shape):
        raise StageError(
            f"--model_dir={model_dir}: is for images of {tuple(model_manifest['image_shape'])}, "
            f"--data_dir={data_dir} has {dataset.image_shape}; expected the same shape: train a "
            "model on this data set, or name the data set it was trained on"
        )
    made_from = {
        "dataset_id": dataset.dataset_id,
        "model_id": model_manifest["model_id"],
        "split": split,
    }
    tasks = [entry["name"] for entry in entries]
    output = OutputDirectory(output_dir, stage="export", made_from=made_from)
    names = [name for task in tasks for name in embeddings.file_names(task)]
    names += map(quarantine.file_name, tasks)
    with output.opened(names, overwrite=overwrite) as finished:
        if finished is not None:
            _check_reusable(output_dir, finished, on_corrupt)
            return {**finished, "reused": True}

        embed = EmbedShard(data_dir, model_dir, model_manifest, output.tasks, on_corrupt)

        def build(pipeline: beam.Pipeline) -> None:
            _ = (
                pipeline
                | "Shards" >> beam.Create(entries, reshuffle=True)  # manifest entries
                | "EmbedShard" >> beam.ParDo(embed)
            )

        progress = Progress("export", total=len(tasks), unit="shards")
        beam_runner.run(build, options, progress=progress, count_done=output.tasks.num_done)

        markers = dict(zip(tasks, output.tasks.markers(tasks), strict=True))
        files = [entry for marker in markers.values() for entry in marker["entries"]]
        num_read = dataset.num_examples(split)
        num_written = sum(entry.get("num_examples", 0) for entry in files)
        num_quarantined = sum(entry.get("num_quarantined", 0) for entry in files)
        quarantine.check(
            max_quarantined,
            quarantine.read_all(output_dir, files),
            num_quarantined=num_quarantined,
            num_records=num_read,
        )
        if num_read != num_written + num_quarantined:
            raise StageError(
                f"{output_dir}: {num_read} records read, {num_written} rows written and "
                f"{num_quarantined} quarantined; expected all of them: run the same command again"
            )
        records = {"read": num_read, "written": num_written, "quarantined": num_quarantined}
        identity = {
            "format_version": stage.FORMAT_VERSION,
            "made_from": output.made_from,
            "quarantined": [e["sha256"] for e in files if "num_quarantined" in e],
        }
        return output.finish(
            {
                "export_id": stage.content_id(identity),
                "dataset_id": dataset.dataset_id,
                "model_id": model_manifest["model_id"],
                "records": records,
                "files": files,
            },
            markers,
        )
