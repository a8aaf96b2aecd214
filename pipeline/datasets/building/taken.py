"""What a data set remembers of each source that it took records from.

Two files a source in `index/`: the memory of the source's files (sources/memory.py), and the hashes
of the ids that it has brought. They are no part of the data set: times of files stand in them, and
the manifest does not list them. They are written after the manifest, so that they never claim a
record that the set does not hold.
"""

import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.datasets import index, reader
from pipeline.sources import conversion
from pipeline.sources import memory as memory_lib
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files

_PREFIX, _MEMORY = "source-", ".memory"


class Taken:
    """The files of one source in a data set."""

    def __init__(self, directory: str, spec: conversion.SourceSpec):
        """`directory` is the data set's; touches no file."""
        conversions = {
            "image_size": spec.image_size,
            "grayscale": spec.grayscale,
            "rgb": spec.rgb,
            "transpose": spec.transpose,
            "id_prefix": spec.id_prefix,
            "class_names": spec.class_names,
        }
        key = manifest_lib.content_id([memory_lib.key_of(spec.source, spec), conversions])
        self._directory = directory
        self._stem = files.join(directory, index.DIRECTORY, f"{_PREFIX}{key}")

    @property
    def memory(self) -> str:
        """Path or URL of the memory."""
        return f"{self._stem}{_MEMORY}"

    def write(
        self,
        source: conversion.ConvertedSource,
        id_hashes: np.ndarray | None,
        changed: Sequence[int] = (),
    ) -> None:
        """Writes the memory of a source whose records the finished data set holds.

        Args:
          source: the source, as open while its records were read.
          id_hashes: of all its records, uint64 (n, 2); None to leave the ids as they are.
          changed: records that the data set holds with another image or label.
        """
        files.make_dirs(files.join(self._directory, index.DIRECTORY))
        data = source.memory_bytes(changed)
        if _read(self.memory) != data:
            files.write_bytes(self.memory, data)
        if id_hashes is not None:
            buffer = io.BytesIO()
            earlier = self._ids()
            is_gone = ~index.are_among(earlier, _sorted(id_hashes))
            np.save(buffer, np.concatenate([id_hashes, earlier[is_gone]]))
            files.write_bytes(f"{self._stem}.ids.npy", buffer.getvalue())

    def _ids(self) -> np.ndarray:
        try:
            ids = np.load(io.BytesIO(_read(f"{self._stem}.ids.npy")), allow_pickle=False)
        except (ValueError, EOFError):
            ids = np.empty((0, 2), np.uint64)
        is_right = ids.dtype == np.uint64 and ids.ndim == 2 and ids.shape[1] == 2
        return ids if is_right else np.empty((0, 2), np.uint64)

    def report_gone(self, base: Mapping[str, Any], id_hashes: np.ndarray) -> None:
        """Names the records that this source has brought, and does not hold any more.

        Their ids are written to a file that `pipeline.remove` takes; without such records, that
        file is removed.

        Args:
          base: the data set's manifest.
          id_hashes: of all records that the source holds, uint64 (n, 2).
        """
        earlier, path = self._ids(), f"{self._stem}.gone.txt"
        gone = earlier[~index.are_among(earlier, _sorted(id_hashes))]
        indexes = index.Indexes(self._directory, base["files"])
        places = indexes.find(gone) if len(gone) else index.Places(gone[:, 0], gone[:, 1])
        ids: list[str] = []
        for number in np.unique(places.shards[places.shards >= 0]).tolist():
            shard, positions = indexes.shards[number], places.positions[places.shards == number]
            offsets = indexes[shard].offsets[np.sort(positions)]
            ids += reader.read_ids(self._directory, shard, offsets)
        if not ids:
            if _read(path):
                files.remove(path)
            return
        files.write_bytes(path, "".join(f"{record_id}\n" for record_id in sorted(ids)).encode())
        print(
            f"preprocess: warning: {len(ids):,} records that this source has brought are gone "
            f"from it, such as {min(ids)!r}; they stay in the data set; python -m pipeline.remove "
            f"--data_dir={self._directory} --ids={path} removes them",
            file=sys.stderr,
            flush=True,
        )


def remembering(
    spec: conversion.SourceSpec, directory: str, *, reread: bool
) -> conversion.SourceSpec:
    """A spec that opens the source with the data set's memory of it."""
    memory = None if reread else Taken(directory, spec).memory
    return dataclasses.replace(spec, memory=memory)


def forget(directory: str, *, ids: bool) -> None:
    """Removes the memories of all sources of a data set; their files are read again.

    Args:
      directory: the data set's.
      ids: whether to remove the hashes and the lists of ids, too.
    """
    subdirectory = files.join(directory, index.DIRECTORY)
    for name in files.list_names(subdirectory):
        if name.startswith(_PREFIX) and (ids or name.endswith(_MEMORY)):
            files.remove(files.join(subdirectory, name))


def _sorted(id_hashes: np.ndarray) -> np.ndarray:
    return id_hashes[np.argsort(id_hashes[:, 0])]


def _read(path: str) -> bytes:
    try:
        return files.read_bytes(path)
    except FileNotFoundError:
        return b""
