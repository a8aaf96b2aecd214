"""Files of rows in three formats: writes the rows of a shard, and reads them back.

In every format, a file is a function of its rows and the model's id.
"""

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.embeddings.rows import VECTORS, Rows
from pipeline.formats import tf_example, tfrecord
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files as files_lib

FORMATS = ("parquet", "npy", "tfrecord")
# Directories of an export. The first holds files of rows and nothing else, so that programs which
# read a folder of Parquet read it.
ROWS_DIRECTORY, IMAGES_DIRECTORY = "embeddings", "images"
# Pairs on a contact sheet. The order within a shard is a hash of the ids, so the first records
# of a shard are a fair sample of it.
SHEET_PAIRS = 96
# Columns beside the fields of a row.
_KEYS = ("id", "label", "class", "split", "record_sha")
_SHA = re.compile("[0-9a-f]{64}")
# Part of a shard's identity: files of another version hold other columns.
VERSION = 2
# Rows in a row group of Parquet; a reader decodes a whole group to get its first row.
_ROW_GROUP = 16_384


def _stem(task: str) -> str:
    """The start of the names of all files that belong to a shard."""
    return task.replace(".tfrecord", "")


def row_names(task: str, embedding_format: str, fields: Sequence[str]) -> list[str]:
    """Names of a shard's files of rows, below the export's directory."""
    if embedding_format == "npy":
        columns = (*_KEYS, *fields)
        return [f"{ROWS_DIRECTORY}/{_stem(task)}.{column}.npy" for column in columns]
    return [f"{ROWS_DIRECTORY}/{_stem(task)}.{embedding_format}"]


def picture_name(task: str, images: str) -> str:
    """Name of a shard's contact sheet (images is "sheets") or archive ("all")."""
    return f"{IMAGES_DIRECTORY}/{_stem(task)}.{'tar' if images == 'all' else 'png'}"


def write(
    directory: str,
    task: str,
    rows: Rows,
    *,
    class_names: Sequence[str],
    split: str,
    embedding_format: str,
    model_id: str,
) -> list[dict[str, Any]]:
    """Writes the rows of a shard.

    `parquet`: one file with the columns id (string), label (int64), class (string, null without
    a class), split (string), the fields (float32, or lists of latent_dim floats) and record_sha
    (hex); its metadata holds model_id.
    `npy`: an array for each of these columns, `<shard>.<column>.npy`; "" without a class.
    `tfrecord`: tf.Examples with these columns as features; an empty class without one.

    Args:
      directory: the export's.
      task: the shard's file name.
      rows: the shard's rows.
      class_names: class_names[i] is the name of label i.
      split: of all rows.
      embedding_format: one of FORMATS.
      model_id: of the model that computed the rows.

    Returns:
      The files' entries.
    """
    files_lib.make_dirs(files_lib.join(directory, ROWS_DIRECTORY))
    names = dict(enumerate(class_names))
    classes = [names.get(label) for label in rows.labels.tolist()]
    keys = {
        "id": rows.ids,
        "label": rows.labels,
        "class": classes,
        "split": [split] * len(rows.ids),
        "record_sha": rows.shas,
    }
    write_files = {"parquet": _parquet, "npy": _npy, "tfrecord": _tfrecord}[embedding_format]
    entries = write_files(directory, f"{ROWS_DIRECTORY}/{_stem(task)}", keys, rows, model_id)
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
        raise _unreadable(files_lib.join(directory, _stem(task)), error) from error


class Keys(NamedTuple):
    """What identifies the n rows of a shard."""

    ids: list[str]
    labels: np.ndarray  # (n,) int64
    shas: list[str]


def read_keys(directory: str, task: str, files: Iterable[Mapping[str, Any]]) -> Keys:
    """As `read`, without the fields of the rows."""
    entries = list(files)
    entry = entry_of_ids(task, entries)
    if not entry["name"].endswith(".parquet"):
        rows = read(directory, task, entries)
        return Keys(rows.ids, rows.labels, rows.shas)
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = files_lib.join(directory, entry["name"])
    try:
        with files_lib.open_read(path) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            table = parquet.read(columns=["id", "label", "record_sha"])
        columns = [table[name] for name in ("id", "label", "record_sha")]
        types = [column.type for column in columns]
        if types != [pa.string(), pa.int64(), pa.string()] or any(c.null_count for c in columns):
            raise ValueError("a column has another type, or nulls")
        keys = Keys(columns[0].to_pylist(), columns[1].to_numpy(), columns[2].to_pylist())
        if len(keys.ids) != entry["num_examples"] or not all(map(_SHA.fullmatch, keys.shas)):
            raise ValueError("the number of rows or a record_sha is wrong")
    # A flipped bit of the footer, which has no checksum, can lead to any error of Arrow.
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    return keys


