"""The distributed training and evaluation steps, many to one call.

The host hands over records on the devices, their order and step numbers, and gets
back one row of sums a step.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import numpy as np
import tensorflow as tf

from pipeline.formats import tf_example
from trainer.data import batches, placement
from trainer.model import objective
from trainer.model.networks import VAE
from trainer.steps import schedules
from trainer.steps.optimizer import Optimizer

# First columns of what both loops return, a row for each batch: sums over the examples
# of the global batch, in nats, and their number.
SUMS = ("loss", "reconstruction_loss", "kl", "num_examples")


class Slice(NamedTuple):
    """A replica's part of a global batch: n places, some of which may hold no example."""

    images: tf.Tensor  # float32 (n, H, W, C) in [0, 1]
    weights: tf.Tensor  # float32 (n,), 0 where there is no example
    total: tf.Tensor  # float32 scalar, weight of the whole global batch
    places: tf.Tensor  # int32 (n,), places in the global batch


class Steps:
    """Training and evaluation of one model on one strategy."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        strategy: tf.distribute.Strategy,
        vae: VAE,
        optimizer: Optimizer | None,
    ):
        """Takes the parts; model and optimizer were built in the strategy's scope.

        Args:
          config: batch_size, seed, jit_compile, binarize, and the objective's keys.
          strategy: as made by `strategies.make`.
          vae: the model.
          optimizer: of its weights; None if it is only evaluated.
        """
        self.config, self.strategy = config, strategy
        self.vae, self._optimizer = vae, optimizer
        self._keys = {
            purpose: batches.noise_key(config.seed, purpose)
            for purpose in ("train noise", "evaluation noise", "train pixels", "evaluation pixels")
        }
        self._forward_and_backward = tf.function(
            self._forward_and_backward, jit_compile=config.jit_compile
        )
        self._is_cluster = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        # Set from another thread to end a call between two steps.
        with tf.device("CPU:0"):
            self._stop = tf.Variable(False, trainable=False)

    @property
    def max_steps(self) -> float:
        """The most steps for one call of `train_some`."""
        return self.config.steps_per_loop

    def stop(self) -> None:
        """Makes a call that is under way return after its current step, and later ones at once."""
        self._stop.assign(True)

    def my_slice(self, records, batch, number, purpose) -> Slice:
        """The part of a batch that a replica takes; in a replica's context.

        Args:
          records: as for `train`.
          batch: int32 scalar, number of the batch in their order.
          number: int32 scalar, number by which noise belongs to it.
          purpose: "train" or "evaluation".
        """
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return self.slice_of(replica, records, batch, number, purpose)

    def _gather(self, words, rows):
        return placement.gather_images(words, rows, self.vae.image_shape)

    def slice_of(self, replica, records, batch, number, purpose, *, gather=None) -> Slice:
        """The part of a batch that a replica takes, anywhere; see `my_slice`.

        Args:
          replica: int32 scalar, its number.
          records: as for `train`.
          batch: int32 scalar, number of the batch in their order.
          number: int32 scalar, number by which noise belongs to it.
          purpose: "train" or "evaluation".
          gather: (images of records, int32 (n,)) -> uint8 (n, H, W, C), if they are no words.
        """
        config, (images, order, num_examples) = self.config, records
        size = {"batch_size": config.batch_size}
        places = batches.replica_places(
            replica, self.strategy.num_replicas_in_sync, config.batch_size
        )
        rows, weights, total = batches.slice_of_batch(order, num_examples, batch, places, **size)
        floats = tf_example.to_floats((gather or self._gather)(images, rows))
        if config.binarize == "dynamic":
            key = self._keys[f"{purpose} pixels"]
            floats = batches.binarize(floats, key, number, places, **size)
        return Slice(floats, weights, total, places)

    def draw_noise(self, number, places, purpose):
        """The noise of some places of a batch, float32 (n, *objective.noise_shape(config)).

        Args:
          number: int32 scalar, as for `my_slice`.
          places: int32 (n,), places in the global batch.
          purpose: "train" or "evaluation".
        """
        return batches.noise(
            self._keys[f"{purpose} noise"],
            number,
            places,
            batch_size=self.config.batch_size,
            shape=objective.noise_shape(self.config),
        )

    def _terms(self, mine: Slice, noise, beta) -> tuple[objective.Terms, tf.Tensor]:
        """The objective's terms, each (n,), and the posterior means, (n, latent_dim)."""
        mean, log_var = self.vae.encoder(mine.images)
        terms = objective.terms(
            self.vae, mine.images, mean, log_var, noise, config=self.config, beta=beta
        )
        return terms, mean

    def _forward_and_backward(self, mine: Slice, noise, beta):
        """Sums of the terms, and this replica's share of the batch's gradients."""
        with tf.GradientTape() as tape:
            terms, _ = self._terms(mine, noise, beta)
            # Divided by the weight of the global batch, once: gradients of replicas add up.
            loss = tf.reduce_sum(mine.weights * terms.loss) / mine.total
            loss = self._optimizer.scale_loss(loss)
        variables = [variable.value for variable in self.vae.variables]
        return _sums(mine.weights, terms), tape.gradient(loss, variables)

    def _gradients_replica(self, records, batch, step):
        """Sums of this replica, and the gradients of the whole batch."""
        mine = self.my_slice(records, batch, step, "train")
        noise = self.draw_noise(step, mine.places, "train")
        sums, gradients = self._forward_and_backward(mine, noise, schedules.beta(self.config, step))
        gradients = tf.distribute.get_replica_context().all_reduce("SUM", gradients)
        return sums, self._optimizer.unscale(gradients)

    def _train_batch(self, records, batch, step):
        run = self.strategy.run
        sums, gradients = run(self._gradients_replica, args=(records, batch, step))
        if self._optimizer.scales_loss:
            # Summed gradients are the same on every replica, so any of them can tell.
            first = [self.strategy.experimental_local_results(g)[0] for g in gradients]
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in first])
            tf.cond(
                finite,
                lambda: run(self._optimizer.apply, args=(gradients,)),
                lambda: None,
            )
            self._optimizer.adapt_scale(finite)
        else:
            run(self._optimizer.apply, args=(gradients,))
        return self.strategy.reduce("SUM", sums, axis=None)

    def _evaluate_replica(self, records, batch, number):
        mine = self.my_slice(records, batch, number, "evaluation")
        noise = self.draw_noise(number, mine.places, "evaluation")
        terms, mean = self._terms(mine, noise, tf.constant(self.config.beta, tf.float32))
        of_latents = tf.concat([mean, tf.square(mean)], axis=1)  # (n, 2·latent_dim)
        of_latents = tf.linalg.matvec(of_latents, mine.weights, transpose_a=True)
        return tf.concat([_sums(mine.weights, terms), of_latents], axis=0)

    def _evaluate_batch(self, records, batch, number):
        sums = self.strategy.run(self._evaluate_replica, args=(records, batch, number))
        return self.strategy.reduce("SUM", sums, axis=None)

    def _any_worker_is_to_stop(self):
        """Whether `stop` was called in any process of a cluster, the same in all of them."""
        own = self.strategy.run(lambda: tf.cast(self._stop, tf.float32))
        return self.strategy.reduce("SUM", own, axis=None) > 0

    def _loop(self, run_batch: Callable, num_batches, width: int):
        """Rows of `run_batch(i)` for each batch, fewer if stopped, and whether it was."""
        # On the host, where the condition waits for no kernel: so the next step is on its way to
        # the devices while they are busy with this one.
        with tf.device("CPU:0"):
            rows = tf.TensorArray(tf.float32, size=num_batches, element_shape=(width,))
            # Workers have to agree on the last step. They do so once a call, and go on to its end.
            i, stopped = 0, self._stop.value()
            if self._is_cluster:
                stopped = self._any_worker_is_to_stop()
            # Not `and`, whose right side would be a branch of its own in the graph.
            while tf.logical_and(i < num_batches, tf.logical_not(stopped)):
                rows = rows.write(i, run_batch(i))
                i += 1
                if not self._is_cluster:
                    stopped = self._stop.value()
            return rows.stack()[:i], stopped

    @tf.function
    def train(self, records, first_batch, first_step, num_steps):
        """Trains up to `num_steps` steps within one epoch.

        Args:
          records: (images, order, num_examples), as from data/placement.py.
          first_batch: int32 scalar, number in the order of the first batch.
          first_step: int32 scalar, global number of the first step.
          num_steps: int32 scalar.

        Returns:
          float32 (num_steps, 4), a row of SUMS for each step; fewer rows after `stop`.
          Whether a call of `stop`, in any process, has ended it: bool scalar.
        """
        return self._loop(
            lambda i: self._train_batch(records, first_batch + i, first_step + i),
            num_steps,
            len(SUMS),
        )

    def place(self, split: str, images: np.ndarray, *, num_bytes: int) -> placement.Split:
        """Puts a split where the steps take it from; see placement.place."""
        del split  # All of them alike.
        return placement.place(self.strategy, images, self.config, num_bytes=num_bytes)

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
        """Trains up to `num_steps` steps within one epoch.

        Args:
          visit: the epoch's records.
          step: global number of the first step.
          first_batch: number in the epoch of the same.
          num_steps: at most `max_steps`.
          on_rows: is given float32 (n, 4), a row of SUMS for each step that is done.

        Returns:
          Whether a call of `stop`, in any process, has ended it.
        """
        rows, stopped = self.train(*self._arguments(visit, step, first_batch, num_steps))
        on_rows(rows.numpy())
        return bool(stopped)

    def _arguments(
        self, visit: placement.Visit, step: int, first_batch: int, num_steps: int
    ) -> tuple:
        records, first = visit.batches(first_batch, num_steps)
        return records, first, tf.constant(step), tf.constant(num_steps)

    @tf.function
    def evaluate(self, records, first_batch, first_number, num_batches):
        """Runs the model over batches without training it.

        The noise of a batch depends on its number alone, so two evaluations of one
        model are equal.

        Args:
          records: as for `train`.
          first_batch: int32 scalar, number in the order of the first batch.
          first_number: int32 scalar, number in the split of the same batch.
          num_batches: int32 scalar.

        Returns:
          float32 (num_batches, 4 + 2·latent_dim), a row of SUMS for each batch, then the sums
          of the posterior means and of their squares, a column a latent; fewer rows after
          `stop`.
          Whether it was stopped, as for `train`.
        """
        return self._loop(
            lambda i: self._evaluate_batch(records, first_batch + i, first_number + i),
            num_batches,
            len(SUMS) + 2 * self.config.latent_dim,
        )


def _sums(weights, terms: objective.Terms):
    """One row of SUMS, float32 (4,)."""
    columns = [tf.reduce_sum(weights * column) for column in terms]
    return tf.stack([*columns, tf.reduce_sum(weights)])
