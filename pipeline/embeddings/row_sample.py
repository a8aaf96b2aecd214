"""Samples of an export's rows that are a function of the rows, drawn without reading them all."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pipeline.embeddings import files as row_files
from pipeline.embeddings import rows


class Sample(NamedTuple):
    """Some rows, and the shard that each is of."""

    rows: rows.Rows
    tasks: list[str]

    def key(self, place: int) -> tuple[str, str]:
        """The shard and the id of a row, which name its record."""
        return self.tasks[place], self.rows.ids[place]

    def take(self, places: np.ndarray) -> "Sample":
        """Those at some places."""
        return Sample(self.rows.take(places), [self.tasks[place] for place in places])


def heads(
    manifest: Mapping[str, Any], directory_of: Callable[[Mapping[str, Any]], str], max_rows: int
) -> Sample | None:
    """The first rows of every shard, in proportion.

    A fair sample, since the order within a shard is a hash of the ids.

    Args:
      manifest: the export's.
      directory_of: a file's entry -> the directory that it is in.
      max_rows: how many rows at most, but for one a shard.

    Returns:
      The sample; None if there are no rows.
    """
    total = sum(of_shard["written"] for of_shard in manifest["shards"].values())
    files = {entry["name"]: entry for entry in manifest["files"]}
    parts, tasks = [], []
    for task, of_shard in manifest["shards"].items():
        count = -(-of_shard["written"] * min(max_rows, total) // total) if total else 0
        if count:
            entries = [files[name] for name in of_shard["files"]]
            directory = directory_of(entries[0])
            parts.append(row_files.read(directory, task, entries, num_rows=count))
            tasks += [task] * count
    return Sample(rows.concatenated(parts), tasks) if parts else None


def stratified(sample: Sample, max_rows: int, seed: int) -> Sample:
    """At most so many rows, of each class its share, drawn by a hash of seed and record.

    Args:
      sample: what to draw from.
      max_rows: how many rows.
      seed: another one draws others.

    Returns:
      The rows drawn, in the order of `sample`.
    """
    labels, count = sample.rows.labels, len(sample.rows.ids)
    if count <= max_rows:
        return sample
    key = hashlib.sha256(b"%d" % seed).digest()
    drawn = [hashlib.blake2b(sha.encode(), key=key).digest() for sha in sample.rows.shas]
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * max_rows / count
    quotas = np.floor(exact).astype(int)
    # What is left goes to the largest remainders.
    for place in np.argsort(quotas - exact, kind="stable")[: max_rows - quotas.sum()]:
        quotas[place] += 1
    chosen: list[int] = []
    for label, quota in zip(classes, quotas, strict=True):
        of_class = sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: drawn[i])
        chosen += of_class[:quota]
    return sample.take(np.array(sorted(chosen), np.int64))
