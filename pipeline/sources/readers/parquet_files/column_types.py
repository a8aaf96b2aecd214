"""Types of columns, and what the dataset hubs' metadata says of columns."""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

# UUIDs and digests, the longest of which has 64 bytes, are no image files.
_MOST_DIGEST_BYTES = 64


def storage(column_type: pa.DataType) -> pa.DataType:
    """The type under an extension type; another type as it is."""
    return getattr(column_type, "storage_type", column_type)


def is_list(column_type: pa.DataType) -> bool:
    """Whether values are lists."""
    types = pa.types
    return (
        types.is_list(column_type)
        or types.is_large_list(column_type)
        or types.is_fixed_size_list(column_type)
    )


def _is_long(column_type: pa.DataType) -> bool:
    is_fixed = pa.types.is_fixed_size_binary(column_type)
    return is_fixed and column_type.byte_width > _MOST_DIGEST_BYTES


def is_bytes(column_type: pa.DataType) -> bool:
    """Whether values are bytes that may be an image file."""
    types = pa.types
    return (
        types.is_binary(column_type)
        or types.is_large_binary(column_type)
        or _is_long(column_type)
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


def features_of(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Column -> its description in the hubs' metadata; {} if the metadata is missing or damaged."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: about for name, about in features.items() if isinstance(about, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def names_of(feature: Mapping[str, Any]) -> list[str]:
    """The class names of a ClassLabel; empty if the metadata has none."""
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    are_names = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    return names if are_names else []


def listed(fields: Mapping[str, pa.Field]) -> str:
    """Columns and their types for a message, the first few."""
    shown = [f"{name!r} ({str(field.type)[:60]})" for name, field in list(fields.items())[:8]]
    return ", ".join(shown) + (", …" if len(fields) > 8 else "") if fields else "no columns"