def entry_of_ids(task: str, entries: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The entry of the file that holds the ids of a shard's rows; raises StageError."""
    names = [f"{_stem(task)}.{suffix}" for suffix in ("parquet", "tfrecord", "id.npy")]
    for entry in entries:
        if _base(entry) in names:
            return entry
    raise StageError(f"{task}: has no file of rows; expected one of {', '.join(names)}")


def _base(entry: Mapping[str, Any]) -> str:
    """The name of a file without its directory; an earlier version had no directories."""
    name: str = entry["name"]
    return name.rpartition("/")[2]


def _unreadable(path: str, error: Exception) -> StageError:
    return StageError(
        f"{path}: its rows cannot be read ({error}); expected the files as they were exported: "
        "export again into a new directory, which computes missing and damaged rows"
    )


def _read(
    directory: str, task: str, files: Iterable[Mapping[str, Any]], num_rows: int | None
) -> Rows:
    entries = {_base(entry): entry for entry in files}
    name = _stem(task)
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
    ids, labels, shas = arrays["id"], arrays["label"], arrays["record_sha"]
    columns = {field: values for field, values in arrays.items() if field not in _KEYS}
    return Rows(ids.tolist(), labels, [sha.decode() for sha in shas.tolist()], columns)


def _parquet(
    directory: str, name: str, keys: Mapping[str, Any], rows: Rows, model_id: str
) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def vectors(values: np.ndarray) -> pa.Array:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1), pa.float32())
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

    table = pa.table(
        {
            "id": pa.array(keys["id"], pa.string()),
            "label": pa.array(keys["label"], pa.int64()),
            "class": pa.array(keys["class"], pa.string()),
            "split": pa.array(keys["split"], pa.string()),
            **{
                field: vectors(values) if field in VECTORS else pa.array(values, pa.float32())
                for field, values in rows.columns.items()
            },
            "record_sha": pa.array(keys["record_sha"], pa.string()),
        }
    ).replace_schema_metadata({"model_id": model_id})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=_ROW_GROUP, write_page_checksum=True)
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
        if field not in _KEYS:
            column = table[field].combine_chunks()
            kind = column.type
            if isinstance(kind, pa.FixedSizeListType):
                fields[field] = column.flatten().to_numpy().reshape(-1, kind.list_size)
            else:
                fields[field] = column.to_numpy()
    shas = table["record_sha"].to_pylist()
    return Rows(table["id"].to_pylist(), table["label"].to_numpy(), shas, fields)


def _npy(
    directory: str, name: str, keys: Mapping[str, Any], rows: Rows, model_id: str
) -> Iterator[dict[str, Any]]:
    del model_id  # An .npy file has no metadata; the manifest has model_id.
    arrays = {
        "id": np.array(keys["id"], np.str_),
        "label": keys["label"],
        "class": np.array([name or "" for name in keys["class"]], np.str_),
        "split": np.array(keys["split"], np.str_),
        **rows.columns,
        "record_sha": np.array(keys["record_sha"], np.bytes_),
    }
    for column, values in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
        yield manifest_lib.write_file(directory, f"{name}.{column}.npy", buffer.getvalue())


def _tfrecord(
    directory: str, name: str, keys: Mapping[str, Any], rows: Rows, model_id: str
) -> Iterator[dict[str, Any]]:
    del model_id  # As in _npy.

    def serialized() -> Iterator[bytes]:
        for i, record_id in enumerate(keys["id"]):
            yield tf_example.encode_features(
                {
                    "id": record_id.encode(),
                    "label": int(keys["label"][i]),
                    "class": (keys["class"][i] or "").encode(),
                    "split": keys["split"][i].encode(),
                    **{field: np.atleast_1d(v[i]) for field, v in rows.columns.items()},
                    "record_sha": keys["record_sha"][i].encode(),
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
    fields = [name for name in names if name not in _KEYS]

    def column(field: str) -> np.ndarray:
        values = np.array([example[field] for example in examples], np.float32)
        return values if field in VECTORS else values[:, 0]

    return Rows(
        [example["id"].decode() for example in examples],
        np.array([example["label"] for example in examples], np.int64),
        [example["record_sha"].decode() for example in examples],
        {field: column(field) for field in fields},
    )
