"""changes.parquet: how the rows of an export differ from those of the export it took over.

A consumer that keeps rows elsewhere, such as a vector store, applies this file each night. Shards
whose files are links of the earlier export hold no change, and are not read. The others are
compared by hashes of split and id, so that memory grows with 48 bytes a row.
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
      new: its shards that are not linked.
      old: the shards of the old export that are not linked.
      is_same_model: whether equal records have equal rows in both.

    Returns:
      The file's entry; the numbers of rows "added", "changed" and "removed"; and "unreadable", the
      shards of the old export whose files are damaged or missing: their rows count as added.

    Raises:
      StageError: a file of the new export is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    readable = {task for task in old.entries if _is_readable(old, task)}
    unreadable = sorted(old.entries.keys() - readable)
    old = old._replace(
        entries={task: old.entries[task] for task in old.entries if task in readable}
    )
    new_keys, new_rows = _hashes(new)
    old_keys, old_rows = _hashes(old)
    origins = _places_in(old_keys, new_keys)
    is_added = origins < 0
    is_changed = ~is_added
    if is_same_model:
        is_changed &= (new_rows != old_rows[origins]).any(axis=1) if len(old_rows) else False
    is_removed = _places_in(new_keys, old_keys) < 0
    schema = pa.schema([(name, pa.string()) for name in ("id", "split", "change", "file")])
    sides = (
        (new, np.where(is_added, "added", np.where(is_changed, "changed", ""))),
        (old, np.where(is_removed, "removed", "")),
    )
    with manifest_lib.writing(directory, FILE) as file:
        with pq.ParquetWriter(
            pa.PythonFile(_Sink(file), "w"), schema, write_page_checksum=True
        ) as writer:
            for side, kinds in sides:
                for batch in _lines(side, kinds):
                    writer.write_table(pa.table(batch, schema))
    counts = {"added": is_added, "changed": is_changed, "removed": is_removed}
    return {
        "entry": file.entry(),
        **{name: int(mask.sum()) for name, mask in counts.items()},
        "unreadable": unreadable,
    }


def _is_readable(side: Side, task: str) -> bool:
    try:
        row_files.read_keys(side.directory, task, side.entries[task])
    except StageError:
        return False
    return True


class _Sink:
    """What Arrow needs of a file to write to it."""

    closed = False

    def __init__(self, file: manifest_lib.HashedFile):
        self.write, self.flush = file.write, file.flush


def _keys_of_rows(side: Side) -> Iterator[tuple[str, row_files.Keys]]:
    for task, entries in side.entries.items():
        yield task, row_files.read_keys(side.directory, task, entries)


def _hashes(side: Side) -> tuple[np.ndarray, np.ndarray]:
    """uint64 (n, 2) hashes of split and id, and (n, 4) of record and class, of all rows."""
    names = dict(enumerate(side.class_names))
    keys, records = [], []
    for task, rows in _keys_of_rows(side):
        split = side.splits[task].encode()
        keys += [_hash(split + b"\0" + record_id.encode()) for record_id in rows.ids]
        for sha, label in zip(rows.shas, rows.labels.tolist(), strict=True):
            records.append(bytes.fromhex(sha)[:16] + _hash(names.get(label, "\0").encode()))
    return (
        np.frombuffer(b"".join(keys), np.uint64).reshape(-1, 2),
        np.frombuffer(b"".join(records), np.uint64).reshape(-1, 4),
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


def _lines(side: Side, kinds: np.ndarray) -> Iterator[dict[str, list[str]]]:
    """The lines of each shard's rows that have a kind of change."""
    first = 0
    for task, rows in _keys_of_rows(side):
        shard_kinds = kinds[first : first + len(rows.ids)]
        first += len(rows.ids)
        positions = np.flatnonzero(shard_kinds != "").tolist()
        if positions:
            name = side.entries[task][0]["name"]
            yield {
                "id": [rows.ids[i] for i in positions],
                "split": [side.splits[task]] * len(positions),
                "change": [str(shard_kinds[i]) for i in positions],
                "file": [name] * len(positions),
            }
