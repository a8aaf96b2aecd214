"""Which column of Parquet files holds the images.

The hubs' metadata decides; without a description, image files are taken by their type, and pixels
in lists by their name, or by their type if no other column may hold images.
"""

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.cli.errors import StageError
from pipeline.sources.readers.parquet_files import column_types

# Binary columns of webdataset that hold no image.
_NO_IMAGE_NAMES = ("json", "txt", "cls", "npy")
# Names of lists that are pixels, but for what such names say about an image.
_PIXEL_NAME = re.compile(r"img|data|x|.*image.*|.*pixel.*")
_ABOUT_IMAGE = re.compile(r".*_(url|path|id|size|shape|hash)s?")
# Types in the hubs' metadata that say that a column holds images, and that say nothing of it.
_IMAGE_FEATURES = ("Image", "Array2D", "Array3D")
_PLAIN_FEATURES = (None, "Value", "Sequence", "List", "LargeList")
# Kinds of columns. Lists of lists may be pixels; a flat list may be anything, such as a box.
_DESCRIBED, _FILES, _PIXELS, _NESTED, _FLAT = "described", "files", "pixels", "nested", "flat"


def _kind(field: pa.Field, feature: Mapping[str, Any]) -> str | None:
    """How a column may hold images; None if it cannot."""
    described = feature.get("_type") in _IMAGE_FEATURES
    if not described and feature.get("_type") not in _PLAIN_FEATURES:
        return None
    name, column_type = field.name.lower(), column_types.storage(field.type)
    if pa.types.is_struct(column_type):
        index = column_type.get_field_index("bytes")
        if index < 0 or not column_types.is_bytes(column_type.field(index).type):
            return None
        return _DESCRIBED if described else _FILES
    if column_types.is_bytes(column_type):
        return _DESCRIBED if described else None if name in _NO_IMAGE_NAMES else _FILES
    depth = 0
    while column_types.is_list(column_type):
        column_type, depth = column_type.value_type, depth + 1
    if not 1 <= depth <= 3 or not pa.types.is_integer(column_type):
        return None
    if described:
        return _DESCRIBED
    if _PIXEL_NAME.fullmatch(name) and not _ABOUT_IMAGE.fullmatch(name):
        return _PIXELS
    dims = getattr(field.type, "shape", ())  # Of Arrow's fixed_shape_tensor.
    return _FLAT if max(depth, len(dims)) == 1 else _NESTED


def find(
    fields: Mapping[str, pa.Field], features: Mapping[str, Mapping[str, Any]], where: str
) -> str:
    """The column of the images.

    Args:
      fields: column -> its field.
      features: column -> its description in the metadata.
      where: the source, for messages.

    Raises:
      StageError: no column holds images, or several may.
    """
    kinds = {name: _kind(field, features.get(name, {})) for name, field in fields.items()}
    for taken in ((_DESCRIBED,), (_FILES, _PIXELS), (_NESTED,)):
        if candidates := [name for name, kind in kinds.items() if kind in taken]:
            break
    if not candidates:
        remedy = (
            "floats in [0, 1] become such a column with "
            'table["image"] = [(255 * np.stack(x)).round().astype("uint8").tolist() for x in '
            'table["image"]] in pandas'
        )
        if flat := next((name for name, kind in kinds.items() if kind == _FLAT), None):
            remedy = (
                f"nothing says that the numbers in {flat!r} are pixels; if they are, name the "
                f"column image, pq.write_table(pq.read_table(FILE).rename_columns({{{flat!r}: "
                "'image'}), OTHER_FILE) with pyarrow.parquet as pq"
            )
        raise StageError(
            f"{where}: holds {column_types.listed(fields)}; expected a column of image files "
            f"(binary, or a struct with bytes), or of whole numbers 0 to 255 in lists: {remedy}"
        )
    if len(candidates) > 1:
        raise StageError(
            f"{where}: the columns {', '.join(map(repr, candidates))} may all hold the images; "
            "expected one: write each file without the others, "
            f"pq.write_table(pq.read_table(FILE).drop_columns({candidates[1:]}), OTHER_FILE) with "
            "pyarrow.parquet as pq"
        )
    return candidates[0]


def check(
    image: str, schemas: Mapping[str, pa.Schema], *, feature: Mapping[str, Any], where: str
) -> None:
    """Checks that all files have the column of the images.

    Args:
      image: the column.
      schemas: file -> its schema.
      feature: the column's description in the metadata; {} if there is none.
      where: the source, for messages.

    Raises:
      StageError: a file lacks the column, or holds pixels where another one holds image files.
    """
    types: dict[bool, tuple[str, pa.DataType]] = {}  # True for pixels, False for image files.

    def fits(schema: pa.Schema) -> bool:
        return image in schema.names and _kind(schema.field(image), feature) not in (None, _FLAT)

    for path, schema in schemas.items():
        if not fits(schema):
            field = schema.field(image) if image in schema.names else None
            columns = column_types.listed({other.name: other for other in schema})
            has = f"holds {columns}" if field is None else f"has {image!r} as {field.type}"
            other = next(other for other, other_schema in schemas.items() if fits(other_schema))
            raise StageError(
                f"{where}: {path} {has}; expected images in {image!r} as in {other}: name the "
                "files that belong together, as parquet:DIR/NAME-*.parquet"
            )
        field = schema.field(image)
        types.setdefault(column_types.is_list(column_types.storage(field.type)), (path, field.type))
    if len(types) > 1:
        (path, column_type), (other, other_type) = types.values()
        raise StageError(
            f"{where}: {image!r} is {column_type} in {path} and {other_type} in {other}; expected "
            "image files in all, or pixels in all: name the files that belong together, as "
            "parquet:DIR/NAME-*.parquet"
        )
