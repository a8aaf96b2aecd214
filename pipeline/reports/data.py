"""Reads the data of a report: statistics, samples of rows, their images, the model, its run."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.embeddings import inputs, rows, summary
from pipeline.embeddings.comparison import row_sample
from pipeline.embeddings.model import PublishedModel
from pipeline.formats import projector
from pipeline.formats.tf_example import UNLABELLED
from pipeline.reports import latent_space, scatter
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files

# Samples are drawn from the first rows of all shards, this many rows.
_POOL = 50_000
_MAX_SAMPLE = 5_000  # Rows for maps, neighbours and probes.
NUM_PAIRS = 48
_NUM_WORST = 24
_NUM_QUERIES, _NUM_NEIGHBOURS = 8, 7
_SEED = 0


class ReportData:
    """The data of one report."""

    def __init__(
        self,
        export_dir: str,
        manifest: Mapping[str, Any],
        *,
        input_: inputs.Input | None,
        model_dir: str | None,
        run_dir: str | None,
    ):
        """Reads the export, samples of its images, and the model; see make_report."""
        self.manifest = manifest
        if input_:
            _check_same(input_, manifest)
        self.summary = summary.read(export_dir, manifest["files"])["summary"]
        # Label -> class name; empty without images.
        self.class_names: dict[int, str] = {}
        if input_:
            names = manifest.get("class_names", input_.class_names)
            self.class_names = dict(enumerate(names))
            self.class_names.setdefault(UNLABELLED, "unlabelled")
        self.model: PublishedModel | None = None
        self.model_manifest: Mapping[str, Any] | None = None
        if model_dir:
            self._load_model(model_dir)
        pool = row_sample.heads(export_dir, manifest, _POOL)
        # Rows for the losses of classes; None without rows.
        self.loss_sample = pool and row_sample.stratified(pool, projector.MAX_POINTS, _SEED)
        if pool is not None and "mean" not in pool.rows.columns:
            pool = None
        # Rows for the projector, and rows for the report; None without embeddings.
        self.projector_sample = pool and self.loss_sample
        self.sample = pool and row_sample.stratified(pool, _MAX_SAMPLE, _SEED)
        # [loss, id, label, task] by descending loss.
        self.worst = self.summary.get("worst", [])[:_NUM_WORST]
        labels = [row[2] for row in self.worst]
        labels += self.loss_sample.rows.labels.tolist() if self.loss_sample else []
        # Without any label, the page shows no classes.
        self.is_labelled = not labels or any(label != UNLABELLED for label in labels)
        # Lists of indices into the sample: a row, then its nearest neighbours.
        self.neighbours: list[list[int]] = []
        if self.sample:
            self.neighbours = latent_space.neighbours(
                self.sample.rows.columns["mean"],
                self.sample.rows.labels,
                num_queries=_NUM_QUERIES,
                num_neighbours=_NUM_NEIGHBOURS,
            )
        self.sprite: projector.Sprite | None = None
        self.thumbnails: projector.Sprite | None = None  # For the scatter.
        # Nats that no reconstruction_loss of a record is below, where the summary has them.
        self.floors: dict[inputs.Key, float] = {}
        self.images: dict[inputs.Key, np.ndarray] = {}  # uint8 (H, W, C), those on the page.
        self.num_missing = 0  # Images that can no longer be read.
        if input_:
            self._read_images(input_)
        self.run_metrics = _run_metrics(model_dir, run_dir)

    def _load_model(self, model_dir: str) -> None:
        self.model_manifest = manifest_lib.read_manifest(model_dir, "train", "--model_dir")
        if self.model_manifest["model_id"] != self.manifest["model_id"]:
            raise StageError(
                f"--model_dir={model_dir}: is model {self.model_manifest['model_id']}, but "
                f"{self.manifest['model_id']} made the export; expected the same: name that model, "
                "or export again"
            )
        self.model = PublishedModel(model_dir, self.model_manifest)

    def _read_images(self, input_: inputs.Input) -> None:
        """Reads the images on the page, and makes the sprite."""
        page_keys = {(row[3], row[1]) for row in self.worst}
        has_floor = bool(self.worst) and len(self.worst[0]) > 4
        sprite_keys: list[inputs.Key] = []
        point_keys: list[inputs.Key] = []
        if self.sample and self.projector_sample:
            indices = {i for neighbours in self.neighbours for i in neighbours}
            indices |= set(range(len(self.sample.tasks[:NUM_PAIRS])))
            page_keys |= {self.sample.key(i) for i in indices}
            num_points = len(self.projector_sample.tasks)
            sprite_keys = [self.projector_sample.key(i) for i in range(num_points)]
            self.sprite = projector.Sprite(sprite_keys, input_.image_shape)
            num_points = min(scatter.MAX_POINTS, len(self.sample.tasks))
            point_keys = [self.sample.key(i) for i in range(num_points)]
            self.thumbnails = projector.Sprite(
                point_keys, input_.image_shape, max_side=scatter.MAX_SIDE
            )
        keys = page_keys.union(sprite_keys, point_keys)
        ids_by_shard: dict[str, set[str]] = {}
        for task, record_id in sorted(keys):
            ids_by_shard.setdefault(task, set()).add(record_id)
        self.num_missing = len(keys)
        for key, image in input_.images(ids_by_shard):
            self.num_missing -= 1
            if self.sprite and self.thumbnails:
                self.sprite.add(key, image)
                self.thumbnails.add(key, image)
            if has_floor:
                self.floors[key] = float(rows.bernoulli_entropy(image[None])[0])
            if key in page_keys:
                self.images[key] = image

    def class_name(self, label: int) -> str:
        """The class name of a label, or the label if it has none; "" in an unlabelled set."""
        if not self.is_labelled:
            return ""
        return self.class_names.get(label, str(label))


def _check_same(input_: inputs.Input, manifest: Mapping[str, Any]) -> None:
    """Raises a StageError unless an image set is the one that was exported."""
    requested = manifest_lib.through_json({**input_.settings, **input_.identity})
    exported = {key: manifest["made_from"].get(key) for key in requested}
    if differences := manifest_lib.differences(exported, requested):
        raise StageError(
            f"the images are not those of the export ({'; '.join(differences)}): name the image "
            "set and the splits that were exported, export again, or name no images for a report "
            "without them"
        )


def _run_metrics(model_dir: str | None, run_dir: str | None) -> list[dict[str, Any]]:
    """The valid lines of the metrics.jsonl of the run that trained the model."""
    is_explicit = run_dir is not None
    if not is_explicit and model_dir:
        is_url = files.is_url(model_dir)
        run_dir = os.path.dirname((model_dir if is_url else os.path.abspath(model_dir)).rstrip("/"))
    if not run_dir:
        return []
    path = files.join(run_dir, "metrics.jsonl")
    try:
        lines = files.read_bytes(path).splitlines()
    except OSError as error:
        if not is_explicit:
            return []
        raise StageError(
            f"--run_dir={run_dir}: has no metrics.jsonl; expected the workdir of python -m "
            "trainer.main"
        ) from error
    metrics = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue  # For example the last line of a run that was killed.
        if isinstance(value, dict) and isinstance(value.get("split"), str):
            if isinstance(value.get("epoch"), int | float):
                metrics.append(value)
    return metrics
