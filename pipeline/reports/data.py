"""What a report is made of: the export's numbers, samples of its rows, their images, the model."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.embeddings import inputs, row_sample, summary
from pipeline.embeddings.model import PublishedModel
from pipeline.reports import latent_space, projector
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files

# Rows at the beginning of shards that samples are drawn from, and rows that are looked at.
_POOL = 50_000
_MAX_POINTS = 5_000
NUM_PAIRS = 48
_NUM_WORST = 24
_NUM_QUERIES, _NUM_NEIGHBOURS = 8, 7
_SEED = 0


class ReportData:
    """All that a report shows, read."""

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
        self._names = dict(enumerate(input_.class_names)) if input_ else {}
        self.model: PublishedModel | None = None
        self.model_manifest: Mapping[str, Any] | None = None
        if model_dir:
            self._load_model(model_dir)
        pool = row_sample.heads(manifest, lambda _: export_dir, _POOL)
        if pool is not None and "mean" not in pool.rows.columns:
            pool = None
        # Rows of the projector's bundle, and rows that are looked at; None if there are none.
        self.bundled = pool and row_sample.stratified(pool, projector.MAX_POINTS, _SEED)
        self.points = pool and row_sample.stratified(pool, _MAX_POINTS, _SEED)
        # [loss, id, label, task], downwards.
        self.worst = self.summary.get("worst", [])[:_NUM_WORST]
        # Lists of places among the points, each a row and then those that are nearest.
        self.neighbours: list[list[int]] = []
        if self.points:
            rows = self.points.rows
            self.neighbours = latent_space.neighbours(
                rows.columns["mean"],
                rows.labels,
                num_queries=_NUM_QUERIES,
                num_neighbours=_NUM_NEIGHBOURS,
            )
        self.sprite: projector.Sprite | None = None
        # uint8 (H, W, C), of rows that are shown.
        self.images: dict[inputs.Key, np.ndarray] = {}
        self.num_missing = 0  # Images that were looked up and not found.
        if input_:
            self._read_images(input_)
        self.run_metrics = _run_metrics(model_dir, run_dir)

    def _load_model(self, model_dir: str) -> None:
        self.model_manifest = manifest_lib.read_manifest(model_dir, "train", "model_dir")
        if self.model_manifest["model_id"] != self.manifest["model_id"]:
            raise StageError(
                f"--model_dir={model_dir}: is {self.model_manifest['model_id']}, and "
                f"{self.manifest['model_id']} made the export; expected the same: name that model, "
                "or export again"
            )
        self.model = PublishedModel(model_dir, self.model_manifest)

    def _read_images(self, input_: inputs.Input) -> None:
        """Looks up the images of all rows that are shown, and makes the sprite."""
        shown = {(task, i) for _, i, _, task in self.worst}
        keys: list[inputs.Key] = []
        if self.points and self.bundled:
            looked_at = {i for of in self.neighbours for i in of}
            looked_at |= set(range(len(self.points.tasks[:NUM_PAIRS])))
            shown |= {self.points.key(i) for i in looked_at}
            keys = [self.bundled.key(i) for i in range(len(self.bundled.tasks))]
            self.sprite = projector.Sprite(keys, input_.image_shape)
        wanted = shown.union(keys)
        by_task: dict[str, set[str]] = {}
        for task, record_id in sorted(wanted):
            by_task.setdefault(task, set()).add(record_id)
        self.num_missing = len(wanted)
        for key, image in input_.images(by_task):
            self.num_missing -= 1
            if self.sprite:
                self.sprite.add(key, image)
            if key in shown:
                self.images[key] = image

    def name_of(self, label: int) -> str:
        """A label as it is shown."""
        return self._names.get(label, str(label))

    def names(self) -> Mapping[int, str]:
        """Label -> class name, as far as classes have names."""
        return self._names


def _check_same(input_: inputs.Input, manifest: Mapping[str, Any]) -> None:
    """Raises a StageError unless an image set is the one that was exported."""
    asked = manifest_lib.through_json({**input_.settings, **input_.identity})
    there = {key: manifest["made_from"].get(key) for key in asked}
    if differ := manifest_lib.differences(there, asked):
        raise StageError(
            f"the images are not those of the export ({'; '.join(differ)}): name the image set and "
            "the splits that were exported, export again, or leave them out and do without images"
        )


def _run_metrics(model_dir: str | None, run_dir: str | None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of the run that trained the model, as far as they are such."""
    named = run_dir is not None
    if not named and model_dir:
        is_url = files.is_url(model_dir)
        run_dir = os.path.dirname((model_dir if is_url else os.path.abspath(model_dir)).rstrip("/"))
    if not run_dir:
        return []
    path = files.join(run_dir, "metrics.jsonl")
    try:
        lines = files.read_bytes(path).splitlines()
    except OSError as error:
        if not named:
            return []
        raise StageError(
            f"--run_dir={run_dir}: has no metrics.jsonl; expected the workdir of python -m "
            "trainer.main"
        ) from error
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue  # The last line of a run that was killed, for one.
        if isinstance(value, dict) and isinstance(value.get("split"), str):
            if isinstance(value.get("epoch"), int | float):
                found.append(value)
    return found
