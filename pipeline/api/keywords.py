"""The keywords of `preprocess` and `export`, which are the flags of the commands by the same names.

The flags take their defaults and their checks from here. `vae-preprocess --help` and
`vae-export --help` explain each of them.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from pipeline.api import rules
from pipeline.cli import flag_parsing
from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets.profile import measures
from pipeline.sources import conversion
from pipeline.stages import gate

_P = ParamSpec("_P")
_Keywords = TypeVar("_Keywords")
_Result = TypeVar("_Result")
Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSetKeywords(conversion.Conversion):
    """An image set that is not a data set yet, and how its records are placed."""

    labels: Any = "auto"  # auto, none, or the labels of arrays.
    name: str | None = None  # Of the data set; None: see create.resolve.
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
            rule = rules.RULES.get(field.name)
            if rule and (value is not None or field.default is not None):
                try:
                    value = rule.parse(value)
                except (ValueError, TypeError, AttributeError):
                    text = " ".join(f"{value}".split())
                    shown = text if len(text) < 100 else f"{text[:100]}…"
                    # Its cause has the value, which may be a signed URL.
                    raise UsageError(f"--{field.name}={shown}: {rule.expected}") from None
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
        if self.class_names and rules.is_data_set(self.class_names):
            values["class_names"] = _names_in(self.class_names[0][1:])
        return conversion.SourceSpec(source=source, **values)

    def path(self, name: str) -> str | None:
        """The value of a keyword that is a path or URL."""
        value: Path | None = getattr(self, name)
        return None if value is None else os.fspath(value)

    def required_path(self, name: str) -> str:
        """As `path`; raises a UsageError without a value."""
        path = self.path(name)
        if path is None:
            raise UsageError(f"--{name} is not set; expected a directory: name one")
        return path

    def changed_names(self, base: type) -> list[str]:
        """The keywords of `base` whose values differ from their defaults."""
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(base)}
        # Arrays have no single `!=`.
        return [n for n, (v, d) in values.items() if type(v) is not type(d) or v != d]


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
    require: str | None = None
    reference: Path | None = None

    def __post_init__(self) -> None:
        """As for all image sets; `images` of this stage are no word of a flag."""
        if isinstance(self.images, str):
            raise UsageError(f"images={self.images!r}: expected arrays; pass it as source")
        super().__post_init__()
        gate.check_names(gate.parse(self.require), measures.NAMES)


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
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:  # The constructor's would name its class.
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(keywords(*args, **kwargs))

        result = inspect.signature(function).return_annotation
        signature = inspect.signature(keywords).replace(return_annotation=result)
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate
