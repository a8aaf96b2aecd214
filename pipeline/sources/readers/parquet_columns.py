"""The columns of Parquet files: which hold images and labels, and what their values are.

Schemas decide which columns are read. Files of the dataset hubs describe their columns under the
key `huggingface` of the schema's metadata; of other files the types and names decide.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cli.errors import StageError, UsageError

# Names of columns that hold labels, and of columns that never do: ids, places, pandas' index, and
# what webdataset adds.
_LABEL_NAMES = ("label", "labels", "class", "target", "y", "cls")
_NO_LABEL_NAME = re.compile(r"|.*id|.*index.*|.*file_?name|file|.*path|.*url|width|height|__.*")
# Binary columns of webdataset that hold no image.
_NO_IMAGE_NAMES = ("json", "txt", "cls", "npy")
# Types of the hubs' metadata that may hold an image.
_IMAGE_FEATURES = ("Image", "Array2D", "Array3D", "Value", "Sequence", "List", "LargeList", None)
# A longer text is a caption and names no class.
_MAX_NAME_BYTES = 1_000
# More distinct texts are no classes.
_MAX_CLASSES = 65_536
# The label of a row whose number is not whole.
NOT_WHOLE = np.iinfo(np.int64).min
# The shape of a row without an image (its data is the reason), and of an image file.
_FAULT, _ENCODED = (-1, 0, 0), (0, 0, 0)


class Columns(NamedTuple):
    """The columns that are read."""

    image: str
    label: str | None
    class_names: list[str]  # From the schemas; empty if the labels have to tell.
    notes: list[str]


class Cells(NamedTuple):
    """The images in n rows of a column."""

    data: bytes | memoryview  # Of all rows, joined.
    lengths: np.ndarray  # (n,) int64, bytes of each row
    shapes: np.ndarray  # (n, 3) int32, (H, W, C) of pixels; see `is_fault` and `is_encoded`


def is_fault(shape: np.ndarray) -> bool:
    """Whether a row of `Cells.shapes` belongs to no image; its data is the reason."""
    return bool(shape[0] < 0)


def is_encoded(shape: np.ndarray) -> bool:
    """Whether a row of `Cells.shapes` belongs to the bytes of an image file."""
    return bool(shape[0] == 0)


def _storage(column_type: pa.DataType) -> pa.DataType:
    return getattr(column_type, "storage_type", column_type)


def _is_list(column_type: pa.DataType) -> bool:
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


def _is_text(column_type: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_string(column_type)
        or types.is_large_string(column_type)
        or types.is_string_view(column_type)
    )


def _image_rank(field: pa.Field, feature: Mapping[str, Any]) -> int | None:
    """How clearly a column holds images, 0 is best; None if it cannot."""
    if feature.get("_type") not in _IMAGE_FEATURES:
        return None
    column_type, described = _storage(field.type), feature.get("_type") in _IMAGE_FEATURES[:3]
    if pa.types.is_struct(column_type):
        index = column_type.get_field_index("bytes")
        if index < 0 or not _is_bytes(column_type.field(index).type):
            return None
        return 0 if described else 1
    if _is_bytes(column_type):
        return 0 if described else None if field.name.lower() in _NO_IMAGE_NAMES else 2
    depth = 0
    while _is_list(column_type):
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
    if _is_text(column_type):
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
    image = _find_image(fields, features, where)
    _check_image(image, schemas, features, where)
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
    if names:
        notes.append("the class names come from the metadata of the schema")
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
    features: Mapping[str, Mapping[str, Any]],
    where: str,
) -> None:
    """Checks that all files have the column of the images."""
    of_type: dict[int, tuple[str, pa.DataType]] = {}  # 1 for image files, 3 for pixels.
    for path, schema in schemas.items():
        field = schema.field(image) if image in schema.names else None
        if field is None or (rank := _image_rank(field, {})) is None:
            has = f"holds {_listed({f.name: f for f in schema})}" if field is None else field.type
            raise StageError(
                f"{where}: {path} {has if field is None else f'has {image!r} as {has}'}; expected "
                f"images in {image!r} as in {next(p for p in schemas if p != path)}: name the "
                "files that belong together, as parquet:DIR/NAME-*.parquet"
            )
        of_type.setdefault(3 if rank == 3 else 1, (path, field.type))
    if len(of_type) > 1:
        (path, column_type), (other, other_type) = of_type.values()
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
        if _label_kind(field.type) not in ("", "nulls") and not _NO_LABEL_NAME.fullmatch(name)
    ]
    candidates = described or named or others
    if len(candidates) < 2 and candidates != others:
        return (candidates[0] if candidates else None), ""
    if len(candidates) == 1:
        [name] = candidates
        if described or named:
            return name, ""
        if _label_kind(fields[name].type) == "numbers":
            return name, ", the only one that can"
    if not candidates:
        return None, ""
    shown = ", ".join(map(repr, candidates))
    raise UsageError(
        f"{where}: the columns {shown} may hold the labels; expected one: name it with "
        f"--label_column={candidates[0]}, or ignore labels with --labels=none"
        if len(candidates) > 1
        else f"{where}: the column {shown} holds texts, which may be classes or captions; say "
        f"which with --label_column={candidates[0]} or --labels=none"
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
        raise StageError(
            f"{where}: the metadata of {path} names {len(names)} classes, {names[:3]} …, and that "
            f"of {other} {len(other_names)}, {other_names[:3]} …; expected the same names in the "
            "same order: name the files that belong together, as parquet:DIR/NAME-*.parquet"
        )
    return list(next(iter(named), ()))


def label_numbers(column: pa.Array, numbers: dict[str, int]) -> np.ndarray:
    """The labels in a column as numbers.

    Args:
      column: (n,), whole numbers, booleans, texts or nulls.
      numbers: text -> its number; texts that are new are added.

    Returns:
      int64 (n,); -1 for a null, a NaN or an empty text, NOT_WHOLE for a fraction.

    Raises:
      ValueError: texts that name no classes, or a number beyond int64.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return np.full(len(column), -1, np.int64)
    if _is_text(column.type):
        encoded = column.cast(pa.large_string()).dictionary_encode()
        longest = pc.max(pc.binary_length(encoded.dictionary)).as_py() or 0
        if longest > _MAX_NAME_BYTES:
            raise ValueError(f"a label of {longest:,} bytes")
        texts = encoded.dictionary.to_pylist()
        own = [numbers.setdefault(text, len(numbers)) if text else -1 for text in texts]
        if len(numbers) > _MAX_CLASSES:
            raise ValueError(f"more than {_MAX_CLASSES:,} different labels")
        places = encoded.indices.fill_null(len(own)).to_numpy(zero_copy_only=False)
        return np.array([*own, -1], np.int64)[places]
    if pa.types.is_floating(column.type):
        values = column.to_numpy(zero_copy_only=False).astype(np.float64)
        is_whole = (np.abs(values) < 2**53) & (values == np.floor(values))
        labels = np.where(is_whole, np.where(is_whole, values, 0).astype(np.int64), NOT_WHOLE)
        return np.where(np.isnan(values), -1, labels)
    return column.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)


