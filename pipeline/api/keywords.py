"""The keywords of `preprocess` and `export`, which are the flags of the commands by the same names.

The flags take their defaults and their checks from here. `vae-preprocess --help` and
`vae-export --help` explain each of them.
"""

import dataclasses
import functools
import inspect
import operator
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

from pipeline.cli import flag_parsing
from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import reader
from pipeline.embeddings import files as row_files
from pipeline.embeddings import rows
from pipeline.formats import tfrecord
from pipeline.sources import conversion

_P = ParamSpec("_P")
_Keywords = TypeVar("_Keywords")
_Result = TypeVar("_Result")
Path = str | os.PathLike[str]

LABELS = ("auto", "none")
ON_CHANGED = ("fail", "keep", "replace")
IMAGES = ("sheets", "all", "none")
ALL = "all"  # In place of names of splits.
_DECIMAL = r"-?\d+(?:\.\d+)?(?:e[-+]?\d\d?)?"


class _Rule(NamedTuple):
    """What a value has to be."""

    parse: Callable[[Any], Any]  # Raises a ValueError or a TypeError for any other value.
    expected: str

    def accepts(self, text: Any) -> bool:
        """Whether the value of a flag is right; None is no value."""
        try:
            return text is None or self.parse(text) is not None
        except (ValueError, TypeError):
            return False


