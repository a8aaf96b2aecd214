"""The distributed training and evaluation steps, many to one call.

The data set lies on every device; the host hands over the epoch's order and step
numbers and gets back one row of sums a step.
"""

import ml_collections
import numpy as np
import tensorflow as tf

from trainer import batches, losses
from trainer.model import VAE

# Columns of what both loops return, a row for each batch: sums over the examples of
# the global batch, in nats, and their number.
SUMS = ("reconstruction_loss", "kl", "num_examples")


def place_on_devices(strategy: tf.distribute.Strategy, images: np.ndarray):
    """Copies an array to the device of every replica, uint8 (n, H, W, C)."""
    devices = strategy.extended.worker_devices

    def copy(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        with tf.device(devices[context.replica_id_in_sync_group]):
            return tf.constant(images)

    return strategy.experimental_distribute_values_from_function(copy)


class Steps:
    """Training and evaluation of one model on one strategy."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        strategy: tf.distribute.Strategy,
        vae: VAE,
        optimizer,
    ):
        """Takes the parts; model and optimizer were built in the strategy's scope.

        Args:
          config: batch_size, latent_dim, beta, seed, jit_compile.
          strategy: as made by `strategies.make`.
          vae: the model.
          optimizer: a built Keras optimizer.
        """
        self._config, self._strategy = config, strategy
        self._vae, self._optimizer = vae, optimizer
        self._train_key = batches.noise_key(config.seed, "train noise")
        self._evaluate_key = batches.noise_key(config.seed, "evaluation noise")
        self._forward_and_backward = tf.function(
            self._forward_and_backward, jit_compile=config.jit_compile
        )

    def _my_slice(self, images, order, batch, number, key):
        """Pixels, weights and noise of this replica's part of a batch, and the batch's weight."""
        config = self._config
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        places = batches.replica_places(
            replica, self._strategy.num_replicas_in_sync, config.batch_size
        )
        rows, weights, total = batches.slice_of_batch(order, batch, places, config.batch_size)
        noise = batches.noise(
            key, number, places, batch_size=config.batch_size, latent_dim=config.latent_dim
        )
        return tf.gather(images, rows), weights, noise, total

    def _terms(self, pixels, noise):
        """reconstruction_loss and kl of each example, both float32 (n,)."""
        images, mean, log_var, logits = self._vae(pixels, noise)
        return losses.reconstruction_loss(images, logits), losses.kl(mean, log_var)

    def _forward_and_backward(self, pixels, weights, noise, total):
        """Sums of the terms and the gradients of the batch's mean loss, this replica's share."""
        with tf.GradientTape() as tape:
            reconstruction_loss, kl = self._terms(pixels, noise)
            per_example = reconstruction_loss + self._config.beta * kl  # (n,)
            # Divided by the weight of the global batch, once: gradients of replicas add up.
            loss = tf.reduce_sum(weights * per_example) / total
        variables = [variable.value for variable in self._vae.variables]
        gradients = tape.gradient(loss, variables)
        return _sums(weights, reconstruction_loss, kl), gradients

    def _train_replica(self, images, order, batch, step):
        sums, gradients = self._forward_and_backward(
            *self._my_slice(images, order, batch, step, self._train_key)
        )
        self._optimizer.apply(gradients, self._vae.variables)  # Sums over replicas first.
        return sums

    def _evaluate_replica(self, images, order, batch):
        pixels, weights, noise, _ = self._my_slice(images, order, batch, batch, self._evaluate_key)
        return _sums(weights, *self._terms(pixels, noise))

    def _loop(self, replica_step, num_batches):
        """Runs `replica_step(i)` for each batch on all replicas; float32 (num_batches, 3)."""
        rows = tf.TensorArray(tf.float32, size=num_batches, element_shape=(len(SUMS),))
        for i in tf.range(num_batches):
            per_replica = replica_step(i)
            rows = rows.write(i, self._strategy.reduce("SUM", per_replica, axis=None))
        return rows.stack()

    @tf.function
    def train(self, images, order, first_batch, first_step, num_steps):
        """Trains `num_steps` steps within one epoch.

        Args:
          images: the training set, from `place_on_devices`.
          order: int32 (num_examples,), the epoch's order.
          first_batch: int32 scalar, number in the epoch of the first batch.
          first_step: int32 scalar, global number of the first step.
          num_steps: int32 scalar.

        Returns:
          float32 (num_steps, 3), a row of SUMS for each step.
        """
        return self._loop(
            lambda i: self._strategy.run(
                self._train_replica, args=(images, order, first_batch + i, first_step + i)
            ),
            num_steps,
        )

    @tf.function
    def evaluate(self, images, order, num_batches):
        """Runs the model over a split without training it.

        The noise of a batch depends on its number alone, so two evaluations of one
        model are equal.

        Args:
          images: the split, from `place_on_devices`.
          order: int32 (num_examples,), which records to visit.
          num_batches: int32 scalar.

        Returns:
          float32 (num_batches, 3), a row of SUMS for each batch.
        """
        return self._loop(
            lambda i: self._strategy.run(self._evaluate_replica, args=(images, order, i)),
            num_batches,
        )


def _sums(weights, reconstruction_loss, kl):
    """One row of SUMS, float32 (3,)."""
    return tf.stack(
        [
            tf.reduce_sum(weights * reconstruction_loss),
            tf.reduce_sum(weights * kl),
            tf.reduce_sum(weights),
        ]
    )
