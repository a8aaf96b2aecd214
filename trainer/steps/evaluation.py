"""Evaluation of a model, and what it shares with training: batch slices, noise and the loop.

The host passes the records on the devices, their order and the batch numbers, and gets back one
row of sums a batch. The training steps are in tape_steps.py and keras_fit_steps.py.
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

# First columns of the rows of training and of evaluation, one row for each batch: sums over the
# examples of the global batch, in nats, and the number of examples.
SUMS = ("loss", "reconstruction_loss", "kl", "num_examples")


class Slice(NamedTuple):
    """A replica's part of a global batch: n places, some of which may hold no example."""

    images: tf.Tensor  # float32 (n, H, W, C) in [0, 1]
    weights: tf.Tensor  # float32 (n,), 0 where there is no example
    total: tf.Tensor  # float32 scalar, weight of the whole global batch
    places: tf.Tensor  # int32 (n,), places in the global batch


def sum_terms(weights: tf.Tensor, terms: objective.Terms) -> tf.Tensor:
    """One row of SUMS, float32 (4,)."""
    columns = [tf.reduce_sum(weights * column) for column in terms]
    return tf.stack([*columns, tf.reduce_sum(weights)])


class Evaluator:
    """Evaluates one model on one strategy.

    Training steps take their slices, their noise and the state of `stop` from here too.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, strategy: tf.distribute.Strategy, vae: VAE
    ):
        """Keeps the parts and derives the noise keys.

        Args:
          config: batch_size, seed, binarize, and the objective's keys.
          strategy: as made by `strategies.make`.
          vae: the model, built in the strategy's scope.
        """
        self.config, self.strategy, self.vae = config, strategy, vae
        self._keys = {
            purpose: batches.noise_key(config.seed, purpose)
            for purpose in ("train noise", "evaluation noise", "train pixels", "evaluation pixels")
        }
        self._is_cluster = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        self.is_stopped = False
        # The same for graphs: another thread sets the variable to end a call between two steps.
        with tf.device("CPU:0"):
            self._stop = tf.Variable(False, trainable=False)

    def stop(self) -> None:
        """Ends the call in progress after its current batch, and later calls at once."""
        self.is_stopped = True
        self._stop.assign(True)

    def place(self, images: np.ndarray, *, num_bytes: int) -> placement.Split:
        """Puts the images of a split on the devices or on the host; see placement.place."""
        return placement.place(self.strategy, images, self.config, num_bytes=num_bytes)

    def replica_slice(self, records, batch, number, purpose) -> Slice:
        """The part of a batch that the current replica takes; call it in a replica's context.

        Args:
          records: placement.OrderedImages.
          batch: int32 scalar, number of the batch in the order of `records`.
          number: int32 scalar, which noise the batch takes: the global step in training, the
            number of the batch in the split in evaluation.
          purpose: "train" or "evaluation".
        """
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return self.slice_batch(replica, records, batch, number, purpose)

    def _gather(self, words, rows):
        return placement.gather_images(words, rows, self.vae.image_shape)

    def slice_batch(self, replica, records, batch, number, purpose, *, gather=None) -> Slice:
        """The part of a batch that any replica takes, in any context.

        Args:
          replica: int32 scalar, the replica's number.
          records: as for `replica_slice`.
          batch: as for `replica_slice`.
          number: as for `replica_slice`.
          purpose: as for `replica_slice`.
          gather: (images of records, int32 (n,)) -> uint8 (n, H, W, C); needed where the images
            are not packed as words.
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
        """The noise at some places of a batch, float32 (n, *objective.noise_shape(config)).

        Args:
          number: int32 scalar, as for `replica_slice`.
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

    def terms(self, replica_slice: Slice, noise, beta) -> tuple[objective.Terms, tf.Tensor]:
        """The objective's terms, each (n,), and the posterior means, (n, latent_dim)."""
        images = replica_slice.images
        mean, log_var = self.vae.encoder(images)
        terms = objective.terms(
            self.vae, images, mean, log_var, noise, config=self.config, beta=beta
        )
        return terms, mean

    def _evaluate_replica(self, records, batch, number):
        replica_slice = self.replica_slice(records, batch, number, "evaluation")
        noise = self.draw_noise(number, replica_slice.places, "evaluation")
        terms, mean = self.terms(replica_slice, noise, tf.constant(self.config.beta, tf.float32))
        moments = tf.concat([mean, tf.square(mean)], axis=1)  # (n, 2·latent_dim)
        moment_sums = tf.linalg.matvec(moments, replica_slice.weights, transpose_a=True)
        return tf.concat([sum_terms(replica_slice.weights, terms), moment_sums], axis=0)

    def _evaluate_batch(self, records, batch, number):
        sums = self.strategy.run(self._evaluate_replica, args=(records, batch, number))
        return self.strategy.reduce("SUM", sums, axis=None)

    def _any_worker_is_stopped(self):
        """Whether `stop` was called in any process of a cluster, the same in all of them."""
        local = self.strategy.run(lambda: tf.cast(self._stop, tf.float32))
        return self.strategy.reduce("SUM", local, axis=None) > 0

    def loop(self, run_batch: Callable, num_batches, width: int):
        """Calls `run_batch(i)` for each batch; call it inside a tf.function.

        Args:
          run_batch: int32 scalar, number of the batch in this call -> float32 (width,).
          num_batches: int32 scalar.
          width: columns of a row.

        Returns:
          float32 (num_batches, width), fewer rows after `stop`.
          Whether a call of `stop`, in any process, has ended the loop: bool scalar.
        """
        # On the host, where the condition waits for no kernel: the host sends the next batch's
        # work to the devices while they are busy with the current batch.
        with tf.device("CPU:0"):
            rows = tf.TensorArray(tf.float32, size=num_batches, element_shape=(width,))
            # Workers have to agree on the last step, so they ask once a call and then finish it.
            i, stopped = 0, self._stop.value()
            if self._is_cluster:
                stopped = self._any_worker_is_stopped()
            # Not `and`, whose right side would be a branch of its own in the graph.
            while tf.logical_and(i < num_batches, tf.logical_not(stopped)):
                rows = rows.write(i, run_batch(i))
                i += 1
                if not self._is_cluster:
                    stopped = self._stop.value()
            return rows.stack()[:i], stopped

    @tf.function
    def evaluate(self, records, first_batch, first_number, num_batches):
        """Runs the model over batches without training it.

        The noise of a batch depends only on the batch's number, so two evaluations of one model
        are equal.

        Args:
          records: placement.OrderedImages.
          first_batch: int32 scalar, number of the first batch in the order of `records`.
          first_number: int32 scalar, number of the same batch in the split.
          num_batches: int32 scalar.

        Returns:
          float32 (num_batches, 4 + 2·latent_dim), a row of SUMS for each batch, then the sums
          of the posterior means and of their squares, a column a latent; fewer rows after
          `stop`.
          Whether a call of `stop`, in any process, has ended the loop: bool scalar.
        """
        return self.loop(
            lambda i: self._evaluate_batch(records, first_batch + i, first_number + i),
            num_batches,
            len(SUMS) + 2 * self.config.latent_dim,
        )
