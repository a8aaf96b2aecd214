"""Verifies a data set: every file against the manifest, every id against all others."""

import hashlib
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from pipeline.cli.progress import Progress
from pipeline.datasets import index, placement, reader
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import tasks, verification
from pipeline.stages.contracts import FileEntry, is_shard
from pipeline.stages.verification import Problem
from pipeline.storage import files as files_lib

_HASH_BYTES = 16


class _Ids:
    """Hashes of all ids, to find repeated ids."""

    def __init__(self):
        self._hashes: list[bytes] = []
        self._offsets: list[int] = []
        self._ends: list[int] = []  # Number of ids up to and including each shard.
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
        for position in np.flatnonzero(same).tolist():
            earlier, later = (
                (self._entries[np.searchsorted(self._ends, i, side="right")], self._offsets[i])
                for i in order[position : position + 2].tolist()
            )
            yield *later, *earlier


def verify(directory: str) -> tuple[dict[str, Any], Iterator[Problem]]:
    """Verifies a data set.

    Args:
      directory: output directory of preprocess; local path or fsspec URL.

    Returns:
      The manifest, and an iterator that reads the set and yields its problems.

    Raises:
      StageError: not a finished data set.
    """
    dataset = reader.Dataset(directory, allow_rejected=True)
    return dataset.manifest, _find(dataset)


def _find(dataset: reader.Dataset) -> Iterator[Problem]:
    directory, manifest = dataset.directory, dataset.manifest
    job = tasks.Tasks(directory).job()
    # An unfinished append. The set's own job may remain too, if it was killed after its manifest.
    is_append = job is not None and job["made_from"] != manifest["made_from"]
    append_names = {*job.get("names", ())} if is_append else set()
    rewritten: list[str] = []  # Files describing the set that the append has already rewritten.
    entries = {entry["name"]: entry for entry in manifest["files"]}
    ids = _Ids()
    num_intact = dict.fromkeys(dataset.splits, 0)
    progress = Progress("verify", total=len(entries), unit="files")
    for number, entry in enumerate(manifest["files"]):
        _, path, data, fault = verification.read(directory, entry)
        if fault and entry["name"] in append_names and not is_shard(entry):
            rewritten.append(entry["name"])
        elif fault:
            yield Problem(path, None, fault)
        if data is None:
            continue
        if is_shard(entry):
            index_entry = index.entry_of(entries, entry)
            num_intact[entry["split"]] += yield from _find_in_shard(
                dataset, entry, data, ids, index_entry
            )
        elif "num_quarantined" in entry and data.count(b"\n") != entry["num_quarantined"]:
            num_lines = data.count(b"\n")
            yield Problem(path, None, f"{num_lines} lines, expected {entry['num_quarantined']}")
        progress.update(number + 1)
    progress.close()
    for later, offset, earlier, earlier_offset in ids.repeated():
        where = f"{files_lib.join(directory, earlier['name'])} byte {earlier_offset}"
        split = "another split" if later["split"] != earlier["split"] else "the same split"
        path = files_lib.join(directory, later["name"])
        yield Problem(path, offset, f"its id appears twice, also in {split} at {where}")
    yield from _find_in_manifest(dataset, num_intact)
    path = files_lib.join(directory, manifest_lib.PREVIOUS)
    if files_lib.exists(path) and not manifest_lib.previous_of(directory):
        yield Problem(path, None, "is damaged, so nothing takes the place of a lost manifest.json")
    listed = {*entries, manifest_lib.MANIFEST}
    if is_append:
        listed |= append_names
        path = files_lib.join(directory, tasks.DIRECTORY)
        text = "an --append or a removal did not finish"
        if rewritten:
            text += (
                f", and has already rewritten {', '.join(rewritten)}: run the same command again "
            )
            text += "to finish it; all other files of the data set are unchanged"
        else:
            text += (
                ": run the same command again to finish it, or undo it with pipeline.remove "
                "--overwrite, or with --append --overwrite and a source that is already in the "
                "data set; the data set is as it was"
            )
        yield Problem(path, None, text, is_unfinished_append=True)
    for name in files_lib.list_finished_names(directory):
        if ".tfrecord-" in name and name not in listed:
            path = files_lib.join(directory, name)
            yield Problem(
                path, None, "is not in the manifest, but readers that search by pattern read it"
            )


def _find_in_shard(
    dataset: reader.Dataset,
    entry: dict[str, Any],
    data: bytes,
    ids: _Ids,
    index_entry: FileEntry | None,
) -> Generator[Problem, None, int]:
    """Yields the problems of a shard and of its index; returns the number of intact records."""
    path = files_lib.join(dataset.directory, entry["name"])
    records, offsets, num_bytes = [], [], []
    for item in reader.parse_records(data, path, dataset.image_shape):
        if isinstance(item, reader.Fault):
            yield Problem(path, item.offset, item.reason)
        else:
            offset, serialized, record = item
            records.append(record)
            offsets.append(offset)
            num_bytes.append(len(serialized))
    shard_ids = [record.id for record in records]
    ids.add_shard(entry, shard_ids, offsets)
    if len(records) != entry["num_examples"]:
        reason = f"{len(records)} intact records, expected {entry['num_examples']}"
        yield Problem(path, None, reason)
        return len(records)
    stored = index.read(dataset.directory, entry, index_entry)
    if stored is not None and records:
        builder = index.Builder()
        hashes = placement.id_hashes(dataset.manifest["made_from"]["seed"], shard_ids)
        labels = np.array([record.label for record in records], np.int64)
        builder.add(hashes, [record.image for record in records], labels, num_bytes)
        if not np.array_equal(stored.rows, builder.index().rows):
            path = files_lib.join(dataset.directory, index.file_name(entry["name"]))
            yield Problem(path, None, f"is not the index of {entry['name']}")
    return len(records)


def _find_in_manifest(dataset: reader.Dataset, num_intact: dict[str, int]) -> Iterator[Problem]:
    """Compares the counts of the manifest with the files."""
    path = files_lib.join(dataset.directory, manifest_lib.MANIFEST)
    records, files = dataset.manifest["records"], dataset.manifest["files"]
    for split, count in dataset.manifest["splits"].items():
        if num_intact[split] != count:
            reason = f"{split}: {count} records, of which {num_intact[split]} are intact"
            yield Problem(path, None, reason)
    quarantined = sum(entry.get("num_quarantined", 0) for entry in files)
    if records["read"] != sum(num_intact.values()) + quarantined:
        yield Problem(
            path,
            None,
            f"{records['read']} records were read, {sum(num_intact.values())} are intact and "
            f"{quarantined} quarantined",
        )
