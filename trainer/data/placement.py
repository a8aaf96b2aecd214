"""Where the records of a split lie: on every device, or with the host.

Both hand the same records in the same order to the step, which cannot tell them apart.
"""

import concurrent.futures
import math
import mmap
import os
import tempfile
from collections.abc import Callable
from typing import NamedTuple, Protocol

import ml_collections
import numpy as np
import tensorflow as tf

from pipeline.machine import gpus
from trainer.data import host_memory

PLACEMENTS = ("auto", "device", "memory_mapped")
# Share of the memory that the data may take where it is placed by size: the rest is for
# activations, which grow with the batch.
_SHARE_OF_MEMORY = 0.25
_WORD_BYTES = 8


class Records(NamedTuple):
    """What the step takes batches from."""

    images: tf.Tensor  # on each replica's device, as `to_words` packs; of InMemory, the array
    order: tf.Tensor  # int32, rows of images in the order in which to visit them
    num_examples: tf.Tensor  # int32 scalar, how many of them there are


class Visit(Protocol):
    """One pass over a split in a given order."""

    def batches(self, first: int, count: int) -> tuple[Records, tf.Tensor]:
        """Records that hold `count` batches of the pass from batch `first` on.

        Returns:
          The records, and the number of the first batch among them, int32 scalar.
        """


class Split(Protocol):
    """The records of a split."""

    num_examples: int

    def visit(self, order: np.ndarray) -> Visit:
        """Begins a pass; order is int32 (num_examples,), a permutation."""

    def head(self, count: int) -> np.ndarray:
        """The first records, uint8 (at most count, H, W, C)."""


def to_words(images: np.ndarray) -> np.ndarray:
    """Images as 64-bit words, since a GPU has a kernel to gather rows of words and none for bytes.

    Args:
      images: uint8 (n, H, W, C).

    Returns:
      int64 (n, ceil(H·W·C / 8)), the last bytes of each row 0 where H·W·C is no multiple of 8.
    """
    rows = np.ascontiguousarray(images).reshape(len(images), -1)
    padding = -rows.shape[1] % _WORD_BYTES
    return (np.pad(rows, [(0, 0), (0, padding)]) if padding else rows).view(np.int64)


def gather_images(words: tf.Tensor, rows: tf.Tensor, image_shape: tuple[int, ...]) -> tf.Tensor:
    """Some of the images that `to_words` packed.

    Args:
      words: int64 (n, w).
      rows: int32 (m,).
      image_shape: (H, W, C).

    Returns:
      uint8 (m, H, W, C).
    """
    pixels = tf.bitcast(tf.gather(words, rows), tf.uint8)  # (m, w, 8)
    num_pixels, num_bytes = math.prod(image_shape), words.shape[1] * _WORD_BYTES
    if num_pixels < num_bytes:
        pixels = tf.reshape(pixels, (-1, num_bytes))[:, :num_pixels]
    return tf.reshape(pixels, (-1, *image_shape))


