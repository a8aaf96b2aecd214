"""Where the images of a split are stored: on every device, or on the host.

Both placements give the step the same records in the same order.
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
# Share of the memory that the data may take with data_placement auto: the rest is for activations,
# which grow with the batch.
_SHARE_OF_MEMORY = 0.25
_WORD_BYTES = 8


class OrderedImages(NamedTuple):
    """The images that a step takes batches from, and their order."""

    images: tf.Tensor  # on each replica's device, packed by `to_words`; the array of a HostArray
    order: tf.Tensor  # int32, rows of images in the order in which to visit them
    num_examples: tf.Tensor  # int32 scalar, number of rows to visit


class Visit(Protocol):
    """One pass over a split in a given order."""

    def batches(self, first: int, count: int) -> tuple[OrderedImages, tf.Tensor]:
        """Images that hold `count` batches of the pass, from batch `first` on.

        Returns:
          The images, and the number of batch `first` in their order, int32 scalar.
        """


class Split(Protocol):
    """The images of a split."""

    num_examples: int

    def visit(self, order: np.ndarray) -> Visit:
        """Begins a pass; order is int32 (num_examples,), a permutation."""

    def head(self, count: int) -> np.ndarray:
        """The first images, uint8 (at most count, H, W, C)."""


def to_words(images: np.ndarray) -> np.ndarray:
    """Packs images as 64-bit words: GPUs have a kernel to gather rows of words and none for bytes.

    Args:
      images: uint8 (n, H, W, C).

    Returns:
      int64 (n, ceil(H·W·C / 8)), the last bytes of each row 0 where H·W·C is no multiple of 8.
    """
    rows = np.ascontiguousarray(images).reshape(len(images), -1)
    padding = -rows.shape[1] % _WORD_BYTES
    return (np.pad(rows, [(0, 0), (0, padding)]) if padding else rows).view(np.int64)


def gather_images(words: tf.Tensor, rows: tf.Tensor, image_shape: tuple[int, ...]) -> tf.Tensor:
    """Unpacks some of the images that `to_words` packed.

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
    """A split that is stored on every device, so that an epoch runs without the host."""

    def __init__(self, strategy: tf.distribute.Strategy, images: np.ndarray):
        """Copies uint8 (n, H, W, C) to the devices."""
        self._images, self._head = _copy_to_devices(strategy, images), images[:1024].copy()
        self.num_examples = len(images)

    def visit(self, order: np.ndarray) -> Visit:
        """See Split."""
        return _WholeSplitVisit(
            OrderedImages(self._images, tf.constant(order), tf.constant(self.num_examples))
        )

    def head(self, count: int) -> np.ndarray:
        """See Split."""
        return self._head[:count]


class _WholeSplitVisit:
    def __init__(self, records: OrderedImages):
        self._records = records

    def batches(self, first: int, count: int) -> tuple[OrderedImages, tf.Tensor]:
        del count  # The records are the whole split.
        return self._records, tf.constant(first)


class OnHost:
    """A split in an array of the host, which gathers a few batches ahead of the devices."""

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        images: np.ndarray,
        *,
        batch_size: int,
        max_batches: int,
    ):
        """Starts the thread that gathers.

        Args:
          strategy: the strategy whose devices to feed.
          images: uint8 (n, H, W, C), in memory or memory-mapped.
          batch_size: size of the global batch.
          max_batches: the most batches in one call of `Visit.batches`.
        """
        self._strategy, self._images = strategy, images
        self._batch_size, self._max_batches = batch_size, max_batches
        self.num_examples = len(images)
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "gather")

    def visit(self, order: np.ndarray) -> Visit:
        """See Split."""
        return _OnHostVisit(self, order)

    def head(self, count: int) -> np.ndarray:
        """See Split."""
        return np.array(self._images[:count])

    def gather(self, order: np.ndarray, first: int, count: int) -> tuple[np.ndarray, int]:
        """The images of some batches, padded to `max_batches`, and their number.

        All calls return the same shape, so one graph takes them all.
        """
        rows = order[first * self._batch_size : (first + count) * self._batch_size]
        shape = (self._max_batches * self._batch_size, *self._images.shape[1:])
        gathered = np.zeros(shape, np.uint8)
        # Sorted, since consecutive pages of the file are read faster.
        sorted_places = np.argsort(rows, kind="stable")
        gathered[sorted_places] = self._images[rows[sorted_places]]
        return gathered, len(rows)

    def gather_ahead(self, *arguments) -> concurrent.futures.Future:
        """Begins `gather` in another thread."""
        return self._executor.submit(self.gather, *arguments)

    def to_devices(self, gathered: np.ndarray, count: int) -> OrderedImages:
        """Copies gathered images to the devices; `count` of them are no padding."""
        order = tf.range(len(gathered))
        return OrderedImages(_copy_to_devices(self._strategy, gathered), order, tf.constant(count))


