"""Which records and which noise step t sees, and which of them each replica takes.

All of it is a function of (seed, t) and of places in the global batch, so any
number of replicas sees the same, and a run that resumes at step t needs nothing
but t.
"""

import hashlib

import numpy as np
import tensorflow as tf


def _key(seed: int, purpose: str, number: int) -> bytes:
    """16 bytes that belong to (seed, purpose, number) alone: hashed together, never added."""
    return hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=16).digest()


def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order in which an epoch visits the records.

    An argsort of raw Philox output: NumPy keeps that bit stream the same in all its
    versions, which it does not promise of `Generator.permutation`.

    Returns:
      int32 (num_examples,), a permutation of 0..num_examples−1.
    """
    key = np.frombuffer(_key(seed, "order", epoch), np.uint64)
    keys = np.random.Philox(key=key).random_raw(num_examples)
    return np.argsort(keys, kind="stable").astype(np.int32)


def noise_key(seed: int, purpose: str) -> int:
    """A number for `noise`, 0 ≤ key < 2**31, that belongs to (seed, purpose)."""
    return int.from_bytes(_key(seed, purpose, 0)[:4], "little") >> 1


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches in an epoch; the last one may be short."""
    return -(-num_examples // batch_size)


def replica_places(replica: int | tf.Tensor, num_replicas: int, batch_size: int) -> tf.Tensor:
    """The places in the global batch that a replica takes.

    Each replica takes as many, in a row; places of `batch_size` and beyond hold no
    example, so the size need not be divisible by the number of replicas.

    Returns:
      int32 (ceil(batch_size / num_replicas),).
    """
    per_replica = -(-batch_size // num_replicas)
    return replica * per_replica + tf.range(per_replica)


def slice_of_batch(
    order: tf.Tensor, batch: tf.Tensor, places: tf.Tensor, batch_size: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """What stands at some places of a batch.

    Args:
      order: int32 (num_examples,), the order of the epoch.
      batch: int32 scalar, number of the batch in the epoch.
      places: int32 (n,), places in the global batch.
      batch_size: size of the global batch.

    Returns:
      rows: int32 (n,), the records; a valid one stands in where there is none.
      weights: float32 (n,), 1 for an example, 0 where there is none.
      total: float32 scalar, the weight of the whole global batch.
    """
    num_examples = tf.shape(order)[0]
    first = batch * batch_size
    present = (places < batch_size) & (first + places < num_examples)
    rows = tf.gather(order, tf.minimum(first + places, num_examples - 1))
    total = tf.minimum(batch_size, num_examples - first)
    return rows, tf.cast(present, tf.float32), tf.cast(total, tf.float32)


def noise(
    key: int, number: tf.Tensor, places: tf.Tensor, *, batch_size: int, latent_dim: int
) -> tf.Tensor:
    """Standard normal noise for some places of a global batch.

    Every replica draws the whole batch's noise, a few thousand numbers, and takes
    its part: so it is keyed by the place and never by the replica.

    Args:
      key: from `noise_key`.
      number: int32 scalar, which batch: the global step, or the batch of an evaluation.
      places: int32 (n,), places in the global batch.
      batch_size: size of the global batch.
      latent_dim: size of z.

    Returns:
      float32 (n, latent_dim).
    """
    whole = tf.random.stateless_normal([batch_size, latent_dim], seed=tf.stack([key, number]))
    return tf.gather(whole, tf.minimum(places, batch_size - 1))
