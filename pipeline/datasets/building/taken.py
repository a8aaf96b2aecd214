"""What a data set remembers of each source that it took records from.

Files of a source in `index/`: the memory of the source's files (sources/memory.py), the hashes of
the ids that it held last, and of those that it held before. They are no part of the data set: times
of files stand in them, and the manifest does not list them. They are written after the manifest, so
that they never claim a record that the set does not hold. A memory's name tells the state of the
set: in another state, such as that of an older copy, the memory is not used.
"""

import dataclasses
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.datasets import index, reader
from pipeline.sources import conversion
from pipeline.sources import memory as memory_lib
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files

# Start of the keys of `made_from` for appended sources.
APPENDED = "appended-"
_HEADER_BYTES = 128  # Of an .npy file with such an array.
_PREFIX, _MEMORY, _IDS, _LOST, _GONE = "source-", ".memory", ".ids.npy", ".lost.npy", ".gone.txt"


def _state(made_from: Mapping[str, Any], num_appends: int) -> str:
    """A name for the state of a data set after its first appends."""
    appends = sorted(key for key in made_from if key.startswith(APPENDED))[:num_appends]
    first = {key: value for key, value in made_from.items() if not key.startswith(APPENDED)}
    identity = manifest_lib.content_id([first, [made_from[key] for key in appends]])
    return f"{num_appends:04d}-{identity}"


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
        self._stem = f"{_PREFIX}{key}"

    def _path(self, suffix: str) -> str:
        return files.join(self._directory, index.DIRECTORY, f"{self._stem}{suffix}")

    def memory(self, made_from: Mapping[str, Any]) -> str | None:
        """Path or URL of the memory; None if there is none of a state that the set was in.

        Args:
          made_from: of the data set's manifest.
        """
        for name in self._memories():
            number = name.removeprefix(f"{self._stem}.").partition("-")[0]
            if number.isdecimal() and name == self._memory_name(made_from, int(number)):
                return files.join(self._directory, index.DIRECTORY, name)
        return None

    def _memory_name(self, made_from: Mapping[str, Any], num_appends: int) -> str:
        return f"{self._stem}.{_state(made_from, num_appends)}{_MEMORY}"

    def _memories(self) -> list[str]:
        names = files.list_names(files.join(self._directory, index.DIRECTORY))
        return [name for name in names if name.startswith(self._stem) and name.endswith(_MEMORY)]

    def write(
        self,
        source: conversion.ConvertedSource,
        made_from: Mapping[str, Any],
        id_hashes: np.ndarray,
        changed: Sequence[int] = (),
    ) -> None:
        """Writes the memory of a source whose records the finished data set holds.

        Args:
          source: the source, as open while its records were read.
          made_from: of the data set's manifest.
          id_hashes: of the source's records, without those that were removed from the set, uint64
            (n, 2).
          changed: records that the data set holds with another image or label.
        """
        directory = files.join(self._directory, index.DIRECTORY)
        files.make_dirs(directory)
        held = np.concatenate([_hashes(self._path(_IDS)), _hashes(self._path(_LOST))])
        _save(self._path(_LOST), held[~index.are_among(held, _sorted(id_hashes))])
        _save(self._path(_IDS), id_hashes)
        # Last, so that the other files are there if the memory is.
        num_appends = sum(key.startswith(APPENDED) for key in made_from)
        name, data = self._memory_name(made_from, num_appends), source.memory_bytes(changed)
        if _read(files.join(directory, name)) != data:
            files.write_bytes(files.join(directory, name), data)
        for other in self._memories():
            if other != name:
                files.remove(files.join(directory, other))
        files.sync(directory)

    def report_lost(self, base: Mapping[str, Any], id_hashes: np.ndarray) -> None:
        """Names the records that the data set holds and that this source has lost.

        Records that another source still brings are not lost. The ids are written to a file that
        `pipeline.remove` takes; without such records, that file is removed.

        Args:
          base: the data set's manifest.
          id_hashes: of all records that the source holds, uint64 (n, 2).
        """
        path = self._path(_GONE)
        held = np.concatenate([_hashes(self._path(_IDS)), _hashes(self._path(_LOST))])
        for present in (id_hashes, *self._ids_of_others()):
            held = held[~index.are_among(held, _sorted(present))]
        ids = list(self._ids(base, held)) if len(held) else []
        # An id with the end of a line in it is no line of a file.
        listed = sorted(i for i in ids if not {"\n", "\r"} & {*i} and i.strip())
        if listed:
            files.write_bytes(path, "".join(f"{record_id}\n" for record_id in listed).encode())
        elif files.exists(path):
            files.remove(path)
        if not ids:
            return
        records = "1 record" if len(ids) == 1 else f"{len(ids):,} records"
        text = (
            f"the source has lost {records} that the data set holds, such as {min(ids)!r}; the "
            "data set keeps them"
        )
        if listed:
            text += (
                f"; python -m pipeline.remove --data_dir={self._directory} --ids={path} removes "
                f"{'them' if len(listed) == len(ids) else 'those whose ids are one line'}"
            )
        print(f"preprocess: warning: {text}", file=sys.stderr, flush=True)

    def _ids_of_others(self) -> Iterator[np.ndarray]:
        directory = files.join(self._directory, index.DIRECTORY)
        for name in files.list_names(directory):
            is_other = name.startswith(_PREFIX) and not name.startswith(self._stem)
            if is_other and name.endswith(_IDS):
                yield _hashes(files.join(directory, name))

    def _ids(self, base: Mapping[str, Any], hashes: np.ndarray) -> Iterator[str]:
        """The ids with some hashes, of records that the data set holds."""
        indexes = index.Indexes(self._directory, base["files"])
        places = indexes.find(hashes)
        for number in np.unique(places.shards[places.shards >= 0]).tolist():
            shard, positions = indexes.shards[number], places.positions[places.shards == number]
            offsets = indexes[shard].offsets[np.sort(positions)]
            yield from reader.read_ids(self._directory, shard, offsets)


