"""changes.parquet: how the rows of an export differ from those of the export it took over.

A consumer that keeps rows elsewhere, such as a vector store, applies this file each night. Shards
with the same files as in the earlier export hold no change, and are not read. The others are
read once and compared by hashes, so that memory grows with a row's id and 48 bytes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.embeddings import files as row_files
from pipeline.stages import manifest as manifest_lib

FILE = "changes.parquet"


class Side(NamedTuple):
    """The compared shards of one of the two exports."""

    directory: str
    class_names: Sequence[str]
    splits: Mapping[str, str]  # Task -> split.
    entries: Mapping[str, Sequence[Mapping[str, Any]]]  # Task -> entries of its files.


def write(directory: str, new: Side, old: Side, *, is_same_model: bool) -> dict[str, Any]:
    """Writes changes.parquet.

    Its columns are strings: id, split, change (added, changed or removed), and file, the file of
    rows below the new export, or below the old one for a removed row.

    Args:
      directory: the new export's.
      new: its shards whose files differ.
      old: the shards of the old export whose files differ.
      is_same_model: whether equal records have equal rows in both.

    Returns:
      The file's entry; the numbers of rows "added", "changed" and "removed"; and "unreadable", the
      shards of the old export whose files are damaged or missing: their rows count as added.

    Raises:
      StageError: a file of the new export is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    new_rows, old_rows = _read(new, may_be_damaged=False), _read(old, may_be_damaged=True)
    origins = _places_in(old_rows.keys, new_rows.keys)
    is_added = origins < 0
    is_changed = ~is_added
    if is_same_model:
        is_changed &= ~_equal(new_rows.records, old_rows.records, origins)
    is_removed = _places_in(new_rows.keys, old_rows.keys) < 0
    schema = pa.schema([(name, pa.string()) for name in ("id", "split", "change", "file")])
    sides = (
        (new, new_rows, np.where(is_added, "added", np.where(is_changed, "changed", ""))),
        (old, old_rows, np.where(is_removed, "removed", "")),
    )
    with manifest_lib.writing(directory, FILE) as file:
        with pq.ParquetWriter(
            pa.PythonFile(_Sink(file), "w"), schema, write_page_checksum=True
        ) as writer:
            for side, rows, kinds in sides:
                for batch in _lines(side, rows, kinds):
                    writer.write_table(pa.table(batch, schema))
    counts = {"added": is_added, "changed": is_changed, "removed": is_removed}
    return {
        "entry": file.entry(),
        **{name: int(mask.sum()) for name, mask in counts.items()},
        "unreadable": old_rows.unreadable,
    }


class _Sink:
    """What Arrow needs of a file to write to it."""

    closed = False

    def __init__(self, file: manifest_lib.HashedFile):
        self.write, self.flush = file.write, file.flush


class _Rows(NamedTuple):
    """The n rows of a side, shard by shard."""

    ids: dict[str, Any]  # Task -> Arrow's array of its ids.
    keys: np.ndarray  # uint64 (n, 2): hashes of split and id
    records: np.ndarray  # uint64 (n, 4): hashes of record and class
    unreadable: list[str]  # Tasks whose files are damaged or missing.


def _read(side: Side, *, may_be_damaged: bool) -> _Rows:
    import pyarrow as pa

    names = dict(enumerate(side.class_names))
    ids, keys, records, unreadable = {}, [], [], []
    for task, entries in side.entries.items():
        try:
            rows = row_files.read_keys(side.directory, task, entries)
        except StageError:
            if not may_be_damaged:
                raise
            unreadable.append(task)
            continue
        split = side.splits[task].encode()
        ids[task] = pa.array(rows.ids, pa.string())
        keys += [_hash(split + b"\0" + record_id.encode()) for record_id in rows.ids]
        for sha, label in zip(rows.shas, rows.labels.tolist(), strict=True):
            records.append(bytes.fromhex(sha)[:16] + _hash(names.get(label, "\0").encode()))
    return _Rows(
        ids,
        np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2),
        np.frombuffer(b"".join(records), np.uint64).reshape(-1, 4),
        sorted(unreadable),
    )


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _places_in(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each row of `wanted`, its index in `keys`; -1 if it is not there. Both (n, 2)."""
    both = np.concatenate([keys, wanted])
    order = np.lexsort((np.arange(len(both)), both[:, 1], both[:, 0]))
    ordered = both[order]
    # A key and its equal are neighbours, the one of `keys` first.
    follows = np.zeros(len(both), bool)
    follows[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    places = np.full(len(wanted), -1, np.int64)
    matched = order[follows]
    places[matched - len(keys)] = order[np.flatnonzero(follows) - 1]
    return places


def _equal(records: np.ndarray, others: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """Whether each record equals the one at its origin: bool (n,); False without an origin."""
    is_same = np.zeros(len(records), bool)
    has_origin = origins >= 0
    is_same[has_origin] = (records[has_origin] == others[origins[has_origin]]).all(axis=1)
    return is_same


def _lines(side: Side, rows: _Rows, kinds: np.ndarray) -> Iterator[dict[str, Any]]:
    """The lines of each shard's rows that have a kind of change."""
    first = 0
    for task, ids in rows.ids.items():
        shard_kinds = kinds[first : first + len(ids)]
        first += len(ids)
        positions = np.flatnonzero(shard_kinds != "")
        if len(positions):
            name = row_files.entry_of_ids(task, side.entries[task])["name"]
            yield {
                "id": ids.take(positions),
                "split": [side.splits[task]] * len(positions),
                "change": shard_kinds[positions].tolist(),
                "file": [name] * len(positions),
            }
