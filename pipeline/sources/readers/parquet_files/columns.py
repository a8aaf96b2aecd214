"""Which columns of Parquet files hold the images and the labels.

Schemas decide which columns are read. Files of the dataset hubs describe their columns under the
key `huggingface` of the schema's metadata; of other files the types and names decide.
"""

import itertools
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.cli.errors import StageError, UsageError

# Names of columns that hold labels, and of columns that never do: ids, places, pandas' index, and
# what webdataset adds.
_LABEL_NAMES = ("label", "labels", "class", "target", "y", "cls")
_NO_LABEL_NAME = re.compile(r"|.*id|.*index.*|.*file_?name|file|.*path|.*url|width|height|__.*")
# Binary columns of webdataset that hold no image.
_NO_IMAGE_NAMES = ("json", "txt", "cls", "npy")
# Types in the hubs' metadata that say that a column holds images, and that say nothing of it.
_IMAGE_FEATURES = ("Image", "Array2D", "Array3D")
_PLAIN_FEATURES = (None, "Value", "Sequence", "List", "LargeList")


class Columns(NamedTuple):
    """The columns that are read."""

    image: str
    label: str | None
    class_names: list[str]  # From the schemas; empty if the labels have to tell.
    notes: list[str]


def _storage(column_type: pa.DataType) -> pa.DataType:
    return getattr(column_type, "storage_type", column_type)


def is_list(column_type: pa.DataType) -> bool:
    """Whether values are lists."""
    types = pa.types
    return (
        types.is_list(column_type)
        or types.is_large_list(column_type)
        or types.is_fixed_size_list(column_type)
    )


def _is_bytes(column_type: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_binary(column_type)
        or types.is_large_binary(column_type)
        or types.is_fixed_size_binary(column_type)
        or types.is_binary_view(column_type)
    )


def is_text(column_type: pa.DataType) -> bool:
    """Whether values are texts."""
    types = pa.types
    return (
        types.is_string(column_type)
        or types.is_large_string(column_type)
        or types.is_string_view(column_type)
    )


def _image_rank(field: pa.Field, feature: Mapping[str, Any]) -> int | None:
    """How clearly a column holds images, 0 is best; None if it cannot."""
    described = feature.get("_type") in _IMAGE_FEATURES
    if not described and feature.get("_type") not in _PLAIN_FEATURES:
        return None
    column_type = _storage(field.type)
    if pa.types.is_struct(column_type):
        index = column_type.get_field_index("bytes")
        if index < 0 or not _is_bytes(column_type.field(index).type):
            return None
        return 0 if described else 1
    if _is_bytes(column_type):
        return 0 if described else None if field.name.lower() in _NO_IMAGE_NAMES else 2
    depth = 0
    while is_list(column_type):
        column_type, depth = column_type.value_type, depth + 1
    if 1 <= depth <= 3 and pa.types.is_integer(column_type):
        return 0 if described else 3
    return None


def _label_kind(column_type: pa.DataType) -> str:
    """What labels are: "numbers", "texts" or "nulls"; "" for a type that holds no labels."""
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    if pa.types.is_null(column_type):
        return "nulls"
    if is_text(column_type):
        return "texts"
    types = pa.types
    is_number = types.is_integer(column_type) or types.is_boolean(column_type)
    return "numbers" if is_number or types.is_floating(column_type) else ""


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Column -> its description in the hubs' metadata; {} if the metadata is missing or damaged."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: about for name, about in features.items() if isinstance(about, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _names_of(feature: Mapping[str, Any]) -> list[str]:
    """The class names of a ClassLabel; empty if the metadata has none."""
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    is_list = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    return names if is_list else []


def _listed(fields: Mapping[str, pa.Field]) -> str:
    """Columns and their types for a message, the first few."""
    shown = [f"{name!r} ({str(field.type)[:60]})" for name, field in list(fields.items())[:8]]
    return ", ".join(shown) + (", …" if len(fields) > 8 else "") if fields else "no columns"


