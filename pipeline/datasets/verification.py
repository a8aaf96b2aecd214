"""A data set read back in full: every byte against the manifest, every record against the rest."""

import hashlib
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.progress import Progress
from pipeline.datasets import reader
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import tasks
from pipeline.storage import files as files_lib

_HASH_BYTES = 16


class Found(NamedTuple):
    """Something wrong: where, and what."""

    path: str
    offset: int | None  # Bytes from the beginning of the file, if it is about a place in one.
    reason: str
    of_append: bool = False  # Whether no more is wrong than that an append was not finished.

    def __str__(self) -> str:
        return f"{self.path}{'' if self.offset is None else f' byte {self.offset}'}: {self.reason}"


class _Ids:
    """All ids seen, as hashes, to find those that stand twice."""

    def __init__(self):
        self._hashes: list[bytes] = []
        self._offsets: list[int] = []
        self._ends: list[int] = []  # Number of ids seen after each shard.
        self._entries: list[dict[str, Any]] = []

    def add_shard(self, entry: dict[str, Any], ids: list[bytes], offsets: list[int]) -> None:
        self._hashes.append(b"".join(hashlib.sha256(i).digest()[:_HASH_BYTES] for i in ids))
        self._offsets += offsets
        self._ends.append(len(self._offsets))
        self._entries.append(entry)

    def repeated(self) -> Iterator[tuple[dict[str, Any], int, dict[str, Any], int]]:
        """(entry, offset) of a record, then of an earlier one with the same id."""
        words = np.frombuffer(b"".join(self._hashes), np.uint64).reshape(-1, 2)
        order = np.lexsort((np.arange(len(words)), words[:, 1], words[:, 0]))
        same = (words[order[1:]] == words[order[:-1]]).all(axis=1)
        for place in np.flatnonzero(same).tolist():
            earlier, later = (
                (self._entries[np.searchsorted(self._ends, i, side="right")], self._offsets[i])
                for i in order[place : place + 2].tolist()
            )
            yield *later, *earlier


def verify(directory: str) -> tuple[dict[str, Any], Iterator[Found]]:
    """Reads a data set back.

    Args:
      directory: output directory of preprocess; local path or fsspec URL.

    Returns:
      The manifest, and everything that is wrong, found as the iterator goes on.

    Raises:
      StageError: no finished data set.
    """
    dataset = reader.Dataset(directory)
    return dataset.manifest, _find(dataset)


def _find(dataset: reader.Dataset) -> Iterator[Found]:
    directory, manifest = dataset.directory, dataset.manifest
    job = tasks.Tasks(directory).job()
    # A job that goes on from the set; that of the set itself was killed after its manifest.
    is_append = job is not None and job["made_from"] != manifest["made_from"]
    rewritten = {*job.get("names", ())} if is_append else set()
    begun: list[str] = []  # Files that describe the set, as far as the append has written them.
    entries = {entry["name"]: entry for entry in manifest["files"]}
    ids = _Ids()
    num_whole = dict.fromkeys(dataset.splits, 0)
    progress = Progress("verify", total=len(entries), unit="files")
    for number, entry in enumerate(manifest["files"]):
        path = files_lib.join(directory, entry["name"])
        try:
            data = files_lib.read_bytes(path)
        except (FileNotFoundError, IsADirectoryError):
            data = None
        fault = _fault_of(data, entry)
        if fault and entry["name"] in rewritten and "split" not in entry:
            begun.append(entry["name"])
        elif fault:
            yield Found(path, None, fault)
        if data is None:
            continue
        if "split" in entry:
            num_whole[entry["split"]] += yield from _find_in_shard(dataset, entry, data, ids)
        elif "num_quarantined" in entry and data.count(b"\n") != entry["num_quarantined"]:
            num_lines = data.count(b"\n")
            yield Found(path, None, f"{num_lines} lines, expected {entry['num_quarantined']}")
        progress.update(number + 1)
    progress.close()
    for later, offset, earlier, earlier_offset in ids.repeated():
        where = f"{files_lib.join(directory, earlier['name'])} byte {earlier_offset}"
        what = "in another split" if later["split"] != earlier["split"] else "in the same split"
        path = files_lib.join(directory, later["name"])
        yield Found(path, offset, f"its id stands twice, also {what} at {where}")
    yield from _find_in_manifest(dataset, num_whole)
    listed = {*entries, manifest_lib.MANIFEST}
    if is_append:
        listed |= rewritten
        path = files_lib.join(directory, tasks.DIRECTORY)
        text = "an --append was not finished here"
        if begun:
            text += f", and has begun to write {', '.join(begun)} anew: run the same command to "
            text += "its end; all else that was there is as it was"
        else:
            text += ": run the same command to its end, or undo it with --append --overwrite of a "
            text += "source that is in the set; what was there is as it was"
        yield Found(path, None, text, of_append=True)
    for name in files_lib.list_finished_names(directory):
        if ".tfrecord-" in name and name not in listed:
            path = files_lib.join(directory, name)
            yield Found(path, None, "is no file of the manifest, but readers by pattern see it")


def _fault_of(data: bytes | None, entry: dict[str, Any]) -> str:
    """What is wrong with a file as a whole; "" if nothing is."""
    if data is None:
        return "missing"
    if len(data) != entry["bytes"]:
        return f"{len(data)} bytes, expected {entry['bytes']}"
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        return "its sha256 is not the manifest's"
    return ""


def _find_in_shard(
    dataset: reader.Dataset, entry: dict[str, Any], data: bytes, ids: _Ids
) -> Generator[Found, None, int]:
    """What is wrong in a shard; returns the number of whole records."""
    path = files_lib.join(dataset.directory, entry["name"])
    found_ids, offsets = [], []
    for found in reader.parse_records(data, path, dataset.image_shape):
        if isinstance(found, reader.Fault):
            yield Found(path, found.offset, found.reason)
        else:
            offset, _, record = found
            found_ids.append(record.id)
            offsets.append(offset)
    if len(offsets) != entry["num_examples"]:
        yield Found(path, None, f"{len(offsets)} whole records, expected {entry['num_examples']}")
    ids.add_shard(entry, found_ids, offsets)
    return len(offsets)


def _find_in_manifest(dataset: reader.Dataset, num_whole: dict[str, int]) -> Iterator[Found]:
    """Whether the manifest's sums are those of the files."""
    path = files_lib.join(dataset.directory, manifest_lib.MANIFEST)
    records, files = dataset.manifest["records"], dataset.manifest["files"]
    for split, count in dataset.manifest["splits"].items():
        if num_whole[split] != count:
            yield Found(path, None, f"{split}: {count} records, {num_whole[split]} are whole")
    quarantined = sum(entry.get("num_quarantined", 0) for entry in files)
    if records["read"] != sum(num_whole.values()) + quarantined:
        yield Found(
            path,
            None,
            f"{records['read']} records were read, {sum(num_whole.values())} are whole and "
            f"{quarantined} quarantined",
        )
