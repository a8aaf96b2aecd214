"""Reproducible samples of an export's rows, drawn without reading all rows."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pipeline.embeddings import files as row_files
from pipeline.embeddings import rows


class Sample(NamedTuple):
    """A sample of rows, and the shard of each row."""

    rows: rows.Rows
    tasks: list[str]

    def key(self, index: int) -> tuple[str, str]:
        """The shard and the id of a row's record."""
        return self.tasks[index], self.rows.ids[index]

    def take(self, indices: np.ndarray) -> "Sample":
        """The rows at these indices."""
        return Sample(self.rows.take(indices), [self.tasks[i] for i in indices])


def heads(directory: str, manifest: Mapping[str, Any], max_rows: int) -> Sample | None:
    """The first rows of every shard, in proportion to its size.

    This is a fair sample, because the order within a shard is a hash of the ids.

    Args:
      directory: the export's.
      manifest: its manifest.
      max_rows: the most rows; rounding may add one row for each shard.

    Returns:
      The sample; None if there are no rows.
    """
    total = sum(shard_manifest["written"] for shard_manifest in manifest["shards"].values())
    files = {entry["name"]: entry for entry in manifest["files"]}
    parts, tasks = [], []
    for task, shard_manifest in manifest["shards"].items():
        count = -(-shard_manifest["written"] * min(max_rows, total) // total) if total else 0
        if count:
            entries = [files[name] for name in shard_manifest["files"]]
            parts.append(row_files.read(directory, task, entries, num_rows=count))
            tasks += [task] * count
    return Sample(rows.concatenated(parts), tasks) if parts else None


def stratified(sample: Sample, max_rows: int, seed: int) -> Sample:
    """Draws at most max_rows rows, each class in its share, by a hash of seed and record.

    Args:
      sample: the rows to draw from.
      max_rows: the most rows to draw.
      seed: seed of the draw.

    Returns:
      The drawn rows, in the order of `sample`.
    """
    labels, count = sample.rows.labels, len(sample.rows.ids)
    if count <= max_rows:
        return sample
    key = hashlib.sha256(b"%d" % seed).digest()
    ranks = [hashlib.blake2b(sha.encode(), key=key).digest() for sha in sample.rows.shas]
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * max_rows / count
    quotas = np.floor(exact).astype(int)
    # The rows that rounding left over go to the largest remainders.
    for i in np.argsort(quotas - exact, kind="stable")[: max_rows - quotas.sum()]:
        quotas[i] += 1
    indices: list[int] = []
    for label, quota in zip(classes, quotas, strict=True):
        ranked = sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: ranks[i])
        indices += ranked[:quota]
    return sample.take(np.array(sorted(indices), np.int64))