def cells(column: pa.Array, max_pixels: int, max_bytes: int) -> Cells:
    """The images in a column.

    Args:
      column: (n,), structs with bytes, bytes, or lists of whole numbers.
      max_pixels: limit on height × width of pixels in lists.
      max_bytes: limit on the bytes of an image file.
    """
    dims: list[int] = []
    if isinstance(column, pa.ExtensionArray):
        dims = list(getattr(column.type, "shape", ()))  # Arrow's fixed_shape_tensor.
        column = column.storage
    if _is_list(column.type):
        return _pixel_cells(column, dims, max_pixels)
    paths = None
    if pa.types.is_struct(column.type):
        if column.type.get_field_index("path") >= 0:
            paths = pc.struct_field(column, "path")
        column = pc.struct_field(column, "bytes")
    return _encoded_cells(column.cast(pa.large_binary()), paths, max_bytes)


def _encoded_cells(column: pa.Array, paths: pa.Array | None, max_bytes: int) -> Cells:
    """Image files as they are."""
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[column.offset :][: len(column) + 1]
    lengths, data = np.diff(offsets), memoryview(data or b"")
    shapes = np.full((len(column), 3), _ENCODED, np.int32)
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    faults = np.flatnonzero(is_null | (lengths > max_bytes)).tolist()
    if not faults:
        return Cells(data[offsets[0] : offsets[-1]], lengths, shapes)
    parts = [data[first:end] for first, end in zip(offsets, offsets[1:], strict=False)]
    for row in faults:
        path = paths[row].as_py() if paths is not None else None
        reason = f"{lengths[row]:,} bytes, expected at most {max_bytes:,}"
        if is_null[row]:
            reason = f"no image, only the path {path!r}" if path else "no image (null)"
            reason += ": write the bytes of the file into the table" if path else ""
        parts[row], shapes[row] = reason.encode(errors="backslashreplace"), _FAULT
    return Cells(b"".join(parts), np.array([len(part) for part in parts], np.int64), shapes)