def _if(is_right: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """Returns a value that is right, and raises a ValueError for any other."""

    def parse(value: Any) -> Any:
        if not is_right(value):
            raise ValueError(value)
        return value

    return parse


def _one_of(choices: Sequence[str]) -> _Rule:
    return _Rule(_if(lambda value: value in choices), f"expected one of {', '.join(choices)}")


def _word(choices: Sequence[str]) -> _Rule:
    """As `_one_of`, where arrays may stand, too."""
    rule = _one_of(choices)
    return rule._replace(parse=_if(lambda v: not isinstance(v, str) or v in choices))


def _from(least: int, most: float = float("inf")) -> _Rule:
    return _Rule(
        _if(lambda value: least <= operator.index(value) <= most),
        f"expected a whole number of at least {least}",
    )


def _size(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        value = _if(re.compile(r"\d+x\d+").fullmatch)(value).split("x")
        value = map(int, value)
    height, width = map(operator.index, value)
    return _if(lambda size: all(0 < side < 10_000 for side in size))((height, width))


def _range(value: Any) -> tuple[float, float]:
    if isinstance(value, str):
        value = _if(re.compile(f"{_DECIMAL},{_DECIMAL}").fullmatch)(value).split(",")
    low, high = map(float, value)
    return _if(lambda limits: -float("inf") < limits[0] < limits[1] < float("inf"))((low, high))


def _colour(value: str) -> str:
    named = {"white": "#ffffff", "black": "#000000"}.get(value, value)
    return _if(re.compile("#[0-9a-fA-F]{6}").fullmatch)(named).lower()


def _num_shards(value: Any) -> int | str:
    if isinstance(value, str):
        value = value if value == "auto" or not value.isdecimal() else int(value)
    return value if value == "auto" else _if(lambda n: 0 < operator.index(n) <= 99_999)(value)


def _list(value: Any) -> tuple[str, ...]:
    return tuple(value.split(",") if isinstance(value, str) else value)


def _is_data_set(names: Sequence[str]) -> bool:
    """Whether a value of class_names is @DATA_DIR."""
    return len(names) == 1 and len(names[0]) > 1 and names[0].startswith("@")


def _class_names(value: Any) -> tuple[str, ...]:
    def is_right(names: tuple[str, ...]) -> bool:
        return _is_data_set(names) or (
            len(names) > 0
            and all(names)
            and len(set(names)) == len(names)
            and all(map(str.isprintable, names))
            and not any(name.startswith("@") for name in names)
        )

    return _if(is_right)(_list(value))


_RULES: dict[str, _Rule] = {
    "name": _Rule(
        # Of 255 bytes in a file name.
        _if(lambda name: name.isidentifier() and len(name.encode()) <= 100),
        "expected at most 100 bytes of letters, digits and underscores, the first not a digit",
    ),
    "id_prefix": _Rule(
        _if(lambda text: text.isprintable() and len(text) <= 200),
        "expected at most 200 printable characters",
    ),
    "num_shards": _Rule(_num_shards, "expected auto, or a number from 1 to 99999"),
    "image_size": _Rule(_size, "expected HxW in pixels, such as 28x28, up to 9999x9999"),
    "background": _Rule(
        _colour,
        "expected white, black or #rrggbb in hexadecimal digits, such as #ff8000",
    ),
    "pixel_range": _Rule(
        _range, "expected LOW,HIGH, two numbers with LOW < HIGH, such as 0,1 or -1,1"
    ),
    "class_names": _Rule(
        _class_names,
        "expected printable, distinct, non-empty names separated by commas, none of them with "
        "@ at its start; or @DATA_DIR alone",
    ),
    "split": _Rule(
        lambda value: _if(lambda s: s == (ALL,) or (s and {ALL, ""}.isdisjoint(s)))(_list(value)),
        "expected names of splits separated by commas, such as train,test, or all",
    ),
    "fields": _Rule(
        lambda value: _if(lambda f: len(set(f)) == len(f) > 0 and set(f) <= set(rows.FIELDS))(
            _list(value)
        ),
        f"expected some of {', '.join(rows.FIELDS)}, none of them twice",
    ),
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
CHECKS = {name: (rule.accepts, rule.expected) for name, rule in _RULES.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSetKeywords(conversion.Conversion):
    """An image set that is not a data set yet, and how its records are placed."""

    labels: Any = "auto"  # auto, none, or the labels of arrays.
    name: str = "mnist"  # Of the data set.
    num_shards: int | str = "auto"  # For each split.
    validation_fraction: float | None = None  # Share of train; None: see create.resolve.
    seed: int = 0  # For the order of the records.
    beam_args: Sequence[str] = ()  # Beam's options, as on a command line.

    def __post_init__(self) -> None:
        """Brings values into one form, such as image_size="28x28" into (28, 28).

        Raises:
          UsageError: a value that is not allowed.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if isinstance(value, str):
                value = flag_parsing.with_home(f"--{field.name}={value}").partition("=")[2]
                if not value and field.name.endswith("dir"):
                    raise UsageError(f"--{field.name}=: is empty; expected a directory: name one")
            rule = _RULES.get(field.name)
            if rule and (value is not None or field.default is not None):
                try:
                    value = rule.parse(value)
                except (ValueError, TypeError, AttributeError) as error:
                    raise UsageError(f"--{field.name}={value}: {rule.expected}") from error
            object.__setattr__(self, field.name, value)

    def source_spec(self, source: str) -> conversion.SourceSpec:
        """The source, with these conversions.

        Raises:
          UsageError: conversions that contradict each other.
          StageError: class_names=@DATA_DIR is no data set with classes.
        """
        if self.grayscale and self.rgb:
            raise UsageError("--grayscale --rgb: contradict each other; set one of them")
        if self.labels == "none" and self.class_names:
            raise UsageError(
                "--labels=none --class_names: no class is left to be named; remove one of them"
            )
        names = [field.name for field in dataclasses.fields(conversion.Conversion)]
        values = {name: getattr(self, name) for name in names}
        if self.class_names and _is_data_set(self.class_names):
            values["class_names"] = _names_in(self.class_names[0][1:])
        return conversion.SourceSpec(source=source, **values)

    def changed_names(self, base: type) -> list[str]:
        """The keywords of `base` whose values differ from their defaults."""
        fields = dataclasses.fields(base)
        return [f.name for f in fields if getattr(self, f.name) != f.default]


@dataclasses.dataclass(frozen=True)
class PreprocessKeywords(ImageSetKeywords):
    """The keywords of `preprocess`."""

    source: str | None = None  # As in --source.
    output_dir: Path | None = None  # Local or a URL.
    _: dataclasses.KW_ONLY
    images: Any = None  # In place of `source`; see `preprocess`.
    compression: str = "none"
    max_quarantined: str | int | float = "0.1%"
    append: bool = False
    on_changed: str = "fail"
    reread: bool = False
    overwrite: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportKeywords(ImageSetKeywords):
    """The keywords of `export`."""

    model_dir: Path | None = None
    output_dir: Path | None = None
    data_dir: Path | None = None
    source: Any = None  # As in --source, or arrays; see `export`.
    split: Sequence[str] | str | None = None
    run_dir: Path | None = None
    latest: Path | None = None
    reuse_from: Path | None = None
    fields: Sequence[str] | str = ("mean", "log_var", "reconstruction_loss", "kl")
    embedding_format: str = "parquet"
    images: str = "sheets"
    z_seed: int = 0
    require: str | None = None
    reference: Path | None = None
    report: bool = True
    overwrite: bool = False
    on_corrupt: str = "fail"
    fast_math: bool = False
    max_quarantined: str | int | float = "0.1%"


def _names_in(data_dir: str) -> tuple[str, ...]:
    from pipeline.stages import manifest as manifest_lib

    manifest = manifest_lib.read_manifest(data_dir, "preprocess", "--class_names")
    if not manifest["class_names"]:
        raise StageError(
            f"--class_names=@{data_dir}: the data set has no classes; expected a labelled one: "
            "name another data set, or the classes"
        )
    return tuple(manifest["class_names"])


def taking(
    keywords: Callable[_P, _Keywords],
) -> Callable[[Callable[[_Keywords], _Result]], Callable[_P, _Result]]:
    """Makes a function of one object into a function of that object's keywords."""

    def decorate(function: Callable[[_Keywords], _Result]) -> Callable[_P, _Result]:
        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _Result:
            return function(keywords(*args, **kwargs))

        result = inspect.signature(function).return_annotation
        signature = inspect.signature(keywords).replace(return_annotation=result)
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate
