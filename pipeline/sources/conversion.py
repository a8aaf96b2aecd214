"""Converts a source's records: to one image shape, and to the data set's ids and labels.

A record that cannot be converted is a fault with a reason, and goes to quarantine.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline import sources
from pipeline.cli import signed_urls
from pipeline.cli.errors import SourceChanged, StageError, UsageError
from pipeline.sources import memory as memory_lib
from pipeline.sources.images import scaling
from pipeline.sources.opened_source import OpenedSource, open_source_once
from pipeline.sources.options import SourceOptions
from pipeline.sources.source import UNLABELLED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion(SourceOptions):
    """How a source is read, and how its records are converted."""

    image_size: tuple[int, int] | None = None  # (H, W) to scale to, after transposing.
    grayscale: bool = False
    rgb: bool = False
    transpose: bool = False
    id_prefix: str = ""
    class_names: Sequence[str] | None = None  # Replace the source's names.


@dataclasses.dataclass(frozen=True)
class SourceSpec(Conversion):
    """A source and its conversion: all that a worker needs to open the source."""

    source: str  # As in --source; the address of a signed URL.
    base_class_names: tuple[str, ...] | None = None  # Class names of the data set to append to.
    # Class names of the model to export by; a source without classes keeps having none.
    model_class_names: tuple[str, ...] | None = None
    memory: str | None = None  # Path or URL of what an earlier job found; see memory.py.
    # Set by the command, checked by its workers:
    image_shape: tuple[int, int, int] | None = None
    num_records: int | None = None
    source_hash: str | None = None  # Of the listed files; see opened_source.py.
    records_at_a_time: int = 1  # Read at once; bounds a worker's memory.
    # The source with its signed URL, for workers; "" without one.
    signed_source: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        """Moves what a signed URL holds beside its address out of `source`."""
        if signed_urls.is_signed(self.source):
            object.__setattr__(self, "signed_source", self.source)
            object.__setattr__(self, "source", signed_urls.address(self.source))


# Limits on what a worker reads at once: bytes of pixels, and records.
_BYTES_AT_A_TIME = 1 << 25
_RECORDS_AT_A_TIME = 4_096


class ConvertedRecords(NamedTuple):
    """The m converted records of a read, and the faults of the others."""

    places: np.ndarray  # (m,) int64, positions in the requested indices
    images: np.ndarray  # (m, H, W, C) uint8
    labels: np.ndarray  # (m,) int64
    faults: list[tuple[int, str]]  # (place, reason)


class ConvertedSource:
    """A source with the conversion of a `SourceSpec`."""

    def __init__(self, opened: OpenedSource, source_spec: SourceSpec):
        """Checks that the source and the conversion fit.

        Raises:
          UsageError: a conversion that does not apply to this source.
          StageError: no records, or a class name twice.
          SourceChanged: the source differs from the one that the command opened.
        """
        self._opened, self.source_spec = opened, source_spec
        self._source = source = opened.source
        self.split_sizes = dict(source.split_sizes)
        self.num_records = sum(self.split_sizes.values())
        self._notes: Sequence[str] = getattr(source, "notes", ())
        self.ignored: Mapping[str, int] = getattr(source, "ignored", {})
        if source_spec.num_records not in (None, self.num_records):
            raise SourceChanged(
                f"--source={source_spec.source}: holds {self.num_records} records now, and held "
                f"{source_spec.num_records} when the job began; expected the source to stay "
                "unchanged until the job ends: run the same command again"
            )
        if source_spec.source_hash not in (None, opened.hash):
            raise SourceChanged(
                f"--source={source_spec.source}: a worker finds other files, or other file times, "
                "than the command; expected the same files on every worker until the job ends: run "
                "the same command again"
            )
        self.is_labelled = source_spec.labels != "none"
        names = source_spec.class_names or tuple(source.class_names if self.is_labelled else ())
        self.source_class_names = list(names)  # In the order of the source's labels.
        self.num_source_classes = len(source.class_names)
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise StageError(
                f"--source={source_spec.source}: the class name {repeated!r} appears twice; "
                "expected distinct names: set them with --class_names"
            )
        if not self.num_records:
            raise StageError(
                f"--source={source_spec.source}: holds no records; expected at least one"
            )
        model_names = source_spec.model_class_names if names else None
        first_names = model_names or source_spec.base_class_names or ()
        self.class_names = list(dict.fromkeys([*first_names, *names]))
        # What labels outside of the source's classes move by, so that no class of the model is
        # taken for theirs. An append keeps them, or records of the set would differ from them.
        self._outside_by = len(self.class_names) - len(names) if model_names else 0
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self._labels = np.array([numbers[name] for name in names], np.int64)
        self.image_shape = source_spec.image_shape or self._converted_shape(source.image_shape)

    def _converted_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        height, width, channels = shape
        if self.source_spec.transpose:
            height, width = width, height
        if self.source_spec.image_size:
            height, width = self.source_spec.image_size
        if self.source_spec.grayscale:
            if channels not in (1, 3):
                raise UsageError(
                    f"--grayscale: the images have {channels} channels; expected RGB or grey ones"
                )
            channels = 1
        if self.source_spec.rgb:
            if channels not in (1, 3):
                raise UsageError(
                    f"--rgb: the images have {channels} channels; expected grey or RGB ones"
                )
            channels = 3
        return height, width, channels

    def for_workers(self) -> SourceSpec:
        """The SourceSpec by which workers open this source and check that it is unchanged."""
        num_bytes = max(1, math.prod(self._source.image_shape), math.prod(self.image_shape))
        return dataclasses.replace(
            self.source_spec,
            image_shape=self.image_shape,
            num_records=self.num_records,
            source_hash=self._opened.hash,
            class_names=tuple(self.source_class_names) or None,
            records_at_a_time=max(1, min(_RECORDS_AT_A_TIME, _BYTES_AT_A_TIME // num_bytes)),
        )

    @property
    def notes(self) -> list[str]:
        """What was decided in reading the source, without advice that was taken."""
        is_turned = self.source_spec.transpose
        return [note for note in self._notes if not (is_turned and "--transpose" in note)]

    def fingerprint(self) -> str:
        """The source's fingerprint, without the conversion."""
        return self._opened.recollection.fingerprint

    @property
    def has_a_file_per_record(self) -> bool:
        """Whether the source lists as many files as it has records, as a folder does."""
        return len(self._opened.listed) == self.num_records

    @property
    def is_unchanged(self) -> bool:
        """Whether the memory holds all files of the source with their stamps, and no others."""
        return self._opened.recollection.is_unchanged

    def memory_bytes(self, without: Sequence[int] = ()) -> bytes:
        """The memory of this opening, to be written when its records are in the data set.

        Args:
          without: records that the data set holds otherwise; they are not trusted later.
        """
        return self._opened.recollection.to_bytes(self._settings(), without)

    def _settings(self) -> dict[str, Any]:
        """All that determines a record beside the source; JSON."""
        spec, names = self.source_spec, self.source_class_names
        return {
            "image_shape": list(map(int, self.image_shape)),
            "image_size": spec.image_size and list(spec.image_size),
            "flags": [spec.grayscale, spec.rgb, spec.transpose, spec.id_prefix],
            "classes": [
                [name, names[label] if label < len(names) else label]
                for label, name in enumerate(self._source.class_names)
            ],
        }

    @functools.cached_property
    def _converts_as_before(self) -> bool:
        before, after = dict(self._opened.recollection.conversion), self._settings()
        classes = before.pop("classes", []), after.pop("classes")
        return before == after and memory_lib.same_names(*classes)

    def trusted(self, indices: np.ndarray) -> np.ndarray:
        """Whether each record is, but for its place, the one that an earlier job converted.

        True for a record of a file with the stamp of the memory, which is read and converted in
        the same way. False says nothing. A record that failed is trusted to fail again.

        Args:
          indices: int64 (n,).

        Returns:
          bool (n,); all False without a memory.
        """
        if not self._converts_as_before:
            return np.zeros(len(indices), bool)
        return self._opened.recollection.trusted(indices)

    def check_unchanged(self) -> None:
        """Raises SourceChanged if a file of the source has changed since it was opened."""
        self._opened.check_unchanged()

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """The records' ids, with the prefix."""
        ids = self._source.ids(indices)
        try:
            b"\n".join(ids).decode()
        except (TypeError, UnicodeDecodeError) as error:
            raise StageError(
                f"--source={self.source_spec.source}: ids are not UTF-8 bytes ({error}); encode "
                "them as UTF-8"
            ) from error
        prefix = self.source_spec.id_prefix.encode()
        return [prefix + record_id for record_id in ids] if prefix else ids

    def by_source_split(self, indices: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(split, its indices) for each split of the source that has any, in order."""
        ends = np.cumsum(list(self.split_sizes.values()))
        numbers = np.searchsorted(ends, indices, side="right")
        for number, split in enumerate(self.split_sizes):
            split_indices = indices[numbers == number]
            if split_indices.size:
                yield split, split_indices

    def where(self, index: int) -> str:
        """The origin of a record, for messages."""
        return self._source.where(index)

    def read(self, indices: np.ndarray) -> ConvertedRecords:
        """Reads and converts the records at `indices`."""
        images, labels = self._source.read(indices)
        labels = np.asarray(labels)
        if len(images) != len(indices) or labels.shape != (len(indices),):
            raise StageError(
                f"--source={self.source_spec.source}: returned {len(images)} images and labels "
                f"{labels.shape} for {len(indices)} indices; expected one image and one label for "
                "each index"
            )
        if len(labels) and labels.dtype.kind not in "iu":
            raise StageError(
                f"--source={self.source_spec.source}: returned labels of {labels.dtype}; expected "
                "integers"
            )
        labels = self._mapped(labels.astype(np.int64))
        if not self.is_labelled:
            labels = np.full_like(labels, UNLABELLED)
        uniform = isinstance(images, np.ndarray) and images.dtype == np.uint8
        if uniform and self.source_spec.transpose:
            images = images.swapaxes(1, 2)
        if uniform and images.shape[1:] == self.image_shape:
            return ConvertedRecords(np.arange(len(indices)), images, labels, [])
        converted = np.empty((len(indices), *self.image_shape), np.uint8)
        good, faults = [], []
        for place, image in enumerate(images):  # A OneByOne decodes here.
            if not isinstance(image, sources.Unreadable):
                image = self._converted(image, transposed=uniform)
            if isinstance(image, sources.Unreadable):
                faults.append((place, image.reason))
            else:
                converted[len(good)] = image
                good.append(place)
            del image  # Frees its memory before the next one is decoded.
        places = np.array(good, np.int64)
        return ConvertedRecords(places, converted[: len(good)], labels[places], faults)

    def _mapped(self, labels: np.ndarray) -> np.ndarray:
        """Labels in `class_names`; other labels have no class in an export."""
        if not len(self._labels):
            return labels
        has_class = (labels >= 0) & (labels < len(self._labels))
        outside = np.where(labels < 0, labels, labels + self._outside_by)
        return np.where(has_class, self._labels[np.where(has_class, labels, 0)], outside)

    def _converted(self, image: np.ndarray, *, transposed: bool) -> np.ndarray | sources.Unreadable:
        """One image in the data set's shape, or an Unreadable with the reason."""
        if not isinstance(image, np.ndarray):
            return sources.Unreadable(f"is a {type(image).__name__}, expected an array")
        if image.dtype != np.uint8 or image.ndim != 3 or not image.size:
            return sources.Unreadable(f"is {image.dtype} {image.shape}, expected uint8 (H, W, C)")
        if self.source_spec.transpose and not transposed:
            image = image.swapaxes(0, 1)
        if self.source_spec.grayscale and image.shape[2] == 3:
            image = scaling.grey(image)
        if self.source_spec.rgb and image.shape[2] == 1:
            image = np.repeat(image, 3, axis=2)
        size = self.source_spec.image_size
        if size and image.shape[:2] != size:
            image = scaling.resized(image, size)
        if image.shape != self.image_shape:
            hint = self._hint(image.shape)
            return sources.Unreadable(
                f"is {_shape_text(image.shape)}, expected {_shape_text(self.image_shape)}{hint}"
            )
        return image

    def _hint(self, shape: Sequence[int]) -> str:
        """The flag that would fix the shape."""
        if tuple(shape[:2]) != self.image_shape[:2]:
            return "; --image_size scales all images"
        if {shape[2], self.image_shape[2]} == {1, 3}:
            return "; --grayscale makes all images grey, --rgb makes all images RGB"
        return ""


def _shape_text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def open_converted(source_spec: SourceSpec) -> ConvertedSource:
    """Opens the source of a spec, and applies its conversion.

    Raises:
      UsageError: no such source, or a conversion that does not apply to it.
      StageError: the source cannot be read.
    """
    signed_urls.remember(source_spec.signed_source)
    arguments = source_spec.source, source_spec.options, source_spec.memory
    if source_spec.source_hash is None:  # A command opens the source as it is now.
        open_source_once.cache_clear()
    opened = open_source_once(*arguments)
    if source_spec.source_hash not in (None, opened.hash):  # Another job has left it open.
        open_source_once.cache_clear()
        opened = open_source_once(*arguments)
    return ConvertedSource(opened, source_spec)
