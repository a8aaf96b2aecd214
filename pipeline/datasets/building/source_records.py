"""The records of one shard on their way from a source: in order, encoded, or named as faults."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.datasets import placement
from pipeline.formats import tf_example
from pipeline.sources import conversion


class Block(NamedTuple):
    """Some records of a shard, in order."""

    ids: list[bytes]
    images: list[bytes]  # H·W·C raw bytes each
    labels: np.ndarray  # (n,) int64
    encoded: list[bytes]  # the serialized tf.Examples


class SourceRecords:
    """The records at some indices of a source, in the order in which a shard has them."""

    def __init__(self, reading: conversion.SourceSpec, seed: int, name: str, indices: np.ndarray):
        """Takes the source, the seed of the order, the shard's name, and int64 indices."""
        self._reading, self._seed, self._name, self._indices = reading, seed, name, indices
        self.num_read = len(indices)
        # Filled on the way: one JSON object for each record that cannot be had, and seconds.
        self.faults: list[dict[str, Any]] = []
        self.secs = {"read": 0.0, "compute": 0.0}

    def blocks(self) -> Iterator[Block]:
        """All records that can be had; what cannot goes to `faults`.

        Raises:
          StageError: an id stands twice, or the source is not as it was.
        """
        self.faults = []
        started = time.perf_counter()
        source = conversion.open_converted(self._reading)
        ids = source.ids(self._indices)
        _, keys = placement.shards_and_order(self._seed, ids)
        order = placement.sorted_by(keys, ids)
        indices, ids = self._indices[order], [ids[place] for place in order.tolist()]
        for place, (previous, this) in enumerate(zip(ids, ids[1:], strict=False)):
            if previous == this:  # Equal ids hash alike, so they stand side by side.
                places = " and ".join(source.where(int(i)) for i in indices[place : place + 2])
                raise StageError(
                    f"{self._name}: the id {this.decode()!r} stands twice, at {places}; ids must "
                    "be unique"
                )
        self.secs["compute"] += time.perf_counter() - started
        step = self._reading.records_at_a_time
        for first in range(0, len(ids), step):
            chunk = slice(first, first + step)
            yield self._block(source, indices[chunk], ids[chunk])

    def _block(
        self, source: conversion.ConvertedSource, indices: np.ndarray, ids: Sequence[bytes]
    ) -> Block:
        started = time.perf_counter()
        found = source.read(indices)
        read = time.perf_counter()
        for place, reason in found.faults:
            where = source.where(int(indices[place]))
            self.faults.append({"id": ids[place].decode(), "where": where, "reason": reason})
        good = [ids[place] for place in found.places.tolist()]
        pixels, size = found.images.tobytes(), int(np.prod(found.images.shape[1:]))
        images = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        encoded = [
            tf_example.encode(record_id, image, label)
            for record_id, image, label in zip(good, images, found.labels.tolist(), strict=True)
        ]
        self.secs["read"] += read - started
        self.secs["compute"] += time.perf_counter() - read
        return Block(good, images, found.labels, encoded)
