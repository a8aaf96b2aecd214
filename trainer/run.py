"""The state of one run: its data on the devices, its model, and how far it has come."""

import math

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from pipeline import shards, stage
from pipeline.errors import StageError
from trainer import batches, checkpoints, strategies
from trainer import config as config_lib
from trainer import metrics as metrics_lib
from trainer.model import VAE
from trainer.step import SUMS, Steps, place_on_devices

# Reconstructions shown on TensorBoard, from the first records of a split.
_NUM_PICTURES = 8


class Run:
    """One run: its data on the devices, its model, and its files in workdir."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: str, dataset: shards.Dataset):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.losses: list[shards.Loss] = []  # What of the data cannot be had.
        self._read: dict[str, np.ndarray] = {}  # split -> images, until they are on the devices
        self.num_examples = dataset.num_examples("train")
        if dataset.on_corrupt == "quarantine":  # The order depends on how many there are.
            self._read_data()
            self.num_examples = len(self._read.get("train", ()))
        sizes = [dataset.num_examples(split) for split in self._splits()]
        quarantined = sum(loss.num_records for loss in self.losses)
        self.records = {"read": sum(sizes), "used": sum(sizes) - quarantined}
        self.records["quarantined"] = quarantined
        self.steps_per_epoch = batches.steps_per_epoch(self.num_examples, config.batch_size)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        # What every weight is a function of, and what a checkpoint must agree with.
        self.identity = {
            "dataset_id": dataset.dataset_id,
            "config": config_lib.identity(config),
            "quarantined": {loss.name: stage.content_id(loss.faults) for loss in self.losses},
        }
        self.step = 0
        self.epoch_sums = np.zeros(len(SUMS))  # float64, so that chunks of steps add up exactly

    def _splits(self) -> list[str]:
        """The splits that a run uses."""
        return [s for s in ("train", "validation", "test") if s in self.dataset.splits]

    def _read_data(self) -> None:
        for split in self._splits():
            images, losses = self.dataset.read_split(split)
            self.losses += losses
            if len(images):
                self._read[split] = images

    def build(self) -> None:
        """Makes strategy, model and optimizer, and puts the data on the devices."""
        config = self.config
        keras.config.set_image_data_format("channels_last")
        self.strategy = strategies.make(config)
        with self.strategy.scope():
            self.vae = VAE(config, self.dataset.image_shape)
            self.optimizer = keras.optimizers.Adam(config.learning_rate, name="adam")
            self.optimizer.build(self.vae.variables)
        self.steps = Steps(config, self.strategy, self.vae, self.optimizer)
        self.images = {}  # split -> images on the devices, and their number
        if not self._read:
            self._read_data()
        for split, images in self._read.items():
            self.images[split] = place_on_devices(self.strategy, images), len(images)
        self._read = {}

    @property
    def _variables(self) -> dict[str, keras.Variable]:
        """Name -> variable, of model and optimizer."""
        named = {f"model/{v.path}": v for v in self.vae.variables}
        return named | {f"optimizer/{v.path}": v for v in self.optimizer.variables}

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Takes over the state of a checkpoint."""
        self.step = checkpoint.step
        self.epoch_sums = np.array(checkpoint.epoch_sums)
        variables = self._variables
        if variables.keys() != checkpoint.arrays.keys():
            odd = min(variables.keys() ^ checkpoint.arrays.keys())
            raise StageError(
                f"--workdir={self.workdir}: the checkpoint of step {self.step} and this program's "
                f"model differ in {odd!r}; go on with the Keras version that wrote it, or pass "
                "--overwrite"
            )
        for name, variable in variables.items():
            variable.assign(checkpoint.arrays[name])

    def save(self) -> str:
        """Writes a checkpoint of the present state."""
        return checkpoints.save(
            self.workdir,
            checkpoints.Checkpoint(
                step=self.step,
                epoch_sums=self.epoch_sums.tolist(),
                run=self.identity,
                arrays={name: v.numpy() for name, v in self._variables.items()},
            ),
            keep=self.config.keep_checkpoints,
        )

    def metrics(self, sums) -> dict[str, float]:
        """Means from the sums of some examples."""
        return metrics_lib.from_sums(
            sums, beta=self.config.beta, num_pixels=math.prod(self.dataset.image_shape)
        )

    def train_steps(self, order: tf.Tensor, num_steps: int) -> None:
        """Trains some steps of one epoch and adds up their sums.

        Raises:
          StageError: a term became NaN or infinite.
        """
        rows = self.steps.train(
            self.images["train"][0],
            order,
            tf.constant(self.step % self.steps_per_epoch),
            tf.constant(self.step),
            tf.constant(num_steps),
        ).numpy()
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if bad.size:
            raise StageError(
                f"the loss is NaN or infinite in step {self.step + bad[0] + 1} (steps "
                f"{self.step + 1} to {self.step + num_steps}); checkpoints in "
                f"{self.workdir} are from before it: try a smaller --config.learning_rate"
            )
        for row in rows.astype(np.float64):  # One by one: the same sum however steps are grouped.
            self.epoch_sums += row
        self.step += num_steps

    def evaluate(self, split: str) -> dict[str, float]:
        """Metrics of the present weights on a whole split."""
        images, count = self.images[split]
        rows = self.steps.evaluate(
            images,
            tf.range(count),
            tf.constant(batches.steps_per_epoch(count, self.config.batch_size)),
        ).numpy()
        return self.metrics(rows.astype(np.float64).sum(axis=0))

    def show_reconstructions(self, board: metrics_lib.TensorBoard, split: str) -> None:
        """Writes a few originals and reconstructions to TensorBoard."""
        pixels = self.strategy.experimental_local_results(self.images[split][0])[0][:_NUM_PICTURES]
        noise = tf.zeros((len(pixels), self.config.latent_dim))
        images, _, _, logits = self.vae(pixels, noise)
        board.reconstructions(self.step, images.numpy(), tf.sigmoid(logits).numpy())
