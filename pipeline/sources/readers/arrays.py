"""Sources over arrays in memory or in files.

Files are read record by record and not memory-mapped: the touched pages of a mapped file count as
memory of the process, and a job's memory must not grow with the set.
"""

import concurrent.futures
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.sources.local_file import OpenFile
from pipeline.sources.splits import UNSPLIT
from pipeline.storage import stamps

# A higher label is not a class number; the column holds something else.
MAX_LABEL = 65_535
# Bytes of each part that is hashed separately; another size changes every fingerprint.
HASH_BYTES = 1 << 23
_HASH_THREADS = 4


class Rows(Protocol):
    """An array whose rows are read on access, such as a FileRows."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray: ...


class FileRows:
    """An array in an open local file; rows are read on access."""

    def __init__(
        self,
        file: OpenFile,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
    ):
        """Reads nothing yet.

        Args:
          file: stays open as long as this object.
          offset: byte at which the array begins.
          shape: the array's shape, in C order.
          dtype: the array's dtype.
        """
        self._file, self._offset, self.shape, self.dtype = file, offset, shape, dtype
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        size, offset = self._row_bytes, self._offset
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            data = self._file.read(offset + first * size, offset + last * size)
        else:
            data = self._file.read_each([offset + row * size for row in rows.tolist()], size)
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])

    def blocks(self, num_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, rows) for blocks of about `num_bytes` bytes."""
        step = max(1, num_bytes // max(1, self._row_bytes))
        for first in range(0, len(self), step):
            yield first, self[first : first + step]


def hash_rows(digest: "hashlib._Hash", array: np.ndarray | Rows) -> None:
    """Adds an array to a digest: the digests of its parts, which are hashed in parallel."""
    for part in part_digests(array):
        digest.update(part)


def part_digests(array: np.ndarray | Rows, first_part: int = 0) -> Iterator[bytes]:
    """The digests of the parts of an array, hashed in parallel.

    Args:
      array: of bytes.
      first_part: parts before this one are left out.
    """
    step = max(1, HASH_BYTES // max(1, math.prod(array.shape[1:])))

    def hash_part(first: int) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(array[first : first + step])).digest()

    with concurrent.futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
        yield from pool.map(hash_part, range(first_part * step, len(array), step))


def class_names_up_to(highest: int, where: str) -> list[str]:
    """The names of numbered classes, "0" to the highest label.

    Raises:
      StageError: the label is too high to be a class number.
    """
    if highest > MAX_LABEL:
        raise StageError(
            f"{where}: labels up to {highest}; expected class numbers 0 to {MAX_LABEL}: check "
            "that these are the labels"
        )
    return [str(label) for label in range(highest + 1)]


def check_pair(where: str, images: Any, labels: Any) -> None:
    """Checks the images and labels of a split by shape and dtype.

    Args:
      where: the set and the split, for messages.
      images: anything with a shape and a dtype.
      labels: the same.

    Raises:
      StageError: the images are not uint8 (n, H, W, C), or the labels are not n integers.
    """
    if len(images.shape) != 4 or images.dtype != np.uint8 or not math.prod(images.shape):
        raise StageError(
            f"{where} images are {images.dtype} {images.shape}; expected uint8 (n, H, W, C) "
            "with at least one image"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise StageError(
            f"{where} has {images.shape[0]} images and labels {labels.dtype} {labels.shape}; "
            "expected one integer for each image"
        )


class ArraySource:
    """A source over arrays in memory or in files."""

    def __init__(
        self,
        splits: Mapping[str, tuple[np.ndarray | Rows, np.ndarray]],
        *,
        name: str = "arrays",
        id_prefix: str = "",
        has_splits: bool = True,
        class_names: Sequence[str] | None = None,
        listed: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
        ignored: Mapping[str, int] | None = None,
    ):
        """Keeps the arrays without a copy.

        Args:
          splits: split -> (images uint8 (n, H, W, C), integer labels (n,)).
          name: name of the set in messages.
          id_prefix: start of every id, in place of the split's name.
          has_splits: False if the keys of `splits` name parts of a set without splits.
          class_names: names of labels 0, 1, …; None for the numbers 0 to the highest label.
          listed: path or URL of each file that the arrays come from -> its stamp
            (storage/stamps.py) before it was read; None to skip the check for changes.
          notes: see Source.
          ignored: see Source.

        Raises:
          StageError: an array of another shape or dtype, or image shapes that differ.
        """
        for split, (images, labels) in splits.items():
            check_pair(f"{name}: {split}", images, labels)
        shapes: dict[tuple[int, ...], str] = {}
        for split, (images, _) in splits.items():
            shapes.setdefault(images.shape[1:], split)
        if len(shapes) > 1:
            shown = ", ".join(f"{split} {shape}" for shape, split in shapes.items())
            raise StageError(
                f"{name}: image shapes differ between splits: {shown}; expected one shape"
            )
        self._splits, self._name = splits, name
        self.listed = dict(listed or {})
        self.notes, self.ignored = notes, dict(ignored or {})
        sizes = [len(labels) for _, labels in splits.values()]
        self.split_sizes = (
            dict(zip(splits, sizes, strict=True)) if has_splits else {UNSPLIT: sum(sizes)}
        )
        self.image_shape = next(iter(shapes))
        highest = max(int(labels.max()) for _, labels in splits.values())
        numbers = class_names_up_to(highest, name)
        self.class_names = numbers if class_names is None else list(class_names)
        # Numbers follow from the labels.
        self._names_in_digest = self.class_names if self.class_names != numbers else []
        self._prefixes = [
            (id_prefix or split).encode(errors="backslashreplace") for split in splits
        ]
        self._starts = np.cumsum([0, *sizes])

    def listing(self) -> dict[str, str]:
        """Path -> current stamp of each file."""
        return stamps.of_paths(self.listed)

    def fingerprint(self) -> str:
        """sha256 over shapes, pixels and labels of every split, and names that are no numbers."""
        digest = hashlib.sha256()
        for split, (images, labels) in self._splits.items():
            digest.update(f"{split} {images.shape};".encode(errors="backslashreplace"))
            hash_rows(digest, images)
            digest.update(labels.astype("<i8"))
        for class_name in self._names_in_digest:
            digest.update(f"class {class_name}\0".encode())
        return digest.hexdigest()

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """`<split>-<index in the split, 7 digits>`."""
        return number_ids(self._prefixes, self._starts, indices)

    def where(self, index: int) -> str:
        """The set's name, the split, and the index in the split."""
        number = np.searchsorted(self._starts, index, side="right") - 1
        return f"{self._name} {list(self._splits)[number]}[{index - self._starts[number]}]"

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies the records at `indices` out of the arrays."""
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int64)
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        for number, (split_images, split_labels) in enumerate(self._splits.values()):
            positions = np.flatnonzero(numbers == number)
            rows = indices[positions] - self._starts[number]
            images[positions] = split_images[rows]
            labels[positions] = split_labels[rows]
        return images, labels


def number_ids(prefixes: list[bytes], starts: np.ndarray, indices: np.ndarray) -> list[bytes]:
    """`<prefix>-<index in the split, 7 digits>` for each index.

    Args:
      prefixes: one for each split.
      starts: int64 (splits + 1,), the first index of each split, and the number of records.
      indices: int64 (n,).
    """
    numbers = np.searchsorted(starts, indices, side="right") - 1
    rows = indices - starts[numbers]
    return [
        b"%s-%07d" % (prefixes[number], row)
        for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)
    ]
