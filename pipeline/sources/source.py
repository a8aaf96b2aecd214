"""What a source of records is: the protocol that all kinds follow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.cli.errors import SourceChanged

# Pixels (height × width) that an image file may have unless the user says otherwise: decoded, the
# largest takes 64 MB in Pillow.
MAX_IMAGE_PIXELS = 16_000_000


class Unreadable(NamedTuple):
    """Stands in the place of an image that cannot be had; its record goes to quarantine."""

    reason: str  # What was found and what was expected, without the place.


class OneByOne(Sequence):
    """Images that are made when they are asked for, and not kept."""

    def __init__(self, make: Callable[[int], np.ndarray | Unreadable], num_images: int):
        """Takes what makes the image at a place, and how many places there are."""
        self._make, self._num_images = make, num_images

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, place: int) -> np.ndarray | Unreadable:
        if not 0 <= place < self._num_images:
            raise IndexError(place)
        return self._make(place)

    def __iter__(self) -> Iterator[np.ndarray | Unreadable]:
        for place in range(self._num_images):
            yield self._make(place)  # By no name, which would keep it while the next is made.


def changed(path: str) -> SourceChanged:
    """The error for a file that is not as it was when the source was opened."""
    return SourceChanged(
        f"{path}: was changed while it was in use; expected the source to stay as it is until the "
        "job ends: run the same command again"
    )


class Source(Protocol):
    """An image set whose records are addressed by their index, 0 to the sum of `split_sizes`.

    A source may also have a method `listing() -> dict[str, str]`: the name of each file that it
    reads -> what a change of the file shows by, such as its size and time. It is taken anew at each
    call, and {} says nothing. Job and workers then refuse a source that has changed. A source that
    checks each file that it reads against its listing keeps that as `listed`.
    """

    image_shape: tuple[int, int, int]  # (H, W, C); of most images where they differ
    class_names: Sequence[str]  # name of label i at place i
    split_sizes: Mapping[str, int]  # records in each split, in the order of their indices

    def fingerprint(self) -> str:
        """Hex digest of all that the set holds, wherever it lies."""

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """The unique ids of the records at `indices`, UTF-8."""

    def where(self, index: int) -> str:
        """Where a record comes from, for a person: a file, and the place in it."""

    def read(self, indices: np.ndarray) -> tuple[Sequence[np.ndarray | Unreadable], np.ndarray]:
        """Reads the records at `indices`.

        Returns:
          images: n uint8 arrays (H, W, C), or one array (n, H, W, C); an Unreadable where an
            image or its label cannot be had. They are gone through once and in order, so where
            images may be large a OneByOne keeps no more than one in memory.
          labels: int64 (n,).
        """
