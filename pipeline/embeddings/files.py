"""Rows in files, in three formats: written for a shard, and read back.

Whatever the format, a file is a function of its rows and the model's id.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.embeddings.rows import VECTORS, Rows
from pipeline.formats import tf_example, tfrecord
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files as files_lib

FORMATS = ("parquet", "npy", "tfrecord")
# Rows that a reader has to unpack to see the first of them.
_ROW_GROUP = 16_384


def stem(task: str) -> str:
    """What the names of all files begin with that are made of a shard."""
    return task.replace(".tfrecord", "")


def write(
    directory: str, task: str, rows: Rows, *, embedding_format: str, model_id: str
) -> list[dict[str, Any]]:
    """Writes the rows of a shard.

    `parquet`: one file with the columns id (string), label (int64), the fields (float32, or
    lists of latent_dim of them) and record_sha (hex); model_id stands in its metadata.
    `npy`: an array for each of these, `<shard>.<column>.npy`.
    `tfrecord`: tf.Examples with these features.

    Args:
      directory: where to.
      task: the shard's file name.
      rows: its rows.
      embedding_format: one of FORMATS.
      model_id: of the model that made them.

    Returns:
      The files' entries.
    """
    made = {"parquet": _parquet, "npy": _npy, "tfrecord": _tfrecord}[embedding_format]
    about = {"num_examples": len(rows.ids)}
    return [{**entry, **about} for entry in made(directory, stem(task), rows, model_id)]


def read(
    directory: str, task: str, files: Iterable[Mapping[str, Any]], *, num_rows: int | None = None
) -> Rows:
    """Reads what `write` wrote.

    Args:
      directory: the export's.
      task: the shard's file name.
      files: entries of the export's files.
      num_rows: how many from the beginning; all if left out, and then checksums are looked at.

    Raises:
      StageError: a file is missing, or is not as it was written.
    """
    try:
        return _read(directory, task, files, num_rows)
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors are of the first two.
        raise StageError(
            f"{files_lib.join(directory, stem(task))}: its rows cannot be read ({error}); expected "
            "them as they were exported: export again, which makes what is missing or damaged"
        ) from error


def _read(
    directory: str, task: str, files: Iterable[Mapping[str, Any]], num_rows: int | None
) -> Rows:
    found = {entry["name"]: entry for entry in files}
    name = stem(task)
    if f"{name}.parquet" in found:
        return _read_parquet(directory, found[f"{name}.parquet"], num_rows)
    if f"{name}.tfrecord" in found:
        return _read_tfrecord(directory, found[f"{name}.tfrecord"], num_rows)
    arrays = {
        entry.removeprefix(f"{name}.").removesuffix(".npy"): np.load(
            io.BytesIO(manifest_lib.read_file(directory, found[entry])), allow_pickle=False
        )[:num_rows]
        for entry in found
        if entry.startswith(f"{name}.") and entry.endswith(".npy")
    }
    ids, labels, shas = (arrays.pop(column) for column in ("id", "label", "record_sha"))
    return Rows(ids.tolist(), labels, [sha.decode() for sha in shas.tolist()], arrays)


def _parquet(directory: str, name: str, rows: Rows, model_id: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def vectors(values: np.ndarray) -> pa.Array:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), pa.float32())
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

    table = pa.table(
        {
            "id": pa.array(rows.ids, pa.string()),
            "label": pa.array(rows.labels, pa.int64()),
            **{
                field: vectors(values) if field in VECTORS else pa.array(values, pa.float32())
                for field, values in rows.columns.items()
            },
            "record_sha": pa.array(rows.shas, pa.string()),
        }
    ).replace_schema_metadata({"model_id": model_id})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=_ROW_GROUP)
    yield manifest_lib.write_file(directory, f"{name}.parquet", buffer.getvalue())


def _read_parquet(directory: str, entry: Mapping[str, Any], num_rows: int | None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if num_rows is None:
        table = pq.read_table(io.BytesIO(manifest_lib.read_file(directory, entry)))
    else:
        with files_lib.open_read(files_lib.join(directory, entry["name"])) as file:
            parquet = pq.ParquetFile(file)
            batches = parquet.iter_batches(batch_size=max(1, num_rows))
            schema, first = parquet.schema_arrow, next(batches, None)
            table = pa.Table.from_batches([first] if first else [], schema).slice(0, num_rows)
    fields = {}
    for field in table.column_names:
        if field not in ("id", "label", "record_sha"):
            column = table[field].combine_chunks()
            kind = column.type
            if isinstance(kind, pa.FixedSizeListType):
                fields[field] = column.flatten().to_numpy().reshape(-1, kind.list_size)
            else:
                fields[field] = column.to_numpy()
    shas = table["record_sha"].to_pylist()
    return Rows(table["id"].to_pylist(), table["label"].to_numpy(), shas, fields)


def _npy(directory: str, name: str, rows: Rows, model_id: str) -> Iterator[dict[str, Any]]:
    del model_id  # An array has no room for it; it stands in the manifest.
    arrays = {
        "id": np.array(rows.ids, np.str_),
        "label": rows.labels,
        **rows.columns,
        "record_sha": np.array(rows.shas, np.bytes_),
    }
    for column, values in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
        yield manifest_lib.write_file(directory, f"{name}.{column}.npy", buffer.getvalue())


def _tfrecord(directory: str, name: str, rows: Rows, model_id: str) -> Iterator[dict[str, Any]]:
    del model_id  # As above.

    def serialized() -> Iterator[bytes]:
        for place, (record_id, sha) in enumerate(zip(rows.ids, rows.shas, strict=True)):
            yield tf_example.encode_features(
                {
                    "id": record_id.encode(),
                    "label": int(rows.labels[place]),
                    **{field: np.atleast_1d(v[place]) for field, v in rows.columns.items()},
                    "record_sha": sha.encode(),
                }
            )

    with manifest_lib.writing(directory, f"{name}.tfrecord") as file:
        num_examples = tfrecord.write(file, f"{name}.tfrecord", serialized())
    yield {**file.entry(), "num_examples": num_examples}


def _read_tfrecord(directory: str, entry: Mapping[str, Any], num_rows: int | None) -> Rows:
    path = files_lib.join(directory, entry["name"])
    found: list[dict[str, Any]] = []
    for record in tfrecord.records(manifest_lib.read_file(directory, entry), path):
        if len(found) == num_rows:
            break
        found.append(tf_example.parse_features(record))
    fields = [f for f in (found[0] if found else ()) if f not in ("id", "label", "record_sha")]

    def column(field: str) -> np.ndarray:
        values = np.array([row[field] for row in found], np.float32)
        return values if field in VECTORS else values[:, 0]

    return Rows(
        [row["id"].decode() for row in found],
        np.array([row["label"] for row in found], np.int64),
        [row["record_sha"].decode() for row in found],
        {field: column(field) for field in fields},
    )
