"""Training steps by Keras' `compile` and `fit`, for four of the routes in kl_routes.py.

The host feeds each batch and looks at each step, so config.steps_per_loop has no effect here.
"""

import functools
import math
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from trainer.data import placement
from trainer.steps import kl_routes, schedules
from trainer.steps.evaluation import Evaluator
from trainer.steps.optimizer import Optimizer

_NUM_BATCHES_AHEAD = 2  # The host prepares one while the devices have the other.


class _AfterEachStep(keras.callbacks.Callback):
    """Passes on the metrics of every step, and ends `fit` once the evaluator is stopped."""

    def __init__(self, steps: "KerasFitSteps", on_metrics: Callable[[dict[str, tf.Tensor]], None]):
        super().__init__()
        self._steps, self._on_metrics = steps, on_metrics

    def on_train_batch_begin(self, batch, logs=None):
        self._steps.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        # Not `logs`: these are means over the replicas, whatever part of the batch each has.
        self._on_metrics(self._steps.metrics())
        self.model.stop_training = self._steps.evaluator.is_stopped


class KerasFitSteps:
    """Training steps that are a Keras model's `fit`; see training.TrainingSteps."""

    max_steps = math.inf

    def __init__(self, evaluator: Evaluator, optimizer: Optimizer):
        """Compiles the model of config.kl_route."""
        self.evaluator, self._config = evaluator, evaluator.config
        with evaluator.strategy.scope():
            draw_noise = functools.partial(evaluator.draw_noise, purpose="train")
            self.model = kl_routes.compile_model(
                self._config, evaluator.vae, optimizer.keras, draw_noise
            )
        # As graphs: under a strategy each variable would cost half a millisecond.
        self.reset_metrics = tf.function(self.model.reset_metrics)
        self.metrics = tf.function(self.model.get_metrics_result)

    def place(self, images: np.ndarray, *, num_bytes: int) -> placement.Split:
        """Leaves the images with the host, which feeds `fit`."""
        del num_bytes  # The devices hold only batches.
        return placement.HostArray(images)

    def trace(self, visit: placement.Visit, step: int, first_batch: int) -> None:
        """Does nothing: `fit` traces in its first step, and a signal has to wait for that step."""

    def _feed(self, records: placement.OrderedImages, step: int, first_batch: int, num_steps: int):
        """The data set for `fit`: for each step, one element for each replica."""
        strategy, config = self.evaluator.strategy, self._config
        num_replicas = strategy.num_replicas_in_sync
        image_shape = records.images.shape[1:]

        def gather(images: np.ndarray, rows: tf.Tensor) -> tf.Tensor:
            gathered = tf.numpy_function(lambda rows: images[rows], [rows], tf.uint8)
            return tf.ensure_shape(gathered, (*rows.shape, *image_shape))

        def element(number: tf.Tensor) -> tuple:
            i, replica = number // num_replicas, number % num_replicas
            replica_slice = self.evaluator.slice_batch(
                replica, records, first_batch + i, step + i, "train", gather=gather
            )
            weights = replica_slice.weights / replica_slice.total
            beta = schedules.beta(config, step + i)
            inputs = {
                "images": replica_slice.images,
                "places": replica_slice.places,
                "step": tf.fill(weights.shape, step + i),
                "weights": weights,
                "beta": tf.fill(weights.shape, beta),
            }
            return inputs, kl_routes.targets(config.kl_route, inputs), weights

        numbers = tf.data.Dataset.range(num_steps * num_replicas, output_type=tf.int32)
        elements = numbers.map(element).prefetch(_NUM_BATCHES_AHEAD * num_replicas)
        return strategy.distribute_datasets_from_function(lambda _: elements)

    def train_some(
        self,
        visit: placement.Visit,
        *,
        step: int,
        first_batch: int,
        num_steps: int,
        on_rows: Callable[[np.ndarray], None],
    ) -> bool:
        """Trains up to `num_steps` steps; see training.TrainingSteps."""
        if self.evaluator.is_stopped:
            return True
        records, _ = visit.batches(first_batch, num_steps)
        batch_size = self._config.batch_size
        num_left = int(records.num_examples) - first_batch * batch_size
        left_before_step = iter(range(num_left, 0, -batch_size))

        def on_metrics(means: dict[str, tf.Tensor]) -> None:
            num_examples = min(batch_size, next(left_before_step))
            terms = [means[name] for name in ("loss", "reconstruction_loss", "kl")]
            on_rows(num_examples * np.array([[*terms, 1.0]], np.float32))

        self.model.fit(
            self._feed(records, step, first_batch, num_steps),
            steps_per_epoch=num_steps,
            shuffle=False,  # The feed is already in order.
            verbose=0,
            callbacks=[_AfterEachStep(self, on_metrics)],
        )
        return self.evaluator.is_stopped
