"""A source's records made uniform: one image shape, ids and labels as the data set has them.

What cannot be made so is a fault of its record, with a reason, and goes to quarantine.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline import sources
from pipeline.cli.errors import SourceChanged, StageError, UsageError
from pipeline.sources.opened_source import OpenedSource, open_source_once


@dataclasses.dataclass(frozen=True)
class Reading:
    """What to read and how to convert it: all that a worker needs to open it."""

    spec: str  # The source, as in --source.
    image_size: tuple[int, int] | None = None  # (H, W) to scale to; after transposing.
    grayscale: bool = False
    transpose: bool = False
    id_prefix: str = ""
    class_names: tuple[str, ...] | None = None  # In place of the source's own.
    numbered_as: tuple[str, ...] | None = None  # Class names whose order gives the labels.
    tfds_data_dir: str | None = None
    tfds_manual_dir: str | None = None
    max_image_pixels: int = sources.MAX_IMAGE_PIXELS  # Of an image file, height × width.
    # What the command found and its workers are to expect:
    image_shape: tuple[int, int, int] | None = None
    num_records: int | None = None
    source_hash: str | None = None  # Of its files as they were listed; see opened_source.py.
    records_at_a_time: int = 1  # Read at once; bounds what a worker holds.


# Pixels of a source's images that a worker holds at a time, and the records at most.
_BYTES_AT_A_TIME = 1 << 25
_RECORDS_AT_A_TIME = 4_096


class Records(NamedTuple):
    """Some records: the m that are good, and why the others are not."""

    places: np.ndarray  # (m,) int64, which of the records asked for these are
    images: np.ndarray  # (m, H, W, C) uint8
    labels: np.ndarray  # (m,) int64
    faults: list[tuple[int, str]]  # (place, reason)


class ConvertedSource:
    """A source with the conversions of a `Reading`."""

    def __init__(self, opened: OpenedSource, reading: Reading):
        """Takes the source as it is opened.

        Raises:
          UsageError: a conversion that this source cannot have.
          StageError: the source is not the one that the command saw.
        """
        self._opened, self.reading = opened, reading
        self._source = source = opened.source
        self.split_sizes = dict(source.split_sizes)
        self.num_records = sum(self.split_sizes.values())
        if reading.num_records not in (None, self.num_records):
            raise SourceChanged(
                f"--source={reading.spec}: holds {self.num_records} records now, and held "
                f"{reading.num_records} when the job began; expected it to stay as it is: run the "
                "same command again"
            )
        if reading.source_hash not in (None, opened.hash):
            raise SourceChanged(
                f"--source={reading.spec}: a worker finds other files, or files of other times, "
                "than the command did; expected the same on every worker until the job ends: run "
                "the same command again"
            )
        names = reading.class_names or tuple(source.class_names)
        self.own_class_names = list(names)  # As the source numbers them.
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise StageError(
                f"--source={reading.spec}: the class name {twice!r} stands twice; expected a name "
                "for each class: give others with --class_names"
            )
        if not self.num_records:
            raise StageError(f"--source={reading.spec}: holds no records; expected at least one")
        self.class_names = list(dict.fromkeys([*(reading.numbered_as or ()), *names]))
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self._labels = np.array([numbers[name] for name in names], np.int64)
        self.image_shape = reading.image_shape or self._shape_made(source.image_shape)

    def _shape_made(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        height, width, channels = shape
        if self.reading.transpose:
            height, width = width, height
        if self.reading.image_size:
            height, width = self.reading.image_size
        if self.reading.grayscale:
            if channels not in (1, 3):
                raise UsageError(
                    f"--grayscale: the images have {channels} channels; expected RGB or grey ones"
                )
            channels = 1
        return height, width, channels

    def for_workers(self) -> Reading:
        """The reading by which workers open this source, and find it as it is here."""
        num_bytes = max(1, math.prod(self._source.image_shape), math.prod(self.image_shape))
        return dataclasses.replace(
            self.reading,
            image_shape=self.image_shape,
            num_records=self.num_records,
            source_hash=self._opened.hash,
            class_names=self.reading.class_names or tuple(self._source.class_names),
            records_at_a_time=max(1, min(_RECORDS_AT_A_TIME, _BYTES_AT_A_TIME // num_bytes)),
        )

    def fingerprint(self) -> str:
        """The source's; conversions are settings of the job."""
        return self._source.fingerprint()

    def check_unchanged(self) -> None:
        """Raises SourceChanged if the source's files are not as when it was opened."""
        self._opened.check_unchanged()

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """The records' ids, with the prefix."""
        ids = self._source.ids(indices)
        try:
            b"\n".join(ids).decode()
        except (TypeError, UnicodeDecodeError) as error:
            raise StageError(
                f"--source={self.reading.spec}: ids that are no UTF-8 bytes ({error}); expected "
                "such: encode them"
            ) from error
        prefix = self.reading.id_prefix.encode()
        return [prefix + record_id for record_id in ids] if prefix else ids

    def by_source_split(self, indices: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Indices by the source's split, in order; the splits that none is of are left out."""
        ends = np.cumsum(list(self.split_sizes.values()))
        numbers = np.searchsorted(ends, indices, side="right")
        for number, split in enumerate(self.split_sizes):
            here = indices[numbers == number]
            if here.size:
                yield split, here

    def where(self, index: int) -> str:
        """Where a record comes from."""
        return self._source.where(index)

    def read(self, indices: np.ndarray) -> Records:
        """Reads and converts the records at `indices`."""
        images, labels = self._source.read(indices)
        labels = np.asarray(labels)
        if len(images) != len(indices) or labels.shape != (len(indices),):
            raise StageError(
                f"--source={self.reading.spec}: gave {len(images)} images and labels "
                f"{labels.shape} for {len(indices)} indices; expected one of each for each"
            )
        if len(labels) and labels.dtype.kind not in "iu":
            raise StageError(
                f"--source={self.reading.spec}: gave labels of {labels.dtype}; expected whole "
                "numbers"
            )
        labels = self._renumbered(labels.astype(np.int64))
        uniform = isinstance(images, np.ndarray) and images.dtype == np.uint8
        if uniform and self.reading.transpose:
            images = images.swapaxes(1, 2)
        if uniform and images.shape[1:] == self.image_shape:
            return Records(np.arange(len(indices)), images, labels, [])
        converted = np.empty((len(indices), *self.image_shape), np.uint8)
        good, faults = [], []
        for place, image in enumerate(images):  # Here a OneByOne decodes them.
            if not isinstance(image, sources.Unreadable):
                image = self._converted(image, transposed=uniform)
            if isinstance(image, sources.Unreadable):
                faults.append((place, image.reason))
            else:
                converted[len(good)] = image
                good.append(place)
            del image  # Before the next is decoded.
        places = np.array(good, np.int64)
        return Records(places, converted[: len(good)], labels[places], faults)

    def _renumbered(self, labels: np.ndarray) -> np.ndarray:
        """Labels by the data set's class list; those outside the source's stay."""
        if not len(self._labels):
            return labels
        known = (labels >= 0) & (labels < len(self._labels))
        return np.where(known, self._labels[np.where(known, labels, 0)], labels)

    def _converted(self, image: np.ndarray, *, transposed: bool) -> np.ndarray | sources.Unreadable:
        """One image in the shape of all, as far as the conversions asked for go."""
        if not isinstance(image, np.ndarray):
            return sources.Unreadable(f"is a {type(image).__name__}, expected an array")
        if image.dtype != np.uint8 or image.ndim != 3 or not image.size:
            return sources.Unreadable(f"is {image.dtype} {image.shape}, expected uint8 (H, W, C)")
        if self.reading.transpose and not transposed:
            image = image.swapaxes(0, 1)
        if self.reading.grayscale and image.shape[2] == 3:
            image = _through_pillow(image, lambda picture: picture.convert("L"))
        size = self.reading.image_size
        if size and image.shape[:2] != size:
            image = _resized(image, size)
        if image.shape != self.image_shape:
            hint = self._hint(image.shape)
            return sources.Unreadable(
                f"is {_shape_text(image.shape)}, expected {_shape_text(self.image_shape)}{hint}"
            )
        return image

    def _hint(self, shape: Sequence[int]) -> str:
        """Which flag would make the shape the right one."""
        if tuple(shape[:2]) != self.image_shape[:2]:
            return "; --image_size scales all images"
        return "; --grayscale makes all images grey" if 3 in (shape[2], self.image_shape[2]) else ""


def _shape_text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _through_pillow(image: np.ndarray, change) -> np.ndarray:
    """An image (H, W, 1) or (H, W, 3) changed by a function of Pillow images."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))
    changed = np.asarray(change(picture))
    return changed[..., np.newaxis] if changed.ndim == 2 else changed


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scales an image of any channels to (H, W): bilinear, antialiased, in whole numbers."""
    from PIL import Image

    def scale(picture: Image.Image) -> Image.Image:
        return picture.resize(size[::-1], Image.Resampling.BILINEAR)

    if image.shape[2] in (1, 3):
        return _through_pillow(image, scale)
    channels = [_through_pillow(image[..., i : i + 1], scale) for i in range(image.shape[2])]
    return np.concatenate(channels, axis=2)


def open_reading(reading: Reading) -> ConvertedSource:
    """Opens what a reading names.

    Raises:
      UsageError: no such source, or a conversion that it cannot have.
      StageError: the source cannot be read.
    """
    source = reading.spec, reading.tfds_data_dir, reading.tfds_manual_dir, reading.max_image_pixels
    if reading.source_hash is None:  # A command's: it sees the source as it is now.
        open_source_once.cache_clear()
    opened = open_source_once(*source)
    if reading.source_hash not in (None, opened.hash):  # Left open by another job.
        open_source_once.cache_clear()
        opened = open_source_once(*source)
    return ConvertedSource(opened, reading)
