"""What the values of keywords and of flags have to be, and the form into which they are brought."""

import math
import numbers
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pipeline.cli import signed_urls
from pipeline.datasets import reader
from pipeline.embeddings import files as row_files
from pipeline.embeddings import rows
from pipeline.formats import tfrecord

_Value = TypeVar("_Value")
LABELS = ("auto", "none")
ON_CHANGED = ("fail", "keep", "replace")
IMAGES = ("sheets", "all", "none")
ALL = "all"  # In place of names of splits.
_DECIMAL = r"-?\d+(?:\.\d+)?(?:e[-+]?\d\d?)?"


class Rule(NamedTuple):
    """What a value has to be."""

    parse: Callable[[Any], Any]  # Raises a ValueError or a TypeError for any other value.
    expected: str

    def accepts(self, text: Any) -> bool:
        """Whether the value of a flag is right; None is no value."""
        try:
            return text is None or self.parse(text) is not None
        except (ValueError, TypeError):
            return False


def _right(value: _Value, is_right: object) -> _Value:
    """The value; raises a ValueError if it is not right."""
    if not is_right:
        raise ValueError(value)
    return value


def _one_of(choices: Sequence[str]) -> Rule:
    return Rule(lambda v: _right(v, v in choices), f"expected one of {', '.join(choices)}")


def _word(choices: Sequence[str]) -> Rule:
    """As `_one_of`, where arrays may stand, too."""
    return _one_of(choices)._replace(
        parse=lambda v: _right(v, not isinstance(v, str) or v in choices)
    )


def _whole(value: Any) -> int:
    """A whole number as an int; Python counts True among them, and manifests do not."""
    return _right(operator.index(value), not isinstance(value, bool))


def _from(least: int, most: float = float("inf")) -> Rule:
    return Rule(
        lambda v: _right(_whole(v), least <= _whole(v) <= most),
        f"expected a whole number of at least {least}",
    )


def _number(value: Any) -> float:
    return float(_right(value, isinstance(value, numbers.Real) and not isinstance(value, bool)))


def _size(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        value = map(int, _right(value, re.fullmatch(r"\d+x\d+", value)).split("x"))
    height, width = map(_whole, value)
    return _right((height, width), 0 < height < 10_000 and 0 < width < 10_000)


def _range(value: Any) -> tuple[float, float]:
    if isinstance(value, str):
        value = _right(value, re.fullmatch(f"{_DECIMAL},{_DECIMAL}", value)).split(",")
    low, high = map(float, value)
    return _right((low, high), -math.inf < low < high < math.inf)


def _colour(value: str) -> str:
    colour = {"white": "#ffffff", "black": "#000000"}.get(value, value)
    return _right(colour, re.fullmatch("#[0-9a-fA-F]{6}", colour)).lower()


def _num_shards(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    number = _whole(int(value) if isinstance(value, str) else value)
    return _right(number, 0 < number <= 99_999)


def _list(value: Any) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    return tuple(str(_right(item, isinstance(item, str))) for item in items)


def is_data_set(names: Sequence[str]) -> bool:
    """Whether a value of class_names is @DATA_DIR."""
    return len(names) == 1 and len(names[0]) > 1 and names[0].startswith("@")


def _class_names(value: Any) -> tuple[str, ...]:
    names = _list(value)
    are_names = len(set(names)) == len(names) > 0 and all(
        name and name.isprintable() and not name.startswith("@") for name in names
    )
    return _right(names, are_names or is_data_set(names))


def _split(value: Any) -> tuple[str, ...]:
    splits = _list(value)
    return _right(splits, splits == (ALL,) or (splits and {ALL, ""}.isdisjoint(splits)))


def _fields(value: Any) -> tuple[str, ...]:
    names = _list(value)
    return _right(names, len(set(names)) == len(names) > 0 and {*names} <= {*rows.FIELDS})


# Any text is true in Python, "false" too.
_TRUTH = Rule(lambda v: bool(_right(v, isinstance(v, bool | np.bool_))), "expected True or False")
_PATH = Rule(
    lambda v: _right(v, isinstance(v, str) and not signed_urls.is_signed(v)), signed_urls.EXPECTED
)
_TEXT = Rule(lambda v: _right(v, isinstance(v, str)), "expected text")
_TRUTHS = (
    *("grayscale", "rgb", "transpose", "append", "reread", "overwrite", "report", "fast_math"),
    *("allow_tiff", "allow_tfds_namespace"),
)
_PATHS = (
    *("output_dir", "model_dir", "data_dir", "run_dir", "latest", "reuse_from", "reference"),
    *("tfds_data_dir", "tfds_manual_dir"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_TRUTHS, _TRUTH),
    **dict.fromkeys(_PATHS, _PATH),
    **dict.fromkeys(("label_column", "require"), _TEXT),
    "validation_fraction": Rule(_number, "expected a number"),
    "name": Rule(
        # Of 255 bytes in a file name.
        lambda name: _right(name, name.isidentifier() and len(name.encode()) <= 100),
        "expected at most 100 bytes of letters, digits and underscores, the first not a digit",
    ),
    "id_prefix": Rule(
        lambda text: _right(text, text.isprintable() and len(text) <= 200),
        "expected at most 200 printable characters",
    ),
    "num_shards": Rule(_num_shards, "expected auto, or a number from 1 to 99999"),
    "image_size": Rule(_size, "expected HxW in pixels, such as 28x28, up to 9999x9999"),
    "background": Rule(
        _colour, "expected white, black or #rrggbb in hexadecimal digits, such as #ff8000"
    ),
    "pixel_range": Rule(
        _range, "expected LOW,HIGH, two numbers with LOW < HIGH, such as 0,1 or -1,1"
    ),
    "class_names": Rule(
        _class_names,
        "expected printable, distinct, non-empty names separated by commas, none of them with "
        "@ at its start; or @DATA_DIR alone",
    ),
    "split": Rule(
        _split, "expected names of splits separated by commas, such as train,test, or all"
    ),
    "fields": Rule(_fields, f"expected some of {', '.join(rows.FIELDS)}, none of them twice"),
    "labels": _word(LABELS),
    "compression": _one_of(tfrecord.COMPRESSIONS),
    "on_changed": _one_of(ON_CHANGED),
    "on_corrupt": _one_of(reader.ON_CORRUPT),
    "embedding_format": _one_of(row_files.FORMATS),
    "images": _word(IMAGES),
    "seed": _from(0, 2**63 - 1),
    "z_seed": _from(0),
    "class_level": _from(1),
    "max_image_pixels": _from(1),
}
# For flags: name -> (whether a value is right, what is expected).
CHECKS = {name: (rule.accepts, rule.expected) for name, rule in RULES.items()}
