"""Reads the records of one shard from a source: sorted, encoded, with faults listed."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.datasets import placement
from pipeline.formats import tf_example
from pipeline.sources import conversion


class EncodedBatch(NamedTuple):
    """Consecutive records of a shard."""

    ids: list[bytes]
    images: list[bytes]  # H·W·C raw bytes each
    labels: np.ndarray  # (n,) int64
    id_hashes: np.ndarray  # (n, 2) uint64, see placement.shards_and_order
    encoded: list[bytes]  # the serialized tf.Examples


class SourceRecords:
    """The records of one shard, read from a source, in the order of the shard."""

    def __init__(
        self, source_spec: conversion.SourceSpec, seed: int, name: str, indices: np.ndarray
    ):
        """`name` is the shard's; `indices` are its records in the source, (n,) int64, unsorted."""
        self._source_spec, self._seed, self._name, self._indices = source_spec, seed, name, indices
        self.num_read = len(indices)
        # Filled by `batches`: a JSON object for each unreadable record, and seconds spent.
        self.faults: list[dict[str, Any]] = []
        self.secs = {"read": 0.0, "compute": 0.0}

    def batches(self) -> Iterator[EncodedBatch]:
        """Yields the readable records, and lists the others in `faults`.

        Raises:
          StageError: an id appears twice.
          SourceChanged: the source has changed.
        """
        self.faults = []
        started = time.perf_counter()
        source = conversion.open_converted(self._source_spec)
        ids = source.ids(self._indices)
        hashes = placement.id_hashes(self._seed, ids)
        order = placement.sorted_by(hashes[:, 1], ids)
        indices, hashes = self._indices[order], hashes[order]
        ids = [ids[i] for i in order.tolist()]
        for position, (record_id, next_id) in enumerate(zip(ids, ids[1:], strict=False)):
            if record_id == next_id:  # Equal ids have equal hashes, so they are neighbours.
                pair = indices[position : position + 2]
                origins = " and ".join(source.where(int(i)) for i in pair)
                raise StageError(
                    f"{self._name}: the id {record_id.decode()!r} appears twice, at {origins}; "
                    "expected unique ids: make them unique in the source"
                )
        self.secs["compute"] += time.perf_counter() - started
        step = self._source_spec.records_at_a_time
        for first in range(0, len(ids), step):
            chunk = slice(first, first + step)
            yield self._encoded_batch(source, indices[chunk], ids[chunk], hashes[chunk])

    def _encoded_batch(
        self,
        source: conversion.ConvertedSource,
        indices: np.ndarray,
        ids: Sequence[bytes],
        hashes: np.ndarray,
    ) -> EncodedBatch:
        started = time.perf_counter()
        records = source.read(indices)
        read_end = time.perf_counter()
        for place, reason in records.faults:
            where = source.where(int(indices[place]))
            self.faults.append({"id": ids[place].decode(), "where": where, "reason": reason})
        good_ids = [ids[place] for place in records.places.tolist()]
        pixels, size = records.images.tobytes(), int(np.prod(records.images.shape[1:]))
        images = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        encoded = [
            tf_example.encode(record_id, image, label)
            for record_id, image, label in zip(
                good_ids, images, records.labels.tolist(), strict=True
            )
        ]
        self.secs["read"] += read_end - started
        self.secs["compute"] += time.perf_counter() - read_end
        return EncodedBatch(good_ids, images, records.labels, hashes[records.places], encoded)
