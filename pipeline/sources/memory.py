"""What an earlier job found in the files of a source, so that unchanged files are not read again.

A memory is one file: a magic line, the sha256 of the rest, and an Arrow table with a row for each
file of the source. A row holds the path, the stamp (storage/stamps.py), how records of the file
are read, and what the reader keeps of the file. A file has no row if it could not be read, or if
its contents may change while its stamp stays. A file whose stamp is remembered is unchanged.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.sources.options import SourceOptions
from pipeline.sources.source import Source
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files

if TYPE_CHECKING:
    import pyarrow as pa

# The number is raised when a reader reads a file in another way, or keeps other facts of a file.
_MAGIC = b"vae-pipeline memory of a source 2\n"
_SHA_BYTES = hashlib.sha256().digest_size
# Packages that decide what a file holds.
_READERS = ("pillow", "pyarrow", "numpy", "tensorflow-datasets")
# Nanoseconds in which a file can change twice and keep its time: the coarsest file system, FAT,
# counts in two seconds.
_GRAIN_NS = 2_000_000_000
# What is in the version of an object that is a time, and not an etag or a generation.
_TIME = re.compile("[:.]")
_ABOUT = b"about"


class Memory(NamedTuple):
    """What an earlier job found."""

    table: "pa.Table"  # path (binary), stamp, way (both strings), and columns of the reader
    about: dict[str, Any]  # Of the whole source; JSON.

    def rows_of(self, listed: Mapping[str, str]) -> np.ndarray:
        """The row of each file.

        Args:
          listed: n files, path -> current stamp.

        Returns:
          int64 (n,); -1 for a file that is not remembered with this stamp.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        paths = pa.array(map(os.fsencode, listed), pa.binary())
        rows = pc.index_in(paths, self.table["path"]).cast(pa.int64())
        is_same = pc.equal(self.table["stamp"].take(rows), pa.array(listed.values(), pa.string()))
        rows = pc.if_else(pc.fill_null(is_same, False), pa.chunked_array([rows]), -1)
        return rows.combine_chunks().to_numpy(zero_copy_only=False)

    def take(self, rows: np.ndarray, names: Iterable[str]) -> dict[str, list[Any]]:
        """Column -> its values at `rows`."""
        return {name: self.table[name].take(rows).to_pylist() for name in names}


class Facts(NamedTuple):
    """What a source keeps of its n listed files, in their order."""

    columns: Mapping[str, "pa.Array"]  # Name -> (n,)
    is_read: np.ndarray  # (n,) bool; False for a file that could not be read
    about: Mapping[str, Any] = {}  # Of the whole source; JSON.
    other_stamps: Sequence[str] = ()  # Of unlisted files that were read, too.


def key_of(spec: str, options: SourceOptions) -> str:
    """A digest of all but the files that decides what a source reads.

    Args:
      spec: as in --source.
      options: see SourceOptions.
    """
    kind, _, rest = spec.partition(":")
    if rest and kind != "tfds" and not files.is_url(rest):
        rest = os.path.abspath(rest)
    versions = {name: _version(name) for name in _READERS}
    return manifest_lib.content_id([kind, rest, options.changed(), versions])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def read(path: str | None, key: str) -> Memory | None:
    """The memory at a path or URL; None if the file is absent, damaged, or of another key."""
    try:
        memory = parse(files.read_bytes(path) if path else b"")
    except OSError:
        return None
    return memory if memory and memory.about["key"] == key else None


def parse(data: bytes) -> Memory | None:
    """The memory in the bytes of a file; None if they are damaged."""
    seal, body = data[: len(_MAGIC) + _SHA_BYTES], data[len(_MAGIC) + _SHA_BYTES :]
    if seal != _MAGIC + hashlib.sha256(body).digest():
        return None
    import pyarrow as pa

    table = pa.ipc.open_file(pa.BufferReader(body)).read_all()
    about = json.loads(table.schema.metadata[_ABOUT])
    return Memory(table, about)


def to_bytes(table: "pa.Table", about: Mapping[str, Any]) -> bytes:
    """The file of a memory."""
    import pyarrow as pa

    table = table.replace_schema_metadata({_ABOUT: manifest_lib.canonical_json(about)})
    sink, options = pa.BufferOutputStream(), pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    body = sink.getvalue().to_pybytes()
    return b"".join([_MAGIC, hashlib.sha256(body).digest(), body])


def is_settled(stamp: str, opened_at: int) -> bool:
    """Whether contents that change from now on change the stamp, too.

    A file that was written just before it was read, or has a time in the future, may be written
    again within a tick of its clock. An object tells a change by an etag or a generation, and not
    by a time.

    Args:
      stamp: see stamps.py.
      opened_at: nanoseconds since 1970, before the file was read.
    """
    size, _, version = stamp.partition(" md5:")[0].partition(" ")
    if not size.isdecimal() or not version:
        return False
    if version.lstrip("-").isdecimal():  # Nanoseconds of a file. Generations are microseconds.
        return int(version) < opened_at - _GRAIN_NS
    return not _TIME.search(version)