def remembering(
    spec: conversion.SourceSpec, directory: str, made_from: Mapping[str, Any], *, reread: bool
) -> conversion.SourceSpec:
    """A spec that opens the source with the data set's memory of it."""
    memory = None if reread else Taken(directory, spec).memory(made_from)
    return dataclasses.replace(spec, memory=memory)


def is_of_source(name: str) -> bool:
    """Whether a file below a data set is one that the set remembers of a source."""
    return name.startswith(f"{index.DIRECTORY}/{_PREFIX}")


def forget_all(directory: str) -> None:
    """Removes all that an earlier data set in a directory remembered."""
    for path in _paths(directory):
        files.remove(path)


def forget_files(directory: str, barred: np.ndarray | None = None) -> None:
    """Removes the memories of all sources of a data set; their files are read again.

    Args:
      directory: the data set's.
      barred: hashes of ids to forget, too, uint64 (n, 2).
    """
    for path in _paths(directory):
        if path.endswith(_MEMORY):
            files.remove(path)
        elif barred is not None and path.endswith(_GONE):
            files.remove(path)
        elif barred is not None:
            hashes = _hashes(path)
            _save(path, hashes[~index.are_among(hashes, _sorted(barred))])


def _paths(directory: str) -> list[str]:
    subdirectory = files.join(directory, index.DIRECTORY)
    names = [name for name in files.list_names(subdirectory) if name.startswith(_PREFIX)]
    return [files.join(subdirectory, name) for name in names]


def _sorted(hashes: np.ndarray) -> np.ndarray:
    return hashes[np.argsort(hashes[:, 0])]


def _hashes(path: str) -> np.ndarray:
    """The hashes in a file, uint64 (n, 2); none if the file is missing or damaged."""
    data = _read(path)
    words = np.frombuffer(data[_HEADER_BYTES : len(data) // 16 * 16], np.uint64)
    hashes = words.reshape(-1, 2)  # Not by np.load, which trusts the header.
    return hashes if _npy(hashes) == data else np.empty((0, 2), np.uint64)


def _npy(hashes: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, hashes)
    return buffer.getvalue()


def _save(path: str, hashes: np.ndarray) -> None:
    data = _npy(hashes)
    if _read(path) != data:
        files.write_bytes(path, data)


def _read(path: str) -> bytes:
    try:
        return files.read_bytes(path)
    except OSError:
        return b""