def _pixel_cells(column: pa.Array, dims: list[int], max_pixels: int) -> Cells:
    """Pixels in lists: all rows at once if they have one shape, else row by row."""
    try:
        pixels = _stacked(column, dims, max_pixels)
    except ValueError as error:
        if len(column) > 1:
            rows = [_pixel_cells(column.slice(i, 1), dims, max_pixels) for i in range(len(column))]
            data, lengths, shapes = zip(*rows, strict=True)
            return Cells(b"".join(data), np.concatenate(lengths), np.concatenate(shapes))
        reason = str(error).encode()
        return Cells(reason, np.array([len(reason)]), np.array([_FAULT], np.int32))
    shapes = np.full((len(pixels), 3), pixels.shape[1:], np.int32)
    return Cells(pixels.tobytes(), np.full(len(pixels), math.prod(pixels.shape[1:])), shapes)


def _stacked(column: pa.Array, dims: list[int], max_pixels: int) -> np.ndarray:
    """The pixels in lists of lists.

    Args:
      column: (n,), n > 0.
      dims: the shape of flat lists, or [].
      max_pixels: limit on height × width.

    Returns:
      uint8 (n, H, W, C).

    Raises:
      ValueError: the lists differ in length, or are no image.
    """
    num_rows, shape = len(column), []
    while _is_list(column.type):
        if column.null_count:
            raise ValueError("no image (null)")
        if pa.types.is_fixed_size_list(column.type):
            shape.append(column.type.list_size)
        else:
            lengths = pc.min_max(pc.list_value_length(column)).as_py()
            if lengths["min"] != lengths["max"]:
                raise ValueError("rows of different lengths, expected a rectangle of pixels")
            shape.append(lengths["max"])
        if not shape[-1]:
            raise ValueError("a list without pixels")
        column = column.flatten()
    height, width, channels = _image_shape(dims or shape)
    if height * width > max_pixels:
        raise ValueError(
            f"{height}×{width} = {height * width:,} pixels, expected at most {max_pixels:,}: "
            "--max_image_pixels allows more"
        )
    if column.null_count:
        raise ValueError("a pixel that is null, expected whole numbers 0 to 255")
    values = column.to_numpy(zero_copy_only=False)
    if values.min() < 0 or values.max() > 255:
        raise ValueError(f"pixels {values.min()} to {values.max()}, expected 0 to 255")
    return values.astype(np.uint8, copy=False).reshape(num_rows, height, width, channels)


def _image_shape(dims: list[int]) -> tuple[int, int, int]:
    """The shape (H, W, C) of lists with these lengths; raises a ValueError for no image."""
    if len(dims) == 1:
        side, colour_side = math.isqrt(dims[0]), math.isqrt(dims[0] // 3)
        if side * side == dims[0]:
            return side, side, 1
        if 3 * colour_side * colour_side == dims[0]:
            s = colour_side
            raise ValueError(
                f"a flat list of {dims[0]} pixels, which may be 3×{s}×{s} or {s}×{s}×3; expected "
                f"lists of lists: x.reshape(3, {s}, {s}).transpose(1, 2, 0).tolist() or "
                f"x.reshape({s}, {s}, 3).tolist()"
            )
        raise ValueError(
            f"a flat list of {dims[0]} pixels, which is no square; expected lists of lists: "
            "x.reshape(HEIGHT, WIDTH).tolist()"
        )
    if len(dims) == 2:
        return dims[0], dims[1], 1
    if len(dims) == 3 and dims[2] in (1, 3):
        return dims[0], dims[1], dims[2]
    shape = "×".join(map(str, dims))
    raise ValueError(
        f"{shape} numbers, expected height×width×1 or ×3: channels that come first move with "
        "x.transpose(1, 2, 0).tolist()"
    )
