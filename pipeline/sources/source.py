"""What a source of records is: the protocol that all kinds follow."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pipeline import placement


class Unreadable(NamedTuple):
    """Stands in the place of an image that cannot be had; its record goes to quarantine."""

    reason: str  # What was found and what was expected, without the place.


class Source(Protocol):
    """An image set whose records are addressed by their index, 0 to the sum of `split_sizes`."""

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
            image or its label cannot be had.
          labels: int64 (n,).
        """


# A word in the name of a file or directory -> the split it says.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
    "t10k": "test",
}


def split_named(name: str) -> str:
    """The split that a file's or directory's name speaks of, or UNSPLIT if of none."""
    for word in re.findall(r"[a-z]+\d*[a-z]*", name.lower()):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return placement.UNSPLIT
