"""The state of one run: its data, its model, and how far it has come."""

import math
import sys
from collections.abc import Callable

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from pipeline.cli.errors import StageError
from pipeline.datasets import reader
from pipeline.machine import gpus
from pipeline.stages import manifest as manifest_lib
from trainer.cluster import strategies
from trainer.data import batches, placement
from trainer.model import weights
from trainer.model.networks import VAE
from trainer.runs import checkpoints
from trainer.runs import config as config_lib
from trainer.runs import metrics as metrics_lib
from trainer.steps import keras_fit_steps, schedules
from trainer.steps.optimizer import Optimizer
from trainer.steps.tape_steps import SUMS


class Stopped(Exception):
    """A signal came, here or at another worker, and steps ended before their time."""


class Run:
    """One run: its data, its model, and its files in workdir."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: str, dataset: reader.Dataset):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.is_cluster = config.strategy == "multi_worker"
        self.is_chief = not self.is_cluster or strategies.is_chief()  # Only the chief writes.
        self.losses: list[reader.DamagedShard] = []  # What of the data cannot be had.
        self._arrays: dict[str, np.ndarray] = {}  # split -> images, until they are placed
        self.num_examples = dataset.num_examples("train")
        if dataset.on_corrupt == "quarantine":  # The order depends on how many there are.
            self._read_data()
            self.num_examples = len(self._arrays.get("train", ()))
        quarantined = sum(loss.num_records for loss in self.losses)
        num_read = sum(dataset.num_examples(split) for split in self._splits())
        self.records = {
            "read": num_read,
            "used": num_read - quarantined,
            "quarantined": quarantined,
        }
        self.steps_per_epoch = batches.steps_per_epoch(self.num_examples, config.batch_size)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self._warm = None
        if config.warm_start_from:
            self._warm = weights.read(config.warm_start_from, "--config.warm_start_from")
        # What every weight is a function of, and what a checkpoint must agree with.
        self.identity = {
            "dataset_id": dataset.dataset_id,
            "config": config_lib.identity(config),
            "quarantined": {
                loss.name: manifest_lib.content_id(loss.faults) for loss in self.losses
            },
            "warm_start": self._warm and self._warm.manifest["model_id"],
        }
        self.step = 0
        self.epoch_sums = np.zeros(len(SUMS))  # float64, so that chunks of steps add up exactly
        self.reported: str | None = ""  # metrics.jsonl as of `step`; None if only the file has it
        self.best_step: int | None = None  # Whose checkpoint stays, beside the newest.

    def _splits(self) -> list[str]:
        """The splits that a run uses."""
        return [s for s in ("train", "validation", "test") if s in self.dataset.splits]

    def _num_bytes(self) -> int:
        num_examples = sum(self.dataset.num_examples(split) for split in self._splits())
        return num_examples * math.prod(self.dataset.image_shape)

    def _read_data(self) -> None:
        config = self.config
        allocate = placement.allocator(config.data_placement, self._num_bytes())
        for split in self._splits():
            images, losses = self.dataset.read_split(split, allocate)
            self.losses += losses
            if not len(images):
                continue
            if config.binarize == "static":
                batches.binarize_once(images, seed=config.seed, split=split)
            self._arrays[split] = images

    def build(self) -> None:
        """Makes strategy, model and optimizer, and places the data."""
        config = self.config
        keras.config.set_image_data_format("channels_last")
        self.strategy = strategies.make(config)
        with self.strategy.scope():
            self.vae = VAE(config, self.dataset.image_shape)
            if self._warm:
                weights.assign(self.vae, self._warm, model_dir=config.warm_start_from)
            self.optimizer = Optimizer(config, self.vae, total_steps=self.total_steps)
        self.steps = keras_fit_steps.make(config, self.strategy, self.vae, self.optimizer)
        if not self._arrays:
            self._read_data()
        self.splits: dict[str, placement.Split] = {}
        if config.data_placement == "auto" and self.is_chief:
            fits, why = placement.fits_devices(self.strategy, self._num_bytes())
            if config.kl_route == "gradient_tape" and (gpus.visible() or not fits):
                where = "on the devices" if fits else "on the host"
                print(f"train: images are kept {where}: {why}", file=sys.stderr)
        for split, images in self._arrays.items():
            self.splits[split] = self.steps.place(split, images, num_bytes=self._num_bytes())
        self._arrays = {}

    @property
    def _variables(self) -> dict[str, keras.Variable | tf.Variable]:
        """Name -> variable, of model and optimizer."""
        named = {f"model/{v.path}": v for v in self.vae.variables}
        return named | {f"optimizer/{name}": v for name, v in self.optimizer.variables.items()}

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Takes over the state of a checkpoint."""
        self.step = checkpoint.step
        self.epoch_sums = np.array(checkpoint.epoch_sums)
        self.reported = checkpoint.reported
        variables = self._variables
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        restored_shapes = {name: array.shape for name, array in checkpoint.arrays.items()}
        if shapes != restored_shapes:
            odd = min(name for name, _ in shapes.items() ^ restored_shapes.items())
            raise StageError(
                f"--workdir={self.workdir}: the checkpoint of step {self.step} and this program's "
                f"model differ in {odd!r}; go on with the Keras version that wrote it, or pass "
                "--overwrite"
            )
        for name, variable in variables.items():
            variable.assign(checkpoint.arrays[name])

    def check_agreement(self) -> None:
        """Refuses to go on if the workers of a cluster have restored different steps.

        Raises:
          StageError: they have; with the mean of their steps.
        """
        total = self.sum_over_replicas(self.step)
        num_replicas = self.strategy.num_replicas_in_sync
        if total != num_replicas * self.step:
            raise StageError(
                f"--workdir={self.workdir}: this worker has found the checkpoint of step "
                f"{self.step}, and the workers' mean is {total / num_replicas:.1f}; expected one "
                "directory that all workers share"
            )

    def sum_over_replicas(self, value: int) -> int:
        """The sum of what the workers of a cluster pass for each replica, once all are here."""
        if not self.is_cluster:
            return value * self.strategy.num_replicas_in_sync
        own = tf.constant(value, tf.int64)  # Of floats, the sum of large steps would be rounded.

        def each() -> tf.Tensor:
            # A tensor of its own for each replica: TensorFlow would take the same one for a value
            # of the worker, and add that once.
            return tf.identity(own)

        reduce = tf.function(
            lambda: self.strategy.reduce("SUM", self.strategy.run(each), axis=None),
            autograph=False,
        )
        return int(reduce())

    def save(self) -> str:
        """Writes a checkpoint of the present state; returns its path.

        Raises:
          StageError: a weight is NaN or infinite, so there is nothing worth saving.
        """
        arrays = {name: v.numpy() for name, v in self._variables.items()}
        bad = [name for name, value in arrays.items() if not np.isfinite(value).all()]
        if bad:
            raise self._diverged(f"{bad[0]!r} is NaN or infinite after step {self.step}")
        checkpoint = checkpoints.Checkpoint(
            step=self.step,
            epoch_sums=self.epoch_sums.tolist(),
            run=self.identity,
            arrays=arrays,
            reported=self.reported,
        )
        path = checkpoints.path_of(self.workdir, self.step)
        if self.is_chief:
            keep = self.config.keep_checkpoints
            checkpoints.save(self.workdir, checkpoint, keep=keep, best_step=self.best_step)
        return path

    def take_best_weights(self) -> None:
        """Gives the model the weights of `best_step`, to publish them; the run ends with that."""
        arrays = checkpoints.read_arrays(self.workdir, self.best_step)
        for variable in self.vae.variables:
            variable.assign(arrays[f"model/{variable.path}"])

    def schedules(self) -> dict[str, float]:
        """Learning rate and weight of the KL term in the next step."""
        return {
            "learning_rate": float(self.optimizer.learning_rate.numpy()),
            "beta": float(schedules.beta(self.config, tf.constant(self.step))),
        }

    def _diverged(self, what: str) -> StageError:
        newest = checkpoints.newest_path(self.workdir)
        good = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return StageError(f"{what}; {good}: try a smaller --config.learning_rate")

    def metrics(self, sums) -> dict[str, float]:
        """Means from the sums of some examples."""
        return metrics_lib.from_sums(
            sums,
            num_pixels=math.prod(self.dataset.image_shape),
            bernoulli=self.config.likelihood == "bernoulli",
        )

    @property
    def epoch_is_complete(self) -> bool:
        """Whether all steps of an epoch are done and its metrics are not reported yet."""
        return self.step % self.steps_per_epoch == 0 and bool(self.epoch_sums[-1])

    def visit_epoch(self) -> placement.Visit:
        """The records of the epoch that the next step belongs to."""
        epoch = self.step // self.steps_per_epoch
        return self.splits["train"].visit(
            batches.permutation(self.config.seed, epoch, self.num_examples)
        )

    def trace(self) -> None:
        """Builds the graph of the training steps, which takes seconds, and runs none."""
        self.steps.trace(self.visit_epoch(), self.step, self.step % self.steps_per_epoch)

    def train_steps(
        self, visit: placement.Visit, num_steps: int, on_progress: Callable[[], None] = lambda: None
    ) -> None:
        """Trains some steps of one epoch and adds up their sums.

        Args:
          visit: from `visit_epoch`.
          num_steps: at most steps.max_steps, and within the epoch.
          on_progress: is called each time some of them are counted.

        Raises:
          StageError: a term became NaN or infinite.
          Stopped: a signal came; the steps that were done are counted.
        """
        last = self.step + num_steps

        def count(rows: np.ndarray) -> None:
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if bad.size:
                raise self._diverged(
                    f"the loss is NaN or infinite in step {self.step + bad[0] + 1} (steps "
                    f"{self.step + 1} to {last})"
                )
            for row in rows.astype(np.float64):  # One by one: the same sum however they come.
                self.epoch_sums += row
            self.step += len(rows)
            if len(rows):  # None where a signal came before the first.
                on_progress()

        stopped = self.steps.train_some(
            visit,
            step=self.step,
            first_batch=self.step % self.steps_per_epoch,
            num_steps=num_steps,
            on_rows=count,
        )
        if stopped:
            raise Stopped

    def evaluate(self, split: str) -> dict[str, float]:
        """Metrics of the present weights on a whole split.

        Raises:
          Stopped: a signal came.
        """
        records = self.splits[split]
        visit = records.visit(np.arange(records.num_examples, dtype=np.int32))
        num_batches = batches.steps_per_epoch(records.num_examples, self.config.batch_size)
        total, at_a_time = 0.0, self.config.steps_per_loop
        for number in range(0, num_batches, at_a_time):
            count = min(at_a_time, num_batches - number)
            placed, first = visit.batches(number, count)
            rows, stopped = self.steps.evaluate(
                placed, first, tf.constant(number), tf.constant(count)
            )
            if stopped:
                raise Stopped
            for row in rows.numpy().astype(np.float64):
                total = total + row
        active = metrics_lib.active_units(total[len(SUMS) :], records.num_examples)
        return {**self.metrics(total[: len(SUMS)]), "active_units": active}
