"""How the files of a source are read: the options of all kinds, and to which kinds each applies."""

import dataclasses
from typing import Any

from pipeline.cli.errors import UsageError
from pipeline.sources.source import MAX_IMAGE_PIXELS

# Option -> the kinds of --source that it applies to; an option that is not here applies to all.
_KINDS = {
    "tfds_data_dir": ("tfds",),
    "tfds_manual_dir": ("tfds",),
    "max_image_pixels": ("folder", "parquet", "tfds"),
    "allow_tiff": ("folder", "parquet"),
    "allow_tfds_namespace": ("tfds",),
    "background": ("folder", "parquet"),
    "class_level": ("folder",),
    "label_column": ("csv", "parquet"),
    "pixel_range": ("npz", "npy", "idx"),
}
# A kind that no command names -> the kind whose options it takes.
_LIKE = {"arrays": "npz"}
# These say where files are, and not what is read of them; or what may be read, and a source's
# fingerprint says what was read.
_NO_IDENTITY = ("tfds_data_dir", "tfds_manual_dir", "allow_tiff", "allow_tfds_namespace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The options by which a source is opened."""

    labels: str = "auto"  # "none" to ignore labels that are there.
    label_column: str | None = None  # Its name, "first" or "last"; None to find the column.
    class_level: int | None = None  # The first directories that name a class; None for one.
    background: str | None = None  # "#rrggbb" behind transparent pixels; None to refuse these.
    pixel_range: tuple[float, float] | None = None  # Values that become 0 and 255.
    max_image_pixels: int = MAX_IMAGE_PIXELS  # Limit on height × width of an image file.
    allow_tiff: bool = False  # Whether TIFFs are decoded.
    allow_tfds_namespace: bool = False  # Whether code of community sets may be loaded.
    tfds_data_dir: str | None = None  # Of prepared sets; None for the library's default.
    tfds_manual_dir: str | None = None  # Of original files, in place of a download.

    @property
    def options(self) -> "SourceOptions":
        """The options alone, of a subclass with further fields."""
        return SourceOptions(**{f.name: getattr(self, f.name) for f in _FIELDS})

    def changed(self) -> dict[str, Any]:
        """Option -> value, of the options that differ from their default."""
        values = {field.name: getattr(self, field.name) for field in _FIELDS}
        return {f.name: values[f.name] for f in _FIELDS if values[f.name] != f.default}

    def identity(self) -> dict[str, Any]:
        """The part of `changed` that determines records."""
        return {name: value for name, value in self.changed().items() if name not in _NO_IDENTITY}

    def check_apply(self, kind: str) -> None:
        """Raises a UsageError for an option that does not apply to a kind of source.

        Options apply to the kinds of this package: a user's function takes none of them.
        """
        for name, value in self.changed().items():
            kinds = _KINDS.get(name)
            if kinds is not None and _LIKE.get(kind, kind) not in kinds:
                shown = ",".join(f"{part:g}" for part in value) if name == "pixel_range" else value
                sources = " and ".join(f"{other}:…" for other in kinds)
                raise UsageError(
                    f"--{name}={shown}: applies to {sources} only, and the source is {kind}; "
                    "remove the flag"
                )


_FIELDS = dataclasses.fields(SourceOptions)

# Nothing set.
DEFAULTS = SourceOptions()
