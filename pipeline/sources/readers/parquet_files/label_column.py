"""Which column of Parquet files holds the labels: requested, described, named, or left over."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources.readers.parquet_files import column_types

# Names of columns that hold labels, and that state the split of a row.
NAMES = ("label", "labels", "class", "target", "y", "cls")
SPLIT_NAMES = ("split", "subset", "fold", "partition")
# Names of columns that hold neither: ids, places, pandas' index, and what webdataset adds.
_NO_LABEL_NAME = re.compile(r"|.*id|.*index.*|.*file_?name|file|.*path|.*url|width|height|__.*")


def _label_kind(column_type: pa.DataType) -> str:
    """What labels are: "numbers", "texts" or "nulls"; "" for a type that holds no labels."""
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    if pa.types.is_null(column_type):
        return "nulls"
    if column_types.is_text(column_type):
        return "texts"
    types = pa.types
    is_number = types.is_integer(column_type) or types.is_boolean(column_type)
    return "numbers" if is_number or types.is_floating(column_type) else ""


def find(
    fields: Mapping[str, pa.Field],
    features: Mapping[str, Mapping[str, Any]],
    where: str,
    requested: str | None,
) -> tuple[str | None, str]:
    """Finds the column of the labels.

    Args:
      fields: column -> its field, without the images.
      features: column -> its description in the metadata.
      where: the source, for messages.
      requested: see SourceOptions.label_column.

    Returns:
      The column or None.
      How the column was chosen if nothing but its type says that it holds labels, else "".

    Raises:
      UsageError: --label_column has to decide, or names no column.
    """
    if requested is not None:
        if requested not in fields:
            raise UsageError(
                f"--label_column={requested}: {where} has {column_types.listed(fields)} beside the "
                "images; expected the name of a column"
            )
        return requested, ""
    described = [
        name
        for name in fields
        if features.get(name, {}).get("_type") == "ClassLabel" and name.lower() not in SPLIT_NAMES
    ]
    named = [name for name in fields if name.lower() in NAMES]
    others = [
        name
        for name, field in fields.items()
        if _label_kind(field.type) not in ("", "nulls")
        and not _NO_LABEL_NAME.fullmatch(name.lower())
        and name.lower() not in SPLIT_NAMES
    ]
    candidates = described or named or others
    if not candidates:
        return None, ""
    first, decide = candidates[0], f"--label_column={candidates[0]} or --labels=none"
    if len(candidates) > 1:
        raise UsageError(
            f"{where}: the columns {', '.join(map(repr, candidates))} may hold the labels; "
            f"expected one: say which with {decide}"
        )
    if described or named:
        return first, ""
    column_type = fields[first].type
    if pa.types.is_integer(column_type) or pa.types.is_boolean(column_type):
        return first, ", the only one that can"
    raise UsageError(
        f"{where}: the column {first!r} is {column_type}, and may hold classes or something else, "
        f"such as captions; say which with {decide}"
    )


def check(label: str, schemas: Mapping[str, pa.Schema], where: str) -> list[str]:
    """Checks that files agree on labels.

    Args:
      label: the column.
      schemas: file -> its schema.
      where: the source, for messages.

    Returns:
      The class names of the metadata; empty if there are none.

    Raises:
      StageError: a type that holds no labels, or files that contradict each other.
    """
    kinds: dict[str, str] = {}
    named: dict[tuple[str, ...], str] = {}
    for path, schema in schemas.items():
        if label not in schema.names:
            continue
        column_type = schema.field(label).type
        kind = _label_kind(column_type)
        if not kind:
            raise StageError(
                f"{where}: {label!r} is {str(column_type)[:60]} in {path}; expected a whole number "
                "or a text in each row: name another column with --label_column, or ignore labels "
                "with --labels=none"
            )
        if kind != "nulls":
            kinds.setdefault(kind, path)
        if names := column_types.names_of(column_types.features_of(schema).get(label, {})):
            named.setdefault(tuple(names), path)
    if len(kinds) > 1:
        texts = " and ".join(f"{kind} in {path}" for kind, path in kinds.items())
        raise StageError(
            f"{where}: {label!r} holds {texts}; expected one of both: name the files that belong "
            "together, as parquet:DIR/NAME-*.parquet, or ignore labels with --labels=none"
        )
    if len(named) > 1:
        (names, path), (other_names, other) = list(named.items())[:2]
        pairs = itertools.zip_longest(names, other_names, fillvalue="missing")
        number, pair = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise StageError(
            f"{where}: class {number} is {pair[0]} by the metadata of {path}, and {pair[1]} by "
            f"that of {other}; expected the same names in the same order: name the files that "
            "belong together, as parquet:DIR/NAME-*.parquet"
        )
    return list(next(iter(named), ()))
