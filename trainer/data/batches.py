"""The records and the noise of step t, and each replica's part of them.

Where the records are stored is in placement.py.

Records and noise are functions of (seed, t) and of places in the global batch. So any number of
replicas sees the same records and noise, and a run that resumes at step t needs only t.
"""

import hashlib

import numpy as np
import tensorflow as tf


def _key(seed: int, purpose: str, number: int) -> bytes:
    """16 bytes for (seed, purpose, number): hashed together, never added."""
    return hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=16).digest()


def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order in which an epoch visits the records.

    An argsort of raw Philox output: NumPy keeps this bit stream the same in all versions, and
    promises no such thing for `Generator.permutation`.

    Returns:
      int32 (num_examples,), a permutation of 0..num_examples−1.
    """
    key = np.frombuffer(_key(seed, "order", epoch), np.uint64)
    keys = np.random.Philox(key=key).random_raw(num_examples)
    return np.argsort(keys, kind="stable").astype(np.int32)


def noise_key(seed: int, purpose: str) -> int:
    """The key of `noise` and `binarize` for (seed, purpose), 0 ≤ key < 2**31."""
    return int.from_bytes(_key(seed, purpose, 0)[:4], "little") >> 1


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Batches in an epoch; the last one may be short."""
    return -(-num_examples // batch_size)


def replica_places(replica: int | tf.Tensor, num_replicas: int, batch_size: int) -> tf.Tensor:
    """The places in the global batch that a replica takes.

    Each replica takes the same number of consecutive places. Places from `batch_size` on hold no
    example, so `batch_size` need not be divisible by the number of replicas.

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
    """The records at some places of a batch.

    Args:
      order: int32 (at least num_examples,), the order in which to visit the records.
      num_examples: int32 scalar, number of records.
      batch: int32 scalar, number of the batch in that order.
      places: int32 (n,), places in the global batch.
      batch_size: size of the global batch.

    Returns:
      rows: int32 (n,), the records' rows; a valid row at places without an example.
      weights: float32 (n,), 1 for an example, 0 at places without an example.
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

    Every replica draws the whole batch's noise and takes its part, so the noise depends on the
    place and never on the replica.

    Args:
      key: from `noise_key`.
      number: int32 scalar: the global step, or the batch's number in an evaluation.
      places: int32 (n,), places in the global batch.
      batch_size: size of the global batch.
      shape: shape of the noise of one place.

    Returns:
      float32 (n, *shape).
    """
    batch_noise = tf.random.stateless_normal([batch_size, *shape], seed=tf.stack([key, number]))
    return _rows_at(places, batch_noise)


def _rows_at(places: tf.Tensor, batch_rows: tf.Tensor) -> tf.Tensor:
    """The rows of some places, out of the rows of a whole batch."""
    if places.shape[0] == batch_rows.shape[0]:
        return batch_rows  # A single replica takes all rows.
    return tf.gather(batch_rows, tf.minimum(places, batch_rows.shape[0] - 1))


def binarize(
    images: tf.Tensor, key: int, number: tf.Tensor, places: tf.Tensor, *, batch_size: int
) -> tf.Tensor:
    """Draws black or white pixels anew for each batch, white with the pixel's value as probability.

    Args:
      images: float32 (n, H, W, C) in [0, 1].
      key: from `noise_key`.
      number: int32 scalar, as for `noise`.
      places: int32 (n,), places in the global batch.
      batch_size: size of the global batch.

    Returns:
      float32 (n, H, W, C), each 0 or 1.
    """
    thresholds = tf.random.stateless_uniform(
        [batch_size, *images.shape[1:]], seed=tf.stack([key, number])
    )
    return tf.cast(_rows_at(places, thresholds) < images, tf.float32)


def binarize_once(images: np.ndarray, *, seed: int, split: str) -> None:
    """Draws black or white pixels once, in place: a function of seed, split and place in the split.

    Args:
      images: uint8 (n, H, W, C), the whole split; pixels become 0 or 255.
      seed: config.seed.
      split: name of the split.
    """
    for number, image in enumerate(images):
        key = np.frombuffer(_key(seed, f"pixels of {split}", number), np.uint64)
        bits = np.random.Philox(key=key).random_raw(-(-image.size // 4)).view(np.uint16)
        # 0..254, less than a pixel p with probability p / 255, up to 2^-16.
        uniform = (bits[: image.size].astype(np.uint32) * 255) >> 16
        image[...] = np.where(uniform.reshape(image.shape) < image, 255, 0)
