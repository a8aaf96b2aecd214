"""Files of rows in three formats: writes the rows of a shard, and reads them back.

In every format, a file is a function of its rows and the model's id.
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
# Rows in a row group of Parquet; a reader decodes a whole group to get its first row.
_ROW_GROUP = 16_384


def stem(task: str) -> str:
    """The prefix of the names of all files that belong to a shard."""
    return task.replace(".tfrecord", "")


def write(
    directory: str, task: str, rows: Rows, *, embedding_format: str, model_id: str
) -> list[dict[str, Any]]:
    """Writes the rows of a shard.

    `parquet`: one file with the columns id (string), label (int64), the fields (float32, or
    lists of latent_dim floats) and record_sha (hex); its metadata holds model_id.
    `npy`: an array for each of these columns, `<shard>.<column>.npy`.
    `tfrecord`: tf.Examples with these columns as features.

    Args:
      directory: the directory to write to.
      task: the shard's file name.
      rows: the shard's rows.
      embedding_format: one of FORMATS.
      model_id: of the model that computed the rows.

    Returns:
      The files' entries.
    """
    write_files = {"parquet": _parquet, "npy": _npy, "tfrecord": _tfrecord}[embedding_format]
    entries = write_files(directory, stem(task), rows, model_id)
    return [{**entry, "num_examples": len(rows.ids)} for entry in entries]


def read(
    directory: str, task: str, files: Iterable[Mapping[str, Any]], *, num_rows: int | None = None
) -> Rows:
    """Reads the rows of a shard from the files that `write` wrote.

    Args:
      directory: the export's.
      task: the shard's file name.
      files: entries of the export's files.
      num_rows: how many rows from the beginning; if None, all rows, with checksums verified.

    Raises:
      StageError: a file is missing or damaged.
    """
    try:
        return _read(directory, task, files, num_rows)
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors are OSError or ValueError.
        raise StageError(
            f"{files_lib.join(directory, stem(task))}: its rows cannot be read ({error}); expected "
            "the files as they were exported: export again, which replaces missing and damaged "
            "files"
        ) from error


def _read(
    directory: str, task: str, files: Iterable[Mapping[str, Any]], num_rows: int | None
) -> Rows:
    entries = {entry["name"]: entry for entry in files}
    name = stem(task)
    if f"{name}.parquet" in entries:
        return _read_parquet(directory, entries[f"{name}.parquet"], num_rows)
    if f"{name}.tfrecord" in entries:
        return _read_tfrecord(directory, entries[f"{name}.tfrecord"], num_rows)
    arrays = {
        file_name.removeprefix(f"{name}.").removesuffix(".npy"): np.load(
            io.BytesIO(manifest_lib.read_file(directory, entry)), allow_pickle=False
        )[:num_rows]
        for file_name, entry in entries.items()
        if file_name.startswith(f"{name}.") and file_name.endswith(".npy")
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
            schema, batch = parquet.schema_arrow, next(batches, None)
            table = pa.Table.from_batches([batch] if batch else [], schema).slice(0, num_rows)
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
    del model_id  # An .npy file has no metadata; the manifest has model_id.
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
    del model_id  # As in _npy.

    def serialized() -> Iterator[bytes]:
        for i, (record_id, sha) in enumerate(zip(rows.ids, rows.shas, strict=True)):
            yield tf_example.encode_features(
                {
                    "id": record_id.encode(),
                    "label": int(rows.labels[i]),
                    **{field: np.atleast_1d(v[i]) for field, v in rows.columns.items()},
                    "record_sha": sha.encode(),
                }
            )

    with manifest_lib.writing(directory, f"{name}.tfrecord") as file:
        num_examples = tfrecord.write(file, f"{name}.tfrecord", serialized())
    yield {**file.entry(), "num_examples": num_examples}


def _read_tfrecord(directory: str, entry: Mapping[str, Any], num_rows: int | None) -> Rows:
    path = files_lib.join(directory, entry["name"])
    examples: list[dict[str, Any]] = []
    for record in tfrecord.records(manifest_lib.read_file(directory, entry), path):
        if len(examples) == num_rows:
            break
        examples.append(tf_example.parse_features(record))
    names = examples[0] if examples else ()
    fields = [name for name in names if name not in ("id", "label", "record_sha")]

    def column(field: str) -> np.ndarray:
        values = np.array([example[field] for example in examples], np.float32)
        return values if field in VECTORS else values[:, 0]

    return Rows(
        [example["id"].decode() for example in examples],
        np.array([example["label"] for example in examples], np.int64),
        [example["record_sha"].decode() for example in examples],
        {field: column(field) for field in fields},
    )