def _copy_to_devices(strategy: tf.distribute.Strategy, images: np.ndarray):
    """Copies images, as words, to the device of every replica of this process."""
    devices, words = strategy.extended.worker_devices, to_words(images)

    def copy(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        with tf.device(devices[context.replica_id_in_sync_group % len(devices)]):
            return tf.constant(words)

    return strategy.experimental_distribute_values_from_function(copy)


class OnDevice:
    """A split that lies whole on every device, so that an epoch runs without the host."""

    def __init__(self, strategy: tf.distribute.Strategy, images: np.ndarray):
        """Copies uint8 (n, H, W, C) to the devices."""
        self._images, self._head = _copy_to_devices(strategy, images), images[:1024].copy()
        self.num_examples = len(images)

    def visit(self, order: np.ndarray) -> Visit:
        """See Split."""
        return _VisitOfWhole(
            Records(self._images, tf.constant(order), tf.constant(self.num_examples))
        )

    def head(self, count: int) -> np.ndarray:
        """See Split."""
        return self._head[:count]


class _VisitOfWhole:
    def __init__(self, records: Records):
        self._records = records

    def batches(self, first: int, count: int) -> tuple[Records, tf.Tensor]:
        del count  # Whatever it is, all of them are there.
        return self._records, tf.constant(first)


class WithHost:
    """A split in an array of the host, gathered a few batches ahead of the devices."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        images: np.ndarray,
        *,
        batch_size: int,
        max_batches: int,
    ):
        """Takes an array, in memory or memory-mapped.

        Args:
          strategy: whose devices to feed.
          images: uint8 (n, H, W, C).
          batch_size: of the global batch.
          max_batches: the most that are asked for at a time.
        """
        self._strategy, self._images = strategy, images
        self._batch_size, self._max_batches = batch_size, max_batches
        self.num_examples = len(images)
        self._ahead = concurrent.futures.ThreadPoolExecutor(1, "gather")

    def visit(self, order: np.ndarray) -> Visit:
        """See Split."""
        return _VisitWithHost(self, order)

    def head(self, count: int) -> np.ndarray:
        """See Split."""
        return np.array(self._images[:count])

    def gather(self, order: np.ndarray, first: int, count: int) -> tuple[np.ndarray, int]:
        """The images of some batches, and how many; always as many rows, for one graph."""
        rows = order[first * self._batch_size : (first + count) * self._batch_size]
        shape = (self._max_batches * self._batch_size, *self._images.shape[1:])
        gathered = np.zeros(shape, np.uint8)
        # Sorted, since pages of the file that lie in a row are read faster.
        sorted_places = np.argsort(rows, kind="stable")
        gathered[sorted_places] = self._images[rows[sorted_places]]
        return gathered, len(rows)

    def gather_ahead(self, *what) -> concurrent.futures.Future:
        """Begins `gather` in another thread."""
        return self._ahead.submit(self.gather, *what)

    def place(self, gathered: np.ndarray, count: int) -> Records:
        """Gathered images as records on the devices."""
        order = tf.range(len(gathered))
        return Records(_copy_to_devices(self._strategy, gathered), order, tf.constant(count))


class InMemory:
    """A split in an array of the host, for a pipeline that gathers each batch itself."""

    def __init__(self, images: np.ndarray):
        """Takes uint8 (n, H, W, C), in memory or memory-mapped."""
        self._images, self.num_examples = images, len(images)

    def visit(self, order: np.ndarray) -> Visit:
        """See Split; the images of the records are the array."""
        return _VisitOfWhole(
            Records(self._images, tf.constant(order), tf.constant(self.num_examples))
        )

    def head(self, count: int) -> np.ndarray:
        """See Split."""
        return np.array(self._images[:count])


class _VisitWithHost:
    def __init__(self, split: WithHost, order: np.ndarray):
        self._split, self._order = split, order
        self._next: tuple[tuple[int, int], concurrent.futures.Future] | None = None

    def batches(self, first: int, count: int) -> tuple[Records, tf.Tensor]:
        if self._next and self._next[0] == (first, count):
            gathered = self._next[1].result()
        else:
            gathered = self._split.gather(self._order, first, count)
        # As many again are what is most likely asked for next.
        ahead = first + count, count
        self._next = ahead, self._split.gather_ahead(self._order, *ahead)
        return self._split.place(*gathered), tf.constant(0)


def fits_devices(strategy: tf.distribute.Strategy, num_bytes: int) -> tuple[bool, str]:
    """Whether images are to lie on every device of a strategy, and why, in words.

    Args:
      strategy: whose devices they are.
      num_bytes: size of the images.
    """
    devices = strategy.extended.worker_devices
    if "GPU" not in devices[0]:
        # As often as there are replicas, and the array from which they are copied.
        free = host_memory.usable_bytes() // (len(devices) + 1)
        of = "of memory for each replica"
    else:
        free = gpus.free_bytes()
        of = "free on the smallest GPU"
    if free is None:
        return False, (
            "nvidia-smi did not say how much memory is free; --config.data_placement=device keeps "
            "them on the devices all the same"
        )
    text = f"{num_bytes >> 20:,} MiB of images, {free >> 20:,} MiB {of}"
    return num_bytes <= _SHARE_OF_MEMORY * free, f"{text}, {_SHARE_OF_MEMORY:.0%} of it allowed"


def allocator(placement: str, num_bytes: int) -> Callable[[tuple[int, ...], type], np.ndarray]:
    """What makes the arrays that a run reads its data into.

    Args:
      placement: one of PLACEMENTS.
      num_bytes: size of the data, all splits together.

    Returns:
      (shape, dtype) -> array: in memory, or, if the data is large or has to be, in a
      file of the system's temporary directory, which has no name and goes with the process.
    """
    large = num_bytes > _SHARE_OF_MEMORY * host_memory.usable_bytes()
    return _mapped if placement == "memory_mapped" or (placement == "auto" and large) else np.empty


def _mapped(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile() as file:
        # All of it now: a full disk is an error here, and would kill the process later.
        os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
        made = mmap.mmap(file.fileno(), max(1, num_bytes))
    made.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(made, dtype, math.prod(shape)).reshape(shape)


def place(
    strategy: tf.distribute.Strategy,
    images: np.ndarray,
    config: ml_collections.ConfigDict,
    *,
    num_bytes: int,
) -> Split:
    """Puts a split where it is to lie.

    Args:
      strategy: whose devices to feed.
      images: uint8 (n, H, W, C).
      config: data_placement, batch_size, steps_per_loop.
      num_bytes: size of the data, all splits together.
    """
    placement = config.data_placement
    if placement == "auto":
        fits, _ = fits_devices(strategy, num_bytes)
        placement = "device" if fits else "memory_mapped"
    if placement == "memory_mapped":
        in_split = -(-len(images) // config.batch_size)
        max_batches = min(config.steps_per_loop, in_split)
        return WithHost(strategy, images, batch_size=config.batch_size, max_batches=max_batches)
    return OnDevice(strategy, images)
