"""The state of one run on its devices: its model, its step and its sums.

Its data, its identity and its number of steps are in plan.py.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from pipeline.cli.errors import StageError
from pipeline.machine import gpus
from trainer.cluster import strategies
from trainer.cluster.watchdog import Watchdog
from trainer.data import batches, placement
from trainer.model import weights
from trainer.model.networks import VAE
from trainer.runs import checkpoints
from trainer.runs import metrics as metrics_lib
from trainer.runs.plan import RunPlan
from trainer.steps import schedules, training
from trainer.steps.evaluation import SUMS, Evaluator
from trainer.steps.optimizer import Optimizer


class Stopped(Exception):
    """A signal, at this worker or another, has ended steps or an evaluation early."""


class Run:
    """One run on its devices: model, optimizer, placed data, and how far it has come."""

    def __init__(self, plan: RunPlan):
        """Makes strategy, model and optimizer, and places the data."""
        config = plan.config
        self.plan, self.config, self.workdir = plan, config, plan.workdir
        keras.config.set_image_data_format("channels_last")
        self.strategy = strategies.make(config)
        with self.strategy.scope():
            self.vae = VAE(config, plan.dataset.image_shape)
            if plan.initial_weights:
                weights.assign(self.vae, plan.initial_weights, model_dir=config.warm_start_from)
            self.optimizer = Optimizer(config, self.vae, total_steps=plan.total_steps)
        self.evaluator = Evaluator(config, self.strategy, self.vae)
        self.steps = training.make(self.evaluator, self.optimizer)
        images_by_split = plan.take_images()
        if config.data_placement == "auto" and plan.is_chief:
            fits, reason = placement.fits_devices(self.strategy, plan.num_bytes)
            if config.kl_route == "gradient_tape" and (gpus.visible() or not fits):
                where = "on the devices" if fits else "on the host"
                print(f"train: images are kept {where}: {reason}", file=sys.stderr)
        self.splits: dict[str, placement.Split] = {}
        for split, images in images_by_split.items():
            consumer = self.steps if split == "train" else self.evaluator
            self.splits[split] = consumer.place(images, num_bytes=plan.num_bytes)
        self._watchdog = Watchdog() if plan.is_cluster else None
        self.step = 0
        self.epoch_sums = np.zeros(len(SUMS))  # float64, so that chunks of steps add up exactly
        self.metrics_text: str | None = ""  # metrics.jsonl at `step`; None if only the file has it
        self.best_step: int | None = None  # The step whose checkpoint stays beside the newest.

    @property
    def _variables(self) -> dict[str, keras.Variable | tf.Variable]:
        """Name in a checkpoint -> variable, of model and optimizer."""
        named = {f"model/{v.path}": v for v in self.vae.variables}
        return named | {f"optimizer/{name}": v for name, v in self.optimizer.variables.items()}

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Takes over the state of a checkpoint."""
        self.step = checkpoint.step
        self.epoch_sums = np.array(checkpoint.epoch_sums)
        self.metrics_text = checkpoint.metrics_text
        variables = self._variables
        shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
        restored_shapes = {name: array.shape for name, array in checkpoint.arrays.items()}
        if shapes != restored_shapes:
            name = min(name for name, _ in shapes.items() ^ restored_shapes.items())
            raise StageError(
                f"--workdir={self.workdir}: the checkpoint of step {self.step} and this program's "
                f"model differ in {name!r}; resume with the Keras version that wrote the "
                "checkpoint, or pass --overwrite"
            )
        for name, variable in variables.items():
            variable.assign(checkpoint.arrays[name])

    def check_agreement(self) -> None:
        """Refuses to train if the workers of a cluster have restored different steps.

        Raises:
          StageError: the steps differ; names this worker's step and the workers' mean.
        """
        total = self.sum_over_replicas(self.step)
        num_replicas = self.strategy.num_replicas_in_sync
        if total != num_replicas * self.step:
            raise StageError(
                f"--workdir={self.workdir}: this worker has restored step {self.step}, and the "
                f"mean over all workers is {total / num_replicas:.1f}; expected one directory that "
                "all workers share"
            )

    @functools.cached_property
    def _sum_over_replicas(self) -> Callable[[tf.Tensor], tf.Tensor]:
        # A new tensor for each replica: TensorFlow takes a shared tensor for a value of the worker,
        # and adds it once.
        run, reduce = self.strategy.run, self.strategy.reduce
        return tf.function(
            lambda value: reduce("SUM", run(tf.identity, args=(value,)), axis=None),
            autograph=False,
        )

    def sum_over_replicas(self, value: int) -> int:
        """The sum over all replicas of their workers' values; waits for all workers."""
        if not self.plan.is_cluster:
            return value * self.strategy.num_replicas_in_sync
        # float32 would round the sum of large steps.
        return int(self._sum_over_replicas(tf.constant(value, tf.int64)))

    def _watch(self, name: str, num_batches: int) -> contextlib.AbstractContextManager[None]:
        """Watches a call in a cluster; see Watchdog.watch."""
        if self._watchdog is None:
            return contextlib.nullcontext()
        return self._watchdog.watch(name, num_batches)

    def stop(self) -> None:
        """Ends training or evaluation after the current step; may be called in another thread."""
        self.evaluator.stop()

    def save(self) -> str:
        """Writes a checkpoint of the current state; returns its path.

        Raises:
          StageError: a weight is NaN or infinite; no checkpoint is written.
        """
        arrays = {name: v.numpy() for name, v in self._variables.items()}
        for name, value in arrays.items():
            if not np.isfinite(value).all():
                raise self._divergence(f"{name!r} is NaN or infinite after step {self.step}")
        checkpoint = checkpoints.Checkpoint(
            step=self.step,
            epoch_sums=self.epoch_sums.tolist(),
            run=self.plan.identity,
            arrays=arrays,
            metrics_text=self.metrics_text,
        )
        path = checkpoints.checkpoint_path(self.workdir, self.step)
        if self.plan.is_chief:
            keep = self.config.keep_checkpoints
            checkpoints.save(self.workdir, checkpoint, keep=keep, best_step=self.best_step)
        # The others wait here for a slow storage, and not in a call of steps, which is watched.
        self.sum_over_replicas(0)
        return path

    def load_best_weights(self) -> None:
        """Gives the model the weights of `best_step`, to publish them; no step may follow."""
        arrays = checkpoints.read_arrays(self.workdir, self.best_step)
        for variable in self.vae.variables:
            variable.assign(arrays[f"model/{variable.path}"])

    def schedules(self) -> dict[str, float]:
        """Learning rate and KL weight of the next step."""
        return {
            "learning_rate": float(self.optimizer.learning_rate.numpy()),
            "beta": float(schedules.beta(self.config, tf.constant(self.step))),
        }

    def _divergence(self, problem: str) -> StageError:
        newest = checkpoints.newest_path(self.workdir)
        state = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return StageError(f"{problem}; {state}: try a smaller --config.learning_rate")

    def metrics(self, sums) -> dict[str, float]:
        """Metrics from sums over examples, see evaluation.SUMS."""
        return metrics_lib.from_sums(
            sums,
            num_pixels=math.prod(self.plan.dataset.image_shape),
            bernoulli=self.config.likelihood == "bernoulli",
        )

    @property
    def epoch_is_complete(self) -> bool:
        """Whether all steps of an epoch are done and its metrics are not yet reported."""
        return self.step % self.plan.steps_per_epoch == 0 and bool(self.epoch_sums[-1])

    def visit_epoch(self) -> placement.Visit:
        """Begins a visit of the records in the order of the next step's epoch."""
        epoch = self.step // self.plan.steps_per_epoch
        return self.splits["train"].visit(
            batches.permutation(self.config.seed, epoch, self.plan.num_examples)
        )

    def trace(self) -> None:
        """Builds the graph of the training steps, which takes seconds, and runs no step."""
        self.steps.trace(self.visit_epoch(), self.step, self.step % self.plan.steps_per_epoch)

    def train_steps(
        self, visit: placement.Visit, num_steps: int, on_progress: Callable[[], None] = lambda: None
    ) -> None:
        """Trains some steps of one epoch and adds up their sums.

        Args:
          visit: from `visit_epoch`.
          num_steps: at most steps.max_steps, and within the epoch.
          on_progress: called each time some steps are counted.

        Raises:
          StageError: a term became NaN or infinite.
          Stopped: a signal came; the finished steps are counted.
        """
        last_step = self.step + num_steps

        def count(rows: np.ndarray) -> None:
            bad_rows = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if bad_rows.size:
                raise self._divergence(
                    f"the loss is NaN or infinite in step {self.step + bad_rows[0] + 1} (steps "
                    f"{self.step + 1} to {last_step})"
                )
            for row in rows.astype(np.float64):  # One by one: the same sum for any grouping.
                self.epoch_sums += row
            self.step += len(rows)
            if len(rows):  # There is no row if a signal came before the first step.
                on_progress()

        with self._watch("a call of training steps", num_steps):
            stopped = self.steps.train_some(
                visit,
                step=self.step,
                first_batch=self.step % self.plan.steps_per_epoch,
                num_steps=num_steps,
                on_rows=count,
            )
        if stopped:
            raise Stopped

    def evaluate(self, split: str) -> dict[str, float]:
        """Metrics of the current weights on a whole split.

        Raises:
          Stopped: a signal came.
        """
        num_examples = self.splits[split].num_examples
        visit = self.splits[split].visit(np.arange(num_examples, dtype=np.int32))
        num_batches = batches.steps_per_epoch(num_examples, self.config.batch_size)
        sums, max_batches = 0.0, self.config.steps_per_loop
        for number in range(0, num_batches, max_batches):
            count = min(max_batches, num_batches - number)
            records, first = visit.batches(number, count)
            with self._watch(f"a call of evaluation on {split}", count):
                rows, stopped = self.evaluator.evaluate(
                    records, first, tf.constant(number), tf.constant(count)
                )
                rows = rows.numpy().astype(np.float64)
            if stopped:
                raise Stopped
            for row in rows:
                sums = sums + row
        active = metrics_lib.active_units(sums[len(SUMS) :], num_examples)
        return {**self.metrics(sums[: len(SUMS)]), "active_units": active}
