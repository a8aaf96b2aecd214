"""What a memory keeps of Parquet files: schemas, where rows lie in the copy, labels, headers."""

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


def reading_of(columns: Columns, split: str) -> str:
    """What decides how the rows of a file are read, beside the options."""
    return json.dumps([split, columns.image, columns.label, columns.unread, columns.is_left_over])


def known_in(
    memory: Memory | None, listed: Mapping[str, str], readings: Sequence[str]
) -> dict[str, Known]:
    """What is known of files that have not changed and are read as before.

    Args:
      memory: with the columns of `columns_of`.
      listed: path -> stamp of each file.
      readings: of each file, see `reading_of`.
    """
    if memory is None:
        return {}
    numbers, known = memory.rows_of(listed), {}
    for path, number, reading in zip(listed, numbers.tolist(), readings, strict=True):
        if number < 0 or memory.table["reading"][number].as_py() != reading:
            continue
        names = [*_ARRAYS, "texts", "highest", "heads"]
        fields = {
            name: column[0] for name, column in memory.take(np.array([number]), names).items()
        }
        arrays = {name: np.frombuffer(fields[name], dtype) for name, dtype in _ARRAYS.items()}
        arrays["shapes"] = arrays["shapes"].reshape(-1, 3)
        shapes, num_of_16_bits, refused = json.loads(fields["heads"])
        heads = Heads(
            [(tuple(shape), count) for shape, count in shapes],
            num_of_16_bits,
            refused and tuple(refused),
        )
        rows = Rows(**arrays, texts=json.loads(fields["texts"]), highest=fields["highest"])
        known[path] = Known(rows, heads)
    return known


def columns_of(
    schemas: Sequence[pa.Schema],
    readings: Sequence[str],
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
        "reading": pa.array(readings, pa.string()).dictionary_encode(),
        **columns,
        "texts": pa.array([json.dumps(one.texts) for one in rows], pa.string()),
        "highest": pa.array([one.highest for one in rows], pa.int64()),
        "heads": pa.array([json.dumps(one) for one in heads], pa.string()),
    }


def num_same(memory: Memory | None, paths: Sequence[str], known: Mapping[str, Any]) -> int:
    """How many files, from the first on, are the same and at the same place as in a memory."""
    before = memory.about["reader"]["paths"] if memory is not None else []
    number = 0
    for path, path_before in zip(paths, before, strict=False):
        if path != path_before or path not in known:
            break
        number += 1
    return number
