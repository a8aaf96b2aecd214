"""What a report is made of: the export's numbers, samples of its rows, their images, the model."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline import latent_space, projector, sample, stage, storage, summary
from pipeline.errors import StageError
from pipeline.inputs import Input
from pipeline.published_model import PublishedModel

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
        input_: Input | None,
        model_dir: str | None,
        run_dir: str | None,
    ):
        """Reads the export, samples of its images, and the model; see make_report."""
        self.manifest, self._input = manifest, input_
        self.summary = summary.read(export_dir, manifest["files"])["summary"]
        self._names = dict(enumerate(input_.class_names)) if input_ else {}
        self.model: PublishedModel | None = None
        self.model_manifest: Mapping[str, Any] | None = None
        if model_dir:
            self._load_model(model_dir)
        pool = sample.heads(manifest, lambda _: export_dir, _POOL)
        if pool is not None and "mean" not in pool.rows.columns:
            pool = None
        # Rows of the projector's bundle, and rows that are looked at; None if there are none.
        self.bundled = pool and sample.stratified(pool, projector.MAX_POINTS, _SEED)
        self.points = pool and sample.stratified(pool, _MAX_POINTS, _SEED)
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
        self.images: dict[str, np.ndarray] = {}  # id -> uint8 (H, W, C), of rows that are shown.
        if input_:
            self._read_images(input_)
        if model_dir and not run_dir:
            run_dir = os.path.dirname(model_dir.rstrip("/"))
        self._run_dir = run_dir

    def _load_model(self, model_dir: str) -> None:
        self.model_manifest = stage.read_manifest(model_dir, "train", "model_dir")
        if self.model_manifest["model_id"] != self.manifest["model_id"]:
            raise StageError(
                f"--model_dir={model_dir}: is {self.model_manifest['model_id']}, and "
                f"{self.manifest['model_id']} made the export; expected the same: name that model, "
                "or export again"
            )
        self.model = PublishedModel(model_dir, self.model_manifest)

    def _read_images(self, input_: Input) -> None:
        """Looks up the images of all rows that are shown, and makes the sprite."""
        shown = {(task, i) for _, i, _, task in self.worst}
        wanted: set[tuple[str, str]] = set()
        if self.points and self.bundled:
            ids, tasks = self.points.rows.ids, self.points.tasks
            shown |= {(tasks[i], ids[i]) for of in self.neighbours for i in of}
            shown |= set(zip(tasks[:NUM_PAIRS], ids[:NUM_PAIRS], strict=True))
            self.sprite = projector.Sprite(self.bundled.rows.ids, input_.image_shape)
            wanted = set(zip(self.bundled.tasks, self.bundled.rows.ids, strict=True))
        by_task: dict[str, set[str]] = {}
        for task, record_id in sorted(wanted | shown):
            by_task.setdefault(task, set()).add(record_id)
        kept = {record_id for _, record_id in shown}
        for record_id, image in input_.images(by_task):
            if self.sprite:
                self.sprite.add(record_id, image)
            if record_id in kept:
                self.images[record_id] = image

    def name_of(self, label: int) -> str:
        """A label as it is shown."""
        return self._names.get(label, str(label))

    def names(self) -> Mapping[int, str]:
        """Label -> class name, as far as classes have names."""
        return self._names

    def run_metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of the run that trained the model; none if there is none."""
        if not self._run_dir:
            return []
        try:
            text = storage.read_bytes(storage.join(self._run_dir, "metrics.jsonl"))
            return [json.loads(line) for line in text.splitlines()]
        except (OSError, ValueError, StageError):
            return []