def find(
    schemas: Mapping[str, pa.Schema], where: str, *, label_column: str | None, is_labelled: bool
) -> Columns:
    """Finds the columns of a set.

    Args:
      schemas: file -> its schema, at least one.
      where: the source, for messages.
      label_column: the requested column of labels; None to find the column.
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
        for name, feature in _features(schema).items():
            features.setdefault(name, feature)
    # A list of numbers that is named like labels is one of several labels.
    unnamed = {name: field for name, field in fields.items() if name.lower() not in _LABEL_NAMES}
    image = _find_image(unnamed or fields, features, where)
    _check_image(image, schemas, features.get(image, {}), where)
    about = features.get(image, {}).get("_type") or fields[image].type
    notes = [f"the column {image!r} holds the images ({str(about)[:60]})"]
    if not is_labelled:
        return Columns(image, None, [], notes)
    others = {name: field for name, field in fields.items() if name != image}
    label, reason = _find_label(others, features, where, label_column)
    if label is None:
        notes.append(f"no column holds labels{f'; of {_listed(others)}' if others else ''}")
        return Columns(image, None, [], notes)
    names = _check_label(label, schemas, where)
    notes.append(f"the column {label!r} holds the labels{reason}")
    if lacking := [path for path, schema in schemas.items() if label not in schema.names]:
        more = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
        notes.append(f"{lacking[0]}{more} has no column {label!r}: its records are unlabelled")
    return Columns(image, label, names, notes)


def _find_image(
    fields: Mapping[str, pa.Field], features: Mapping[str, Mapping[str, Any]], where: str
) -> str:
    """The column of the images."""
    ranks = {name: _image_rank(field, features.get(name, {})) for name, field in fields.items()}
    best = min((rank for rank in ranks.values() if rank is not None), default=None)
    candidates = [name for name, rank in ranks.items() if rank == best and rank is not None]
    if not candidates:
        raise StageError(
            f"{where}: holds {_listed(fields)}; expected a column of image files (binary, or a "
            "struct with bytes), or of whole numbers 0 to 255 in lists: floats in [0, 1] become "
            'such a column with table["image"] = [(255 * np.stack(x)).round().astype("uint8")'
            '.tolist() for x in table["image"]] in pandas'
        )
    if len(candidates) > 1:
        raise StageError(
            f"{where}: the columns {', '.join(map(repr, candidates))} may all hold the images; "
            "expected one: write each file without the others, "
            f"pq.write_table(pq.read_table(FILE).drop_columns({candidates[1:]}), OTHER_FILE) with "
            "pyarrow.parquet as pq"
        )
    return candidates[0]


def _check_image(
    image: str,
    schemas: Mapping[str, pa.Schema],
    feature: Mapping[str, Any],
    where: str,
) -> None:
    """Checks that all files have the column of the images."""
    types: dict[bool, tuple[str, pa.DataType]] = {}  # True for pixels, False for image files.

    def fits(schema: pa.Schema) -> bool:
        return image in schema.names and _image_rank(schema.field(image), feature) is not None

    for path, schema in schemas.items():
        if not fits(schema):
            field = schema.field(image) if image in schema.names else None
            columns = _listed({other.name: other for other in schema})
            has = f"holds {columns}" if field is None else f"has {image!r} as {field.type}"
            other = next(other for other, other_schema in schemas.items() if fits(other_schema))
            raise StageError(
                f"{where}: {path} {has}; expected images in {image!r} as in {other}: name the "
                "files that belong together, as parquet:DIR/NAME-*.parquet"
            )
        field = schema.field(image)
        types.setdefault(is_list(_storage(field.type)), (path, field.type))
    if len(types) > 1:
        (path, column_type), (other, other_type) = types.values()
        raise StageError(
            f"{where}: {image!r} is {column_type} in {path} and {other_type} in {other}; expected "
            "image files in all, or pixels in all: name the files that belong together, as "
            "parquet:DIR/NAME-*.parquet"
        )


def _find_label(
    fields: Mapping[str, pa.Field],
    features: Mapping[str, Mapping[str, Any]],
    where: str,
    requested: str | None,
) -> tuple[str | None, str]:
    """The column of the labels or None, and how it was chosen if that is not evident."""
    if requested is not None:
        if requested not in fields:
            raise UsageError(
                f"--label_column={requested}: {where} has {_listed(fields)} beside the images; "
                "expected the name of a column"
            )
        return requested, ""
    described = [name for name in fields if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in fields if name.lower() in _LABEL_NAMES]
    others = [
        name
        for name, field in fields.items()
        if _label_kind(field.type) not in ("", "nulls")
        and not _NO_LABEL_NAME.fullmatch(name.lower())
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


def _check_label(label: str, schemas: Mapping[str, pa.Schema], where: str) -> list[str]:
    """Checks that files agree on labels; returns the class names of their metadata."""
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
        if names := _names_of(_features(schema).get(label, {})):
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
