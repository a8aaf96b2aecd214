"""duplicates.jsonl: a line for each group of equal images, in the order of their hashes.

The images of some new shards are compared with each other and with those of all old shards. Groups
of the old shards alone stand in the file that was written before.
"""

import heapq
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from pipeline.datasets import reader
from pipeline.datasets.index import Index, Indexes, places_in
from pipeline.stages.contracts import FileEntry

FILE = "duplicates.jsonl"
# Records whose hashes are compared at once. They take 24 bytes each, and a copy to sort them.
_RECORDS_AT_ONCE = 4_000_000


class _Group(NamedTuple):
    """Equal images."""

    image_hash: str  # 32 hex digits
    ids: dict[str, list[str]]  # split -> ids, sorted

    def line(self) -> bytes:
        ids = {split: sorted(self.ids[split]) for split in sorted(self.ids)}
        return (json.dumps({"image_hash": self.image_hash, "ids": ids}) + "\n").encode()


def lines(
    directory: str,
    indexes: Indexes,
    *,
    is_new: Callable[[FileEntry], bool],
    earlier: Iterable[bytes],
) -> Iterator[bytes]:
    """The lines of duplicates.jsonl.

    Args:
      directory: the data set's.
      indexes: of all shards.
      is_new: whether the groups of a shard are not in `earlier`.
      earlier: lines of the file for the other shards.
    """
    num_new = sum(shard["num_examples"] for shard in indexes.shards if is_new(shard))
    new = itertools.chain.from_iterable(
        _groups(directory, indexes, is_new, bounds) for bounds in _ranges(num_new)
    )
    by_hash = heapq.merge(
        ((group.image_hash, 0, group.line()) for group in new),
        ((json.loads(line)["image_hash"], 1, line) for line in earlier),
    )
    # A group of the earlier file that has grown is in both; the new one holds all of its ids.
    for _, group_lines in itertools.groupby(by_hash, lambda item: item[0]):
        yield next(group_lines)[2]


def without(lines: Iterable[bytes], ids: Collection[str]) -> Iterator[bytes]:
    """The lines of a file without some ids; a group with one id left is none."""
    for line in lines:
        group = json.loads(line)
        kept = {
            split: [record_id for record_id in split_ids if record_id not in ids]
            for split, split_ids in group["ids"].items()
        }
        if kept == group["ids"]:
            yield line
        elif sum(map(len, kept.values())) > 1:
            yield _Group(group["image_hash"], {s: left for s, left in kept.items() if left}).line()


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
    bounds: tuple[int, int],
) -> list[_Group]:
    """The groups with an image of a new shard whose hash lies in a range, in order."""
    first, last = map(np.uint64, bounds)

    def in_range(index: Index) -> np.ndarray:
        return np.flatnonzero((index.images[:, 0] >= first) & (index.images[:, 0] <= last))

    parts: list[tuple[int, np.ndarray, np.ndarray]] = []  # shard, positions, hashes
    for number, shard in enumerate(indexes.shards):
        if is_new(shard):
            positions = in_range(index := indexes[shard])
            parts.append((number, positions, index.images[positions]))
    new = np.concatenate([np.empty((0, 2), np.uint64), *(part[2] for part in parts)])
    new = new[np.lexsort((new[:, 1], new[:, 0]))]
    has_equal = np.zeros(len(new), bool)
    has_equal[1:] = (new[1:] == new[:-1]).all(axis=1)
    for number, shard in enumerate(indexes.shards):
        if not is_new(shard):
            places = places_in(new, (index := indexes[shard]).images)
            positions = np.flatnonzero(places >= 0)
            parts.append((number, positions, index.images[positions]))
            has_equal[places[positions]] = True
    repeated = np.unique(new[has_equal], axis=0)
    groups: dict[tuple[int, ...], dict[str, list[str]]] = {}
    for number, positions, hashes in parts:
        mask = places_in(repeated, hashes) >= 0
        shard = indexes.shards[number]
        ids = reader.read_ids(directory, shard, indexes[shard].offsets[positions[mask]])
        for key, record_id in zip(map(tuple, hashes[mask].tolist()), ids, strict=True):
            groups.setdefault(key, {}).setdefault(shard["split"], []).append(record_id)
    return [_Group(f"{a:016x}{b:016x}", ids) for (a, b), ids in sorted(groups.items())]