class HostArray:
    """A split in an array of the host, for an input pipeline that gathers each batch itself."""

    def __init__(self, images: np.ndarray):
        """Takes uint8 (n, H, W, C), in memory or memory-mapped."""
        self._images, self.num_examples = images, len(images)

    def visit(self, order: np.ndarray) -> Visit:
        """See Split; the images of the visit are the array."""
        return _WholeSplitVisit(
            OrderedImages(self._images, tf.constant(order), tf.constant(self.num_examples))
        )

    def head(self, count: int) -> np.ndarray:
        """See Split."""
        return np.array(self._images[:count])


class _OnHostVisit:
    def __init__(self, split: OnHost, order: np.ndarray):
        self._split, self._order = split, order
        self._next: tuple[tuple[int, int], concurrent.futures.Future] | None = None

    def batches(self, first: int, count: int) -> tuple[OrderedImages, tf.Tensor]:
        if self._next and self._next[0] == (first, count):
            gathered = self._next[1].result()
        else:
            gathered = self._split.gather(self._order, first, count)
        # The next call most likely asks for the same number of batches.
        next_batches = first + count, count
        self._next = next_batches, self._split.gather_ahead(self._order, *next_batches)
        return self._split.to_devices(*gathered), tf.constant(0)


def fits_devices(strategy: tf.distribute.Strategy, num_bytes: int) -> tuple[bool, str]:
    """Whether every device of a strategy has room for the images, and the reason in words.

    Args:
      strategy: the strategy of the devices.
      num_bytes: size of the images.
    """
    devices = strategy.extended.worker_devices
    if "GPU" not in devices[0]:
        # One copy for each replica, beside the array that they are copied from.
        free = host_memory.usable_bytes() // (len(devices) + 1)
        memory = "of memory for each replica"
    else:
        free = gpus.free_bytes()
        memory = "free on the smallest GPU"
    if free is None:
        return False, (
            "nvidia-smi did not report the free memory; to keep the images on the devices anyway, "
            "set --config.data_placement=device"
        )
    text = f"{num_bytes >> 20:,} MiB of images, {free >> 20:,} MiB {memory}"
    fits = num_bytes <= _SHARE_OF_MEMORY * free
    return fits, f"{text}, of which images may take {_SHARE_OF_MEMORY:.0%}"


def allocator(placement: str, num_bytes: int) -> Callable[[tuple[int, ...], type], np.ndarray]:
    """The function that allocates the arrays into which a run reads its data.

    Args:
      placement: one of PLACEMENTS.
      num_bytes: size of the data, all splits together.

    Returns:
      (shape, dtype) -> array: in memory, or, with memory_mapped or for large data, in a nameless
      file of the system's temporary directory, which ends with the process.
    """
    is_large = num_bytes > _SHARE_OF_MEMORY * host_memory.usable_bytes()
    if placement == "memory_mapped" or (placement == "auto" and is_large):
        return _allocate_mapped
    return np.empty


def _allocate_mapped(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile() as file:
        # All bytes now: a full disk is an error here, and would kill the process later.
        os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
        mapping = mmap.mmap(file.fileno(), max(1, num_bytes))
    mapping.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapping, dtype, math.prod(shape)).reshape(shape)


def place(
    strategy: tf.distribute.Strategy,
    images: np.ndarray,
    config: ml_collections.ConfigDict,
    *,
    num_bytes: int,
) -> Split:
    """Puts the images of a split on the devices or on the host, by config.data_placement.

    Args:
      strategy: the strategy whose devices to feed.
      images: uint8 (n, H, W, C).
      config: data_placement, batch_size, steps_per_loop.
      num_bytes: size of the data, all splits together.
    """
    placement = config.data_placement
    if placement == "auto":
        fits, _ = fits_devices(strategy, num_bytes)
        placement = "device" if fits else "memory_mapped"
    if placement == "memory_mapped":
        num_batches = -(-len(images) // config.batch_size)
        max_batches = min(config.steps_per_loop, num_batches)
        return OnHost(strategy, images, batch_size=config.batch_size, max_batches=max_batches)
    return OnDevice(strategy, images)
