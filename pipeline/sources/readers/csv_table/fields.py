"""The fields of a row: labels and pixels, written as integers, as decimals or in quotes."""

import csv
import re
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.sources.readers import arrays

INTEGER = re.compile(rb"\s*-?\d+\s*")
# Whole numbers are written as 5, 5.0 and 5.000e+00 too.
_DECIMAL = re.compile(rb"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_NUMBER = re.compile(rb'\s*"?[-+]?(\d*(\.\d*)?|(\d+\.?\d*|\.\d+)[eE][-+]?\d+)"?\s*')
_MISSING = (b"", b"na", b"n/a", b"nan", b"null", b"<na>")
_DECIMAL_BYTES = b"0123456789.eE+-,"


def split(line: bytes, separator: bytes) -> list[bytes]:
    """The fields of a line; a field in quotes may hold the separator."""
    fields = line.split(separator)
    if line.count(b'"') < 2 or line.count(b'"') % 2:
        return fields
    text = line.decode(errors="surrogateescape").strip("\r")
    try:
        texts = next(csv.reader([text], delimiter=separator.decode()))
    except csv.Error:
        return fields
    return [text.encode(errors="surrogateescape") for text in texts]


def is_word(field: bytes) -> bool:
    """Whether a field is neither a number nor empty."""
    return not _NUMBER.fullmatch(field)


def is_missing(field: bytes) -> bool:
    """Whether a field says that its value is missing, as R and pandas write it."""
    return unquoted(field).lower() in _MISSING


def is_name(field: bytes) -> bool:
    """Whether a label is a word that names a class."""
    return is_word(field) and not is_missing(field)


def label_of(field: bytes) -> int | None:
    """The whole number in a field, or None."""
    if INTEGER.fullmatch(field):
        label = int(field) if len(field) <= 20 else None
    else:
        label = whole_number(field)
    return label if label is not None and abs(label) <= arrays.MAX_LABEL else None


def name_of(field: bytes) -> str:
    """The name of the class in a field; 5.0 is class 5."""
    number = label_of(field)
    if number is not None:
        return str(number)
    return unquoted(field).decode(errors="surrogateescape")


def bad_label(field: bytes, classes: Mapping[str, int] | None = None) -> str:
    """What is wrong with a label; `classes` are those of the set if they are words."""
    expected = f"a whole number up to {arrays.MAX_LABEL}"
    return f"label {shown(field)}, expected {expected if classes is None else 'a class name'}"


def is_bad_label(field: bytes) -> bool:
    """Whether a label is empty or missing, or a number and none of a class."""
    return not is_name(field) and label_of(field) is None


def numbers(fields: Sequence[bytes]) -> list[float]:
    """The numbers in fields, of those that hold one."""
    return [float(text) for text in map(unquoted, fields) if _DECIMAL.fullmatch(text)]


def whole_number(field: bytes) -> int | None:
    """The whole number that is written as a decimal or in quotes, or None."""
    text = unquoted(field)
    number = float(text) if _DECIMAL.fullmatch(text) else 0.5
    return int(number) if number.is_integer() else None


def plain_pixels(fields: Sequence[bytes], line: bytes) -> bytes | None:
    """Pixels that are written as integers, or None."""
    try:
        plain = bytes(map(int, fields))
    except ValueError:
        return None
    # Python accepts them in integers; other programs do not.
    return None if b"_" in line or b"+" in line else plain


def pixels(fields: Sequence[bytes], line: bytes) -> bytes | None:
    """The pixels in fields of a line, or None if one of them is no whole number 0 to 255."""
    plain = plain_pixels(fields, line)
    if plain is not None:
        return plain
    texts = list(map(unquoted, fields))
    if b",".join(texts).translate(None, _DECIMAL_BYTES):
        return None
    try:
        values = np.array(list(map(float, texts)))
    except ValueError:
        return None
    is_whole = (values >= 0) & (values <= 255) & (values == np.floor(values))
    is_signed = any(text.startswith(b"+") for text in texts)
    return values.astype(np.uint8).tobytes() if is_whole.all() and not is_signed else None


def first_bad(fields: Sequence[bytes]) -> tuple[int, bytes]:
    """The first field that is no pixel, and its position."""
    for position, field in enumerate(fields):
        number = whole_number(field)
        if number is None or not 0 <= number <= 255:
            return position, field
    raise AssertionError(fields)


def unquoted(field: bytes) -> bytes:
    """A field without spaces and quotes around it."""
    text = field.strip()
    if len(text) > 1 and text[:1] == text[-1:] == b'"':
        return text[1:-1].replace(b'""', b'"').strip()
    return text


def shown(field: bytes) -> str:
    """The start of a field, for a message."""
    return repr(field[:24].decode(errors="replace").strip())
