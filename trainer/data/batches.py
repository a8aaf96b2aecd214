"""Which records and which noise step t sees, and which of them each replica takes.

Where the records lie is in placement.py.

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
    order: tf.Tensor,
    num_examples: tf.Tensor,
    batch: tf.Tensor,
    places: tf.Tensor,
    *,
    batch_size: int,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """What stands at some places of a batch.

    Args:
      order: int32 (at least num_examples,), the order in which to visit the records.
      num_examples: int32 scalar, how many of them there are.
      batch: int32 scalar, number of the batch in that order.
      places: int32 (n,), places in the global batch.
      batch_size: size of the global batch.

    Returns:
      rows: int32 (n,), the records; a valid one stands in where there is none.
      weights: float32 (n,), 1 for an example, 0 where there is none.
      total: float32 scalar, the weight of the whole global batch.
    """
    first = batch * batch_size
    present = (places < batch_size) & (first + places < num_examples)
    rows = tf.gather(order, tf.minimum(first + places, num_examples - 1))
    total = tf.minimum(batch_size, num_examples - first)
    return rows, tf.cast(present, tf.float32), tf.cast(total, tf.float32)


def noise(
    key: int,
    number: tf.Tensor,
    places: tf.Tensor,
    *,
    batch_size: int,
    shape: tuple[int, ...],
) -> tf.Tensor:
    """Standard normal noise for some places of a global batch.

    Every replica draws the whole batch's noise and takes its part: so it is keyed by
    the place and never by the replica.

    Args:
      key: from `noise_key`.
      number: int32 scalar, which batch: the global step, or the batch of an evaluation.
      places: int32 (n,), places in the global batch.
      batch_size: size of the global batch.
      shape: of one place's noise.

    Returns:
      float32 (n, *shape).
    """
    whole = tf.random.stateless_normal([batch_size, *shape], seed=tf.stack([key, number]))
    return _at_places(whole, places)


def _at_places(whole: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
    """Rows of what was drawn for a whole batch."""
    if places.shape[0] == whole.shape[0]:
        return whole  # One replica takes all of it.
    return tf.gather(whole, tf.minimum(places, whole.shape[0] - 1))


def binarize(
    images: tf.Tensor, key: int, number: tf.Tensor, places: tf.Tensor, *, batch_size: int
) -> tf.Tensor:
    """Black or white pixels, white with the probability that the image gives: anew for each batch.

    Args:
      images: float32 (n, H, W, C) in [0, 1].
      key: from `noise_key`.
      number: int32 scalar, which batch, as for `noise`.
      places: int32 (n,), places in the global batch.
      batch_size: size of the global batch.

    Returns:
      float32 (n, H, W, C), each 0 or 1.
    """
    whole = tf.random.stateless_uniform(
        [batch_size, *images.shape[1:]], seed=tf.stack([key, number])
    )
    return tf.cast(_at_places(whole, places) < images, tf.float32)


def binarize_once(images: np.ndarray, *, seed: int, split: str) -> None:
    """The same once and for all, in place: a function of seed, split and place in the split.

    Args:
      images: uint8 (n, H, W, C), the whole split; becomes 0 or 255.
      seed: of the config.
      split: name of the split.
    """
    for number, image in enumerate(images):
        key = np.frombuffer(_key(seed, f"pixels of {split}", number), np.uint64)
        bits = np.random.Philox(key=key).random_raw(-(-image.size // 4)).view(np.uint16)
        # 0..254: below a pixel p with a probability of p / 255, to 2^-16.
        uniform = (bits[: image.size].astype(np.uint32) * 255) >> 16
        image[...] = np.where(uniform.reshape(image.shape) < image, 255, 0)
