"""The protocol that every kind of source follows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.cli.errors import SourceChanged
from pipeline.formats.tf_example import UNLABELLED as UNLABELLED

# Default limit on the pixels (height × width) of an image file: decoded, the largest takes 64 MB in
# Pillow.
MAX_IMAGE_PIXELS = 16_000_000


class Unreadable(NamedTuple):
    """Takes the place of an unreadable image; its record goes to quarantine."""

    reason: str  # The value found and the expectation, without the location.


class OneByOne(Sequence):
    """Images that are made on access, one at a time, and not kept."""

    def __init__(self, make: Callable[[int], np.ndarray | Unreadable], num_images: int):
        """`make` returns the image at a position, 0 to num_images − 1."""
        self._make, self._num_images = make, num_images

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, position: int) -> np.ndarray | Unreadable:
        if not 0 <= position < self._num_images:
            raise IndexError(position)
        return self._make(position)

    def __iter__(self) -> Iterator[np.ndarray | Unreadable]:
        for position in range(self._num_images):
            # Not bound to a name, which would keep this image while the next one is made.
            yield self._make(position)


def changed(path: str) -> SourceChanged:
    """The error for a file that has changed since the source was opened."""
    return SourceChanged(
        f"{path}: was changed while it was in use; expected the source to stay unchanged until the "
        "job ends: run the same command again"
    )


class Source(Protocol):
    """An image set whose records are addressed by their index, 0 to the sum of `split_sizes`.

    A source may also have a method `listing() -> dict[str, str]`: the name of each file that it
    reads -> a stamp that differs when the file has changed, such as size and time. Each call takes
    new stamps; {} disables the check. Job and workers then refuse a source that has changed. A
    source that checks files while reading keeps the listing of its opening as `listed`.

    A source may have `notes`, a sequence of lines: what was found and what was decided in reading
    it. And `ignored`, a mapping: the ending of files that are not read, such as ".txt", -> how
    many there are.

    A source that knows in which file each record lies may have the three methods that
    memory.Recollection calls. Then records of unchanged files are not read again, though other
    files have changed.
    """

    image_shape: tuple[int, int, int]  # (H, W, C); the most frequent shape if shapes differ
    class_names: Sequence[str]  # class_names[i] is the name of label i; empty without labels
    split_sizes: Mapping[str, int]  # records in each split, in the order of their indices

    def fingerprint(self) -> str:
        """Hex digest of the set's contents; independent of its location."""

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """The unique ids of the records at `indices`, UTF-8."""

    def where(self, index: int) -> str:
        """The origin of a record for messages: a file, and the position in the file."""

    def read(self, indices: np.ndarray) -> tuple[Sequence[np.ndarray | Unreadable], np.ndarray]:
        """Reads the records at `indices`.

        Returns:
          images: n uint8 arrays (H, W, C), or one array (n, H, W, C); an Unreadable where an
            image or its label is unreadable. The caller iterates once and in order, so a OneByOne
            keeps no more than one large image in memory.
          labels: int64 (n,); UNLABELLED for a record without a label.
        """
