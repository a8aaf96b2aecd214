"""Training steps by Keras' `compile` and `fit`, for four of the routes in kl_routes.py.

The host feeds each batch and looks at each step, so there is nothing here that
config.steps_per_loop would group.
"""

import functools
import math
from collections.abc import Callable

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from trainer.data import placement
from trainer.model.networks import VAE
from trainer.steps import kl_routes, schedules
from trainer.steps.optimizer import Optimizer
from trainer.steps.tape_steps import Steps

_NUM_BATCHES_AHEAD = 2  # One in the making while the devices have the other.


class _AfterEachStep(keras.callbacks.Callback):
    """Hands on the metrics of every step, and ends `fit` when it is asked to."""

    def __init__(self, steps: "FitSteps", on_metrics: Callable[[dict[str, tf.Tensor]], None]):
        super().__init__()
        self._steps, self._on_metrics = steps, on_metrics

    def on_train_batch_begin(self, batch, logs=None):
        self._steps.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        # Not `logs`: these are means over the replicas, whatever part of the batch each has.
        self._on_metrics(self._steps.metrics())
        self.model.stop_training = self._steps.is_stopped


class FitSteps(Steps):
    """Steps whose training is a Keras model's `fit`; evaluation is the same."""

    max_steps = math.inf

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        strategy: tf.distribute.Strategy,
        vae: VAE,
        optimizer: Optimizer,
    ):
        """Takes the same as Steps, and makes the model of config.kl_route."""
        super().__init__(config, strategy, vae, optimizer)
        with strategy.scope():
            draw_noise = functools.partial(self.draw_noise, purpose="train")
            self.model = kl_routes.compiled(config, vae, optimizer.keras, draw_noise)
        self.is_stopped = False
        # As graphs: under a strategy each variable would cost half a millisecond.
        self.reset_metrics = tf.function(self.model.reset_metrics)
        self.metrics = tf.function(self.model.get_metrics_result)

    def stop(self) -> None:
        """See Steps."""
        self.is_stopped = True
        super().stop()

    def place(self, split: str, images: np.ndarray, *, num_bytes: int) -> placement.Split:
        """See Steps; `fit` is fed by the host."""
        if split == "train":
            return placement.InMemory(images)
        return super().place(split, images, num_bytes=num_bytes)

    def trace(self, visit: placement.Visit, step: int, first_batch: int) -> None:
        """Does nothing: `fit` traces with its first step, for which a signal then has to wait."""

    def _feed(self, records: placement.Records, step: int, first_batch: int, num_steps: int):
        """What `fit` takes for some steps: for each step a batch's part for every replica."""
        num_replicas = self.strategy.num_replicas_in_sync
        shape = records.images.shape[1:]

        def gather(images: np.ndarray, rows: tf.Tensor) -> tf.Tensor:
            gathered = tf.numpy_function(lambda rows: images[rows], [rows], tf.uint8)
            return tf.ensure_shape(gathered, (*rows.shape, *shape))

        def example(number: tf.Tensor) -> tuple:
            i, replica = number // num_replicas, number % num_replicas
            mine = self.slice_of(
                replica, records, first_batch + i, step + i, "train", gather=gather
            )
            weights = mine.weights / mine.total
            beta = schedules.beta(self.config, step + i)
            inputs = {
                "images": mine.images,
                "places": mine.places,
                "step": tf.fill(weights.shape, step + i),
                "weights": weights,
                "beta": tf.fill(weights.shape, beta),
            }
            return inputs, kl_routes.targets(self.config.kl_route, inputs), weights

        numbers = tf.data.Dataset.range(num_steps * num_replicas, output_type=tf.int32)
        examples = numbers.map(example).prefetch(_NUM_BATCHES_AHEAD * num_replicas)
        return self.strategy.distribute_datasets_from_function(lambda _: examples)

    def train_some(
        self,
        visit: placement.Visit,
        *,
        step: int,
        first_batch: int,
        num_steps: int,
        on_rows: Callable[[np.ndarray], None],
    ) -> bool:
        """See Steps; `visit` is of placement.InMemory."""
        if self.is_stopped:
            return True
        records, _ = visit.batches(first_batch, num_steps)
        size = self.config.batch_size
        left = iter(range(int(records.num_examples) - first_batch * size, 0, -size))

        def on_metrics(means: dict[str, tf.Tensor]) -> None:
            num_examples = min(size, next(left))
            terms = [means[name] for name in ("loss", "reconstruction_loss", "kl")]
            on_rows(num_examples * np.array([[*terms, 1.0]], np.float32))

        self.model.fit(
            self._feed(records, step, first_batch, num_steps),
            steps_per_epoch=num_steps,
            shuffle=False,  # Order is the feed's.
            verbose=0,
            callbacks=[_AfterEachStep(self, on_metrics)],
        )
        return self.is_stopped


def make(
    config: ml_collections.ConfigDict,
    strategy: tf.distribute.Strategy,
    vae: VAE,
    optimizer: Optimizer,
) -> Steps:
    """The steps of a config's kl_route, see Steps."""
    steps = Steps if config.kl_route == "gradient_tape" else FitSteps
    return steps(config, strategy, vae, optimizer)
