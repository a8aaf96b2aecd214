"""Training steps under a gradient tape, many in one call of TensorFlow: kl_route gradient_tape."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer.data import placement
from trainer.steps import schedules
from trainer.steps.evaluation import SUMS, Evaluator, Slice, sum_terms
from trainer.steps.optimizer import Optimizer


class TapeSteps:
    """The training steps of a model; see training.TrainingSteps."""

    def __init__(self, evaluator: Evaluator, optimizer: Optimizer):
        """Prepares a replica's pass; config.jit_compile compiles the pass with XLA."""
        self.evaluator, self._optimizer = evaluator, optimizer
        self._config, self._strategy = evaluator.config, evaluator.strategy
        self.max_steps = self._config.steps_per_loop
        self._forward_and_backward = tf.function(
            self._forward_and_backward, jit_compile=self._config.jit_compile
        )

    def _forward_and_backward(self, replica_slice: Slice, noise, beta):
        """Sums of the terms, and this replica's share of the batch's gradients."""
        with tf.GradientTape() as tape:
            terms, _ = self.evaluator.terms(replica_slice, noise, beta)
            # Divided by the weight of the global batch, once: gradients of replicas add up.
            loss = tf.reduce_sum(replica_slice.weights * terms.loss) / replica_slice.total
            loss = self._optimizer.scale_loss(loss)
        variables = [variable.value for variable in self.evaluator.vae.variables]
        return sum_terms(replica_slice.weights, terms), tape.gradient(loss, variables)

    def _gradients_replica(self, records, batch, step):
        """Sums of this replica, and the gradients of the whole batch."""
        replica_slice = self.evaluator.replica_slice(records, batch, step, "train")
        noise = self.evaluator.draw_noise(step, replica_slice.places, "train")
        beta = schedules.beta(self._config, step)
        sums, gradients = self._forward_and_backward(replica_slice, noise, beta)
        gradients = tf.distribute.get_replica_context().all_reduce("SUM", gradients)
        return sums, self._optimizer.unscale(gradients)

    def _train_batch(self, records, batch, step):
        run = self._strategy.run
        sums, gradients = run(self._gradients_replica, args=(records, batch, step))
        if self._optimizer.scales_loss:
            # Summed gradients are the same on every replica, so the first replica's are enough.
            first = [self._strategy.experimental_local_results(g)[0] for g in gradients]
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in first])
            tf.cond(
                finite,
                lambda: run(self._optimizer.apply, args=(gradients,)),
                lambda: None,
            )
            self._optimizer.adapt_scale(finite)
        else:
            run(self._optimizer.apply, args=(gradients,))
        return self._strategy.reduce("SUM", sums, axis=None)

    @tf.function
    def train(self, records, first_batch, first_step, num_steps):
        """Trains up to `num_steps` steps within one epoch.

        Args:
          records: placement.OrderedImages.
          first_batch: int32 scalar, number of the first batch in the order of `records`.
          first_step: int32 scalar, global number of the first step.
          num_steps: int32 scalar.

        Returns:
          float32 (num_steps, 4), a row of SUMS for each step; fewer rows after `stop`.
          Whether a call of `stop`, in any process, has ended the loop: bool scalar.
        """
        return self.evaluator.loop(
            lambda i: self._train_batch(records, first_batch + i, first_step + i),
            num_steps,
            len(SUMS),
        )

    def place(self, images: np.ndarray, *, num_bytes: int) -> placement.Split:
        """Puts the images where evaluation takes its images from too."""
        return self.evaluator.place(images, num_bytes=num_bytes)

    def trace(self, visit: placement.Visit, step: int, first_batch: int) -> None:
        """Builds the graph of `train`, which takes seconds, and runs no step."""
        self.train.get_concrete_function(*self._arguments(visit, step, first_batch, 1))

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
        rows, stopped = self.train(*self._arguments(visit, step, first_batch, num_steps))
        on_rows(rows.numpy())
        return bool(stopped)

    def _arguments(
        self, visit: placement.Visit, step: int, first_batch: int, num_steps: int
    ) -> tuple:
        records, first = visit.batches(first_batch, num_steps)
        return records, first, tf.constant(step), tf.constant(num_steps)
