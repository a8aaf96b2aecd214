"""duplicates.jsonl: a line for each group of equal images, in the order of their hashes.

The images of some new shards are compared with each other and with those of all old shards. Groups
of the old shards alone stand in the file that was written before.
"""

import collections
import heapq
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.datasets import reader
from pipeline.datasets.index import Indexes, places_in
from pipeline.stages.contracts import FileEntry

FILE = "duplicates.jsonl"
# Records whose hashes are compared at once. They take 24 bytes each, and a copy to sort them.
_RECORDS_AT_ONCE = 4_000_000
NO_IMAGES = np.empty((0, 2), np.uint64)


class _Group(NamedTuple):
    """Equal images."""

    image_hash: str  # 32 hex digits
    ids: dict[str, list[str]]  # split -> ids
    labels: list[int]  # The distinct labels, sorted.

    def line(self) -> bytes:
        ids = {split: sorted(self.ids[split]) for split in sorted(self.ids)}
        labels = {"labels": self.labels} if len(self.labels) > 1 else {}
        return (json.dumps({"image_hash": self.image_hash, "ids": ids, **labels}) + "\n").encode()


def lines(
    directory: str,
    indexes: Indexes,
    *,
    is_new: Callable[[FileEntry], bool],
    removed: np.ndarray = NO_IMAGES,
    earlier: Iterable[bytes] = (),
) -> Iterator[bytes]:
    """The lines of duplicates.jsonl.

    Args:
      directory: the data set's.
      indexes: of all shards.
      is_new: whether the groups of a shard are not in `earlier`.
      removed: hashes of images of records that are in `earlier` and not in the set any more,
        uint64 (n, 2).
      earlier: lines of the file for the other shards.
    """
    num_new = sum(shard["num_examples"] for shard in indexes.shards if is_new(shard))
    new = itertools.chain.from_iterable(
        _groups(directory, indexes, is_new, removed, bounds) for bounds in _ranges(num_new)
    )
    outdated = {_hex(image) for image in removed.tolist()}
    by_hash = heapq.merge(
        ((group.image_hash, 0, group.line()) for group in new),
        (
            (image_hash, 1, line)
            for line in earlier
            if (image_hash := json.loads(line)["image_hash"]) not in outdated
        ),
    )
    # A group of the earlier file that has grown is in both; the new one holds all of its ids.
    for _, group_lines in itertools.groupby(by_hash, lambda item: item[0]):
        yield next(group_lines)[2]


def _hex(image: Sequence[int]) -> str:
    return f"{image[0]:016x}{image[1]:016x}"


def _ranges(num_records: int) -> Iterator[tuple[int, int]]:
    """(first, last) leading words of hashes that divide the records into equal parts."""
    num_parts = max(1, -(-num_records // _RECORDS_AT_ONCE))
    ends = [number * 2**64 // num_parts for number in range(num_parts + 1)]
    for first, end in itertools.pairwise(ends):
        yield first, end - 1


def _groups(
    directory: str,
    indexes: Indexes,
    is_new: Callable[[FileEntry], bool],
    removed: np.ndarray,
    bounds: tuple[int, int],
) -> list[_Group]:
    """The groups with a new or a removed image whose hash lies in a range, in order."""
    first, last = map(np.uint64, bounds)

    def in_range(images: np.ndarray) -> np.ndarray:
        return np.flatnonzero((images[:, 0] >= first) & (images[:, 0] <= last))

    parts: list[tuple[int, np.ndarray, np.ndarray]] = []  # shard, positions, hashes
    for number, shard in enumerate(indexes.shards):
        if is_new(shard):
            positions = in_range(images := indexes[shard].images)
            parts.append((number, positions, images[positions]))
    # The removed images count twice, so that they have an equal one.
    again = removed[in_range(removed)]
    looked_for = np.concatenate([again, again, *(part[2] for part in parts)])
    looked_for = looked_for[np.argsort(looked_for[:, 0])]
    has_equal = np.zeros(len(looked_for), bool)
    has_equal[1:] = (looked_for[1:] == looked_for[:-1]).all(axis=1)
    for number, shard in enumerate(indexes.shards):
        if not is_new(shard):
            images = indexes[shard].images
            places = places_in(looked_for, images)
            positions = np.flatnonzero(places >= 0)
            parts.append((number, positions, images[positions]))
            has_equal[places[positions]] = True
    repeated = np.unique(looked_for[has_equal], axis=0)
    ids: dict[str, dict[str, list[str]]] = collections.defaultdict(dict)
    labels: dict[str, set[int]] = collections.defaultdict(set)
    for number, positions, hashes in parts:
        mask = places_in(repeated, hashes) >= 0
        shard = indexes.shards[number]
        rows = indexes[shard].rows[positions[mask]]
        record_ids = reader.read_ids(directory, shard, rows["offset"])
        for image, label, record_id in zip(
            hashes[mask].tolist(), rows["label"].tolist(), record_ids, strict=True
        ):
            ids[_hex(image)].setdefault(shard["split"], []).append(record_id)
            labels[_hex(image)].add(label)
    return [
        _Group(image, group, sorted(labels[image]))
        for image, group in sorted(ids.items())
        if sum(map(len, group.values())) > 1
    ]
