"""Image sets as random-access sources of records: `sample` and `idx:DIR`.

A source is anything with the members of `Source`. To add one, write a function
that opens it and name that function in `_OPENERS`; a set that can be had as
arrays needs no more than `ArraySource`.
"""

import functools
import gzip
import hashlib
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from pipeline import placement, storage
from pipeline.errors import StageError, UsageError

_IDX_DTYPE_UINT8 = 0x08
# File name prefix in the IDX layout of MNIST and its kin -> split.
_IDX_PREFIXES = {"train": "train", "t10k": "test"}


class Source(Protocol):
    """An image set whose records are addressed by their index, 0 to the sum of `split_sizes`."""

    image_shape: tuple[int, int, int]  # (H, W, C)
    class_names: Sequence[str]  # name of label i at place i
    split_sizes: Mapping[str, int]  # records in each split, in the order of their indices

    def fingerprint(self) -> str:
        """Hex digest of all that the set holds, wherever it lies."""

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """The unique ids of the records at `indices`."""

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (n, H, W, C) and labels int64 (n,) at `indices`."""


class ArraySource:
    """A source over arrays in memory or mapped from files."""

    def __init__(self, splits: Mapping[str, tuple[np.ndarray, np.ndarray]], id_prefix: str = ""):
        """Takes the arrays as they are.

        Args:
          splits: split -> (images uint8 (n, H, W, C), labels (n,)); the shapes H×W×C agree.
          id_prefix: what ids begin with in place of the split's name.
        """
        self._splits = splits
        self.split_sizes = {split: len(labels) for split, (_, labels) in splits.items()}
        self.image_shape = next(iter(splits.values()))[0].shape[1:]
        num_classes = 1 + max(int(labels.max()) for _, labels in splits.values())
        self.class_names = [str(label) for label in range(num_classes)]
        self._prefixes = [(id_prefix or split).encode() for split in splits]
        self._starts = np.cumsum([0, *self.split_sizes.values()])

    def fingerprint(self) -> str:
        """sha256 over shapes, pixels and labels of every split."""
        digest = hashlib.sha256()
        for split, (images, labels) in self._splits.items():
            digest.update(f"{split} {images.shape} {images.dtype} {labels.dtype};".encode())
            digest.update(np.ascontiguousarray(images))
            digest.update(np.ascontiguousarray(labels))
        return digest.hexdigest()

    def _split_numbers(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, indices, side="right") - 1

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """`<split>-<index in the split, 7 digits>`."""
        numbers = self._split_numbers(indices)
        places = indices - self._starts[numbers]
        return [
            b"%s-%07d" % (self._prefixes[number], place)
            for number, place in zip(numbers.tolist(), places.tolist(), strict=True)
        ]

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies the records at `indices` out of the arrays."""
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int64)
        numbers = self._split_numbers(indices)
        for number, (split_images, split_labels) in enumerate(self._splits.values()):
            here = np.flatnonzero(numbers == number)
            places = indices[here] - self._starts[number]
            images[here] = split_images[places]
            labels[here] = split_labels[places]
        return images, labels


def _unzipped(path: str) -> np.ndarray:
    """The contents of a .gz file as a read-only byte array, mapped from an unnamed file."""
    with storage.open_read(path) as packed, tempfile.TemporaryFile() as plain:
        try:
            with gzip.open(packed) as unpacked:
                shutil.copyfileobj(unpacked, plain, 1 << 20)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise StageError(
                f"{path}: not a whole gzip file ({error}); fetch or copy it again"
            ) from error
        plain.flush()
        if plain.tell() == 0:
            return np.empty(0, np.uint8)
        return np.memmap(plain, np.uint8, mode="r")


def _bytes_of(path: str) -> np.ndarray:
    """The contents of a file as a read-only byte array, mapped where it can be."""
    if path.endswith(".gz"):
        return _unzipped(path)
    if storage.is_url(path):
        return np.frombuffer(storage.read_bytes(path), np.uint8)
    if os.path.getsize(path) == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def read_idx(path: str, *, num_dims: int) -> np.ndarray:
    """Reads an IDX file of uint8 (http://yann.lecun.com/exdb/mnist, "THE IDX FILE FORMAT").

    Args:
      path: local path or URL; unpacked on the way if it ends in .gz.
      num_dims: dimensions expected: 3 for images, 1 for labels.

    Returns:
      uint8 array of that many dimensions.

    Raises:
      StageError: the magic number, or the size against what the header promises, is wrong.
    """
    data = _bytes_of(path)
    expected = struct.pack(">HBB", 0, _IDX_DTYPE_UINT8, num_dims)
    magic = data[:4].tobytes()
    header_bytes = 4 + 4 * num_dims
    if magic != expected or len(data) < header_bytes:
        raise StageError(
            f"{path}: begins with {magic.hex() or 'nothing'}, expected the IDX magic number "
            f"{expected.hex()} (uint8, {num_dims} dimensions) and a header of {header_bytes} "
            "bytes; is it the right file?"
        )
    shape = struct.unpack(f">{num_dims}I", data[4:header_bytes].tobytes())
    promised, found = int(np.prod(shape, dtype=object)), len(data) - header_bytes
    if promised != found:
        raise StageError(
            f"{path}: the header promises {'×'.join(map(str, shape))} = {promised} bytes, "
            f"the file holds {found}; fetch or copy it again"
        )
    return data[header_bytes:].reshape(shape)


