"""The plan of one run, before it uses a device: data, identity and number of steps."""

import math

import ml_collections
import numpy as np

from pipeline.datasets import reader
from pipeline.stages import manifest as manifest_lib
from trainer.cluster import strategies
from trainer.data import batches, placement
from trainer.model import weights
from trainer.runs import config as config_lib


class RunPlan:
    """What follows from a config and a data set, and decides whether and how a run starts."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: str, dataset: reader.Dataset):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.is_cluster = config.strategy == "multi_worker"
        self.is_chief = not self.is_cluster or strategies.is_chief()  # Only the chief writes.
        self.damaged_shards: list[reader.DamagedShard] = []  # with their unreadable records
        self._images: dict[str, np.ndarray] = {}  # split -> images, until `take_images`
        num_read = sum(dataset.num_examples(split) for split in self._splits())
        self.num_bytes = num_read * math.prod(dataset.image_shape)  # of all images
        self.num_examples = dataset.num_examples("train")
        if dataset.on_corrupt == "quarantine":  # The order depends on the number of records.
            self._read_images()
            self.num_examples = len(self._images.get("train", ()))
        num_quarantined = sum(shard.num_records for shard in self.damaged_shards)
        self.records = {
            "read": num_read,
            "used": num_read - num_quarantined,
            "quarantined": num_quarantined,
        }
        self.steps_per_epoch = batches.steps_per_epoch(self.num_examples, config.batch_size)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self.initial_weights = None
        if config.warm_start_from:
            self.initial_weights = weights.read(config.warm_start_from, "--config.warm_start_from")
        # The inputs that determine every weight; a checkpoint must have the same identity.
        self.identity = {
            "dataset_id": dataset.dataset_id,
            "config": config_lib.identity(config),
            "quarantined": {
                shard.name: manifest_lib.content_id(shard.faults) for shard in self.damaged_shards
            },
            "warm_start": self.initial_weights and self.initial_weights.manifest["model_id"],
        }

    def _splits(self) -> list[str]:
        """The splits that a run uses."""
        splits = ("train", "validation", "test")
        return [split for split in splits if split in self.dataset.splits]

    def _read_images(self) -> None:
        config = self.config
        allocate = placement.allocator(config.data_placement, self.num_bytes)
        for split in self._splits():
            images, damaged_shards = self.dataset.read_split(split, allocate)
            self.damaged_shards += damaged_shards
            if not len(images):
                continue
            if config.binarize == "static":
                batches.binarize_once(images, seed=config.seed, split=split)
            self._images[split] = images

    def take_images(self) -> dict[str, np.ndarray]:
        """Split -> uint8 (n, H, W, C), no split empty; the plan keeps no reference to them."""
        if not self._images:
            self._read_images()
        images, self._images = self._images, {}
        return images