class Recollection:
    """An open source beside what an earlier job found in its files.

    A source that knows which file holds a record has three methods: `file_numbers(indices)`, the
    place in `listed` of the file of each record (n,); `ways()`, for each listed file, how its
    records are read beyond the options; and `facts()`. The records of other sources are trusted
    if all files are unchanged.
    """

    def __init__(
        self,
        source: Source,
        listed: Mapping[str, str],
        *,
        memory: Memory | None,
        key: str,
        opened_at: int,
    ):
        """Reads nothing.

        Args:
          source: the open source.
          listed: file -> stamp at the opening of the source.
          memory: see `read`.
          key: see `key_of`.
          opened_at: nanoseconds since 1970, before the source was opened.
        """
        self._source, self._listed, self._memory = source, listed, memory
        self._key, self._opened_at = key, opened_at
        self.conversion: Mapping[str, Any] = memory.about["conversion"] if memory else {}

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        if self._memory is None:
            return np.full(len(self._listed), -1, np.int64)
        return self._memory.rows_of(self._listed)

    @functools.cached_property
    def is_unchanged(self) -> bool:
        """Whether all listed files are remembered, and no other file was listed."""
        if self._memory is None or not self._listed:
            return False
        about = self._memory.about
        if about["num_files"] != len(self._listed) or (self._rows < 0).any():
            return False
        return about["set"] == manifest_lib.through_json(self._set())

    def _set(self) -> dict[str, Any]:
        """What must stay as it is while the files do."""
        source = self._source
        return {
            "split_sizes": [[split, int(size)] for split, size in source.split_sizes.items()],
            "class_names": list(source.class_names),
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """The source's fingerprint."""
        if self.is_unchanged:
            return self._memory.about["fingerprint"]
        return self._source.fingerprint()

    @functools.cached_property
    def _trusted_files(self) -> np.ndarray:
        """(files,) bool: the file is unchanged, and its records are read as they were."""
        is_remembered = self._rows >= 0
        if self._memory is None or not is_remembered.any():
            return is_remembered
        ways = np.array(self._source.ways(), object)[is_remembered]
        [remembered] = self._memory.take(self._rows[is_remembered], ["way"]).values()
        is_remembered[is_remembered] = ways == np.array(remembered, object)
        return is_remembered

    def trusted(self, indices: np.ndarray) -> np.ndarray:
        """Whether the image and the class of each record are those of the earlier job.

        Args:
          indices: int64 (n,).

        Returns:
          bool (n,).
        """
        if not hasattr(self._source, "file_numbers"):
            return np.full(len(indices), self.is_unchanged)
        if self._memory is None:
            return np.zeros(len(indices), bool)
        return self._trusted_files[self._source.file_numbers(indices)]

    def to_bytes(self, conversion: Mapping[str, Any], without: Sequence[int] = ()) -> bytes:
        """The memory of this opening.

        Args:
          conversion: JSON, see `conversion`.
          without: records whose files are left out.
        """
        import pyarrow as pa

        source, num_files = self._source, len(self._listed)
        facts, ways = Facts({}, np.ones(num_files, bool)), [""] * num_files
        if hasattr(source, "facts"):
            facts, ways = source.facts(), source.ways()
        stamps = self._listed.values()
        columns = {
            "path": pa.array(map(os.fsencode, self._listed), pa.binary()),
            "stamp": pa.array(stamps, pa.string()),
            "way": pa.array(ways, pa.string()).dictionary_encode(),
            **facts.columns,
        }
        are_settled = [is_settled(stamp, self._opened_at) for stamp in stamps]
        others_are = (is_settled(stamp, self._opened_at) for stamp in facts.other_stamps)
        about = {
            "key": self._key,
            "fingerprint": self.fingerprint,
            "num_files": num_files,
            "is_settled": all(are_settled) and all(others_are),
            "set": self._set(),
            "conversion": conversion,
            "reader": facts.about,
        }
        mask = facts.is_read & np.array(are_settled, bool)
        if len(without):
            has_numbers = hasattr(source, "file_numbers")
            mask[source.file_numbers(np.array(without)) if has_numbers else ...] = False
        return to_bytes(pa.table(columns).filter(pa.array(mask)), about)


def same_names(before: Sequence[Sequence[Any]], after: Sequence[Sequence[Any]]) -> bool:
    """Whether classes that two openings share have the same names in the data set.

    Args:
      before: (name in the source, name in the data set or label) of each class.
      after: the same.
    """
    old, new = dict(before), dict(after)
    are_unique = len(old) == len(before) and len(new) == len(after)
    return are_unique and all(old[name] == new[name] for name in old.keys() & new.keys())
