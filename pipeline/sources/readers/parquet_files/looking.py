"""What the values of columns tell that their names and types do not; looked at before the copy."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cli.errors import UsageError
from pipeline.sources.readers.parquet_files import column_types, label_column, reading
from pipeline.sources.readers.parquet_files.columns import Columns
from pipeline.sources.splits import UNSPLIT, in_order, split_named

# Fewer rows say nothing about a column, as in CSV files.
_LEAST_ROWS = 20
# A longer text is no name of a split.
_MAX_NAME_LENGTH = 100


def refuse_splits_in_rows(
    splits: Mapping[str, str], stamp_by_path: Mapping[str, str], columns: Columns
) -> None:
    """Refuses a column that states another split than the path of its file.

    Args:
      splits: full path -> the split that the path states.
      stamp_by_path: full path -> stamp of each file that is not known to have no such column.
      columns: the columns of the files.

    Raises:
      UsageError: there is such a column.
      StageError: a damaged file.
      SourceChanged: a file changed while it was read.
    """
    names = [name for name in columns.unread if name.lower() in label_column.SPLIT_NAMES]
    if not names:
        return
    for path, stamp in stamp_by_path.items():
        with reading.opened(path, stamp) as parquet:
            schema = parquet.schema_arrow
            for name in names:
                if name not in schema.names:
                    continue
                classes = column_types.names_of(column_types.features_of(schema).get(name, {}))
                values: dict[str, str | int] = {}  # Split -> the value that states the split.
                for batch in reading.batches(parquet, [name]):
                    for value, text in _texts(batch.column(name), classes):
                        values.setdefault(split_named(text[:_MAX_NAME_LENGTH]), value)
                values.pop(UNSPLIT, None)
                if values and set(values) != {splits[path]}:
                    _refuse_split(path, name, values)


def _texts(column: pa.Array, classes: list[str]) -> Iterator[tuple[str | int, str]]:
    """The distinct values of a column and their texts: numbers stand for classes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column_types.is_text(column.type):
        yield from ((text, text) for text in pc.unique(column.drop_null()).to_pylist())
    elif pa.types.is_integer(column.type) and classes:
        numbers = pc.unique(column.drop_null()).to_pylist()
        yield from ((n, classes[n]) for n in numbers if 0 <= n < len(classes))


def _refuse_split(path: str, name: str, values: Mapping[str, str | int]) -> None:
    first, *_ = splits = in_order(values)
    shown = ", ".join(repr(values[split]) for split in splits)
    shown += f" for {' and '.join(splits)}"
    raise UsageError(
        f"{path}: the column {name!r} holds {shown}, and splits are read from the names of files; "
        "expected one file for each split: "
        f"pq.write_table(pq.read_table({path!r}, filters=[({name!r}, '==', {values[first]!r})]), "
        f"'{first}.parquet') with pyarrow.parquet as pq, and so on; or, to ignore the column, "
        f"a file without it, pq.write_table(pq.read_table({path!r}).drop_columns([{name!r}]), "
        "OTHER_FILE)"
    )


def repeat(labels: Iterable[np.ndarray]) -> bool:
    """Whether the labels of a file, int64 (n,), hold one twice, which `refuse_distinct` accepts."""
    numbers = (of_file[of_file >= 0] for of_file in labels)
    return any(len(np.unique(of_file)) < len(of_file) for of_file in numbers)


def refuse_distinct(stamp_by_path: Mapping[str, str], columns: Columns, where: str) -> None:
    """Refuses labels that only their type makes labels, if each row has another one.

    Args:
      stamp_by_path: full path -> stamp.
      columns: the columns of the files.
      where: the source, for messages.

    Raises:
      UsageError: the column is rather an id or a time.
      StageError: a damaged file.
      SourceChanged: a file changed while it was read.
    """
    label = columns.label
    if label is None or not columns.is_left_over:
        return
    parts, num_values = [np.zeros(0, np.int64)], 0
    for path, stamp in stamp_by_path.items():
        with reading.opened(path, stamp) as parquet:
            if label not in parquet.schema_arrow.names:
                continue
            for batch in reading.batches(parquet, [label]):
                column = batch.column(label).drop_null()
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                part = np.unique(column.cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False))
                num_values += len(column)
                parts.append(part)
                if len(part) < len(column):
                    return
    if num_values >= _LEAST_ROWS and len(np.unique(np.concatenate(parts))) == num_values:
        raise UsageError(
            f"{where}: the column {label!r} differs in all {num_values:,} rows; expected labels, "
            f"which repeat: --label_column={label} takes the column all the same, --labels=none "
            "leaves the column out"
        )
