"""Which columns of Parquet files hold the images and the labels.

Schemas decide which columns are read. Files of the dataset hubs describe their columns under the
key `huggingface` of the schema's metadata; of other files the types and names decide.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.cli.errors import StageError
from pipeline.sources.readers.parquet_files import column_types, image_column, label_column

# Columns of a note.
_MAX_SHOWN = 20


class Columns(NamedTuple):
    """The columns that are read, and those that are not."""

    image: str
    label: str | None
    class_names: list[str]  # From the schemas; empty if the labels have to tell.
    unread: list[str]
    is_left_over: bool  # Nothing but its type says that `label` holds labels.
    notes: list[str]


def find(
    schemas: Mapping[str, pa.Schema], where: str, *, requested: str | None, is_labelled: bool
) -> Columns:
    """Finds the columns of a set.

    Args:
      schemas: file -> its schema, at least one.
      where: the source, for messages.
      requested: the requested column of labels; None to find the column.
      is_labelled: whether labels are read at all.

    Raises:
      UsageError: --label_column decides, or names no column.
      StageError: no column holds images, several may, or files contradict each other.
    """
    fields: dict[str, pa.Field] = {}
    features: dict[str, dict[str, Any]] = {}
    for path, schema in schemas.items():
        repeated = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if repeated is not None:
            raise StageError(
                f"{where}: {path} has two columns {repeated!r}; expected one of each name: write "
                "the file again without one of them"
            )
        # A column of nulls takes its type from the other files.
        for field in schema:
            if field.name not in fields or pa.types.is_null(fields[field.name].type):
                fields[field.name] = field
        for name, feature in column_types.features_of(schema).items():
            features.setdefault(name, feature)
    # A list of numbers that is named like labels is one of several labels.
    unnamed = {
        name: field for name, field in fields.items() if name.lower() not in label_column.NAMES
    }
    image = image_column.find(unnamed or fields, features, where)
    image_column.check(image, schemas, feature=features.get(image, {}), where=where)
    about = features.get(image, {}).get("_type") or fields[image].type
    notes = [f"the column {image!r} holds the images ({str(about)[:60]})"]
    others = {name: field for name, field in fields.items() if name != image}
    label, reason, names = None, "", []
    if is_labelled:
        label, reason = label_column.find(others, features, where, requested)
    unread = [name for name in others if name != label]
    if label is not None:
        names = label_column.check(label, schemas, where)
        notes.append(f"the column {label!r} holds the labels{reason}")
    elif is_labelled:
        of = f"; of {column_types.listed(others)}" if others else ""
        notes.append(f"no column holds labels{of}")
    if unread and (label is not None or not is_labelled):
        more = f", … ({len(unread):,} in all)" if len(unread) > _MAX_SHOWN else ""
        shown = ", ".join(map(repr, unread[:_MAX_SHOWN]))
        notes.append(f"columns that are not read: {shown}{more}")
    lacking = [path for path, schema in schemas.items() if label not in schema.names]
    if label is not None and lacking:
        more = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
        notes.append(f"{lacking[0]}{more} has no column {label!r}: its records are unlabelled")
    return Columns(
        image=image,
        label=label,
        class_names=names,
        unread=unread,
        is_left_over=bool(reason),
        notes=notes,
    )