def _find_idx(directory: str, names: Sequence[str], prefix: str, kind: str) -> str | None:
    """Path of an IDX file in either spelling, packed or not, if there is one."""
    for stem in (f"{prefix}-{kind}-ubyte", f"{prefix}-{kind.replace('-idx', '.idx')}-ubyte"):
        for name in (stem, f"{stem}.gz"):
            if name in names:
                return storage.join(directory, name)
    return None


def _read_idx_pair(images_path: str, labels_path: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, H, W, 1) and labels (n,) of one split."""
    images, labels = read_idx(images_path, num_dims=3), read_idx(labels_path, num_dims=1)
    if len(images) != len(labels):
        raise StageError(
            f"{images_path} holds {len(images)} images, {labels_path} holds {len(labels)} labels; "
            "expected as many labels as images: are both of the same set?"
        )
    if images.size == 0:
        raise StageError(
            f"{images_path}: holds {'×'.join(map(str, images.shape))} pixels; expected at least "
            "one image: leave the files of an empty split out"
        )
    return images[..., np.newaxis], labels


def open_idx(directory: str, id_prefix: str = "") -> ArraySource:
    """The image set in a directory of IDX files, plain or packed with gzip.

    A directory may lack one of the two splits, never half of one.

    Raises:
      StageError: no such directory, a file is missing or wrong, or shapes differ.
    """
    if not directory:
        raise UsageError("--source=idx: names no directory; write --source=idx:DIR")
    if not storage.is_dir(directory):
        raise StageError(f"--source=idx:{directory}: no such directory; expected IDX files in it")
    names = storage.list_names(directory)
    splits = {}
    for prefix, split in _IDX_PREFIXES.items():
        paths = {
            kind: _find_idx(directory, names, prefix, f"{kind}-idx{dims}")
            for kind, dims in (("images", 3), ("labels", 1))
        }
        missing = [kind for kind, path in paths.items() if path is None]
        if len(missing) == 1:
            dims = 3 if missing[0] == "images" else 1
            raise StageError(
                f"--source=idx:{directory}: no {prefix}-{missing[0]}-idx{dims}-ubyte[.gz] beside "
                f"the {prefix} {'labels' if dims == 3 else 'images'}; put it there"
            )
        if not missing:
            splits[split] = _read_idx_pair(paths["images"], paths["labels"])
    if not splits:
        raise StageError(
            f"--source=idx:{directory}: no train-images-idx3-ubyte[.gz] nor "
            f"t10k-images-idx3-ubyte[.gz]; found {', '.join(names[:5]) or 'nothing'}"
        )
    shapes = {split: images.shape[1:] for split, (images, _) in splits.items()}
    if len(set(shapes.values())) > 1:
        raise StageError(
            f"--source=idx:{directory}: image shapes differ between splits: {shapes}; "
            "expected one shape per set"
        )
    return ArraySource(splits, id_prefix)


def open_sample(rest: str = "") -> ArraySource:
    """The embedded set: MNIST's 10,000 test images as one set without splits."""
    if rest:
        raise UsageError(f"--source=sample:{rest}: the sample takes nothing after its name")
    directory = os.path.join(os.path.dirname(__file__), "sample")
    images, labels = _read_idx_pair(
        os.path.join(directory, "t10k-images-idx3-ubyte.gz"),
        os.path.join(directory, "t10k-labels-idx1-ubyte.gz"),
    )
    return ArraySource({placement.UNSPLIT: (images, labels)}, id_prefix="sample")


_OPENERS = {"idx": open_idx, "sample": open_sample}


@functools.lru_cache(maxsize=1)
def open_source(spec: str) -> Source:
    """Opens the source that a spec names; the last one stays open in this process.

    Args:
      spec: `sample` or `idx:DIR`.

    Raises:
      UsageError: no source of that kind.
      StageError: the source cannot be read.
    """
    kind, _, rest = spec.partition(":")
    if kind not in _OPENERS:
        raise UsageError(f"--source={spec}: no source {kind!r}; expected sample or idx:DIR")
    return _OPENERS[kind](rest)
