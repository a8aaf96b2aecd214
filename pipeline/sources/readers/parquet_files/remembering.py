"""What a memory keeps of Parquet files: schemas, where rows lie in the copy, labels, headers."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.sources.memory import Memory
from pipeline.sources.readers.parquet_files.columns import Columns
from pipeline.sources.readers.parquet_files.copying import Rows
from pipeline.sources.readers.parquet_files.heads import Heads

_ARRAYS = {"lengths": "<i8", "shapes": "<i4", "labels": "<i8"}


class Known(NamedTuple):
    """What is known of a file that has not changed."""

    rows: Rows
    heads: Heads


def schemas_in(memory: Memory | None, listed: Mapping[str, str]) -> dict[str, pa.Schema]:
    """Path -> schema of each listed file that has not changed."""
    if memory is None:
        return {}
    numbers = memory.rows_of(listed)
    is_known = numbers >= 0
    [texts] = memory.take(numbers[is_known], ["schema"]).values()
    schemas = {text: pa.ipc.read_schema(pa.py_buffer(text)) for text in set(texts)}
    paths = [path for path, is_one in zip(listed, is_known, strict=True) if is_one]
    return {path: schemas[text] for path, text in zip(paths, texts, strict=True)}


def reading_of(columns: Columns) -> str:
    """What all schemas decide about the reading of a file; the rest are options."""
    return json.dumps([columns.image, columns.label, columns.unread, columns.is_left_over])


def known_in(memory: Memory | None, listed: Mapping[str, str], reading: str) -> dict[str, Known]:
    """What is known of files that have not changed and are read as before.

    Args:
      memory: with the columns of `columns_of`.
      listed: path -> stamp of each file.
      reading: see `reading_of`.
    """
    if memory is None or memory.about["reader"]["reading"] != reading:
        return {}
    numbers, names = memory.rows_of(listed), [*_ARRAYS, "texts", "highest", "heads"]
    known = {}
    for path, number in zip(listed, numbers.tolist(), strict=True):
        if number < 0:
            continue
        fields = {name: memory.table[name][number].as_py() for name in names}
        arrays = {name: np.frombuffer(fields[name], dtype) for name, dtype in _ARRAYS.items()}
        arrays["shapes"] = arrays["shapes"].reshape(-1, 3)
        rows = Rows(**arrays, texts=json.loads(fields["texts"]), highest=fields["highest"])
        heads = Heads(*json.loads(fields["heads"]))
        shapes = [(tuple(shape), count) for shape, count in heads.shapes]
        refused = heads.refused and tuple(heads.refused)
        known[path] = Known(rows, heads._replace(shapes=shapes, refused=refused))
    return known


def columns_of(
    schemas: Sequence[pa.Schema],
    rows: Sequence[Rows],
    heads: Sequence[Heads],
) -> dict[str, pa.Array]:
    """Columns of a memory, a row for each file."""
    columns = {
        name: pa.array(
            [np.ascontiguousarray(getattr(one, name), dtype).tobytes() for one in rows],
            pa.large_binary(),
        )
        for name, dtype in _ARRAYS.items()
    }
    return {
        "schema": pa.array([s.serialize().to_pybytes() for s in schemas]).dictionary_encode(),
        **columns,
        "texts": pa.array([json.dumps(one.texts) for one in rows], pa.string()),
        "highest": pa.array([one.highest for one in rows], pa.int64()),
        "heads": pa.array([json.dumps(one) for one in heads], pa.string()),
    }


def num_same(before: Sequence[str], paths: Sequence[str], known: Mapping[str, Any]) -> int:
    """How many files, from the first on, are the same in the same order as at an earlier opening.

    Args:
      before: the paths of all files then.
      paths: the paths of all files now.
      known: the files that have not changed.
    """
    pairs = zip(before, paths, strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1] and pair[1] in known, pairs)
    return sum(1 for _ in same)
