"""Arrays of this process as a source, by the rules of .npz files."""

import collections
import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.cli.errors import UsageError
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays as arrays_lib
from pipeline.sources.readers.array_layout import pairs as pairs_lib
from pipeline.sources.readers.array_layout import stored
from pipeline.sources.splits import UNSPLIT, in_order, split_named

KIND = "arrays"
_BLOCK_BYTES = 1 << 24
# Split -> (images, labels or None).
_Arrays = dict[str, tuple[np.ndarray, np.ndarray | None]]
# Hash -> the arrays with this hash, once for each job that reads them now.
_READ_NOW: dict[str, list[_Arrays]] = collections.defaultdict(list)


class _Rows(arrays_lib.FileRows):
    """Rows of an array in memory."""

    def __init__(self, array: np.ndarray):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype
        self._row_bytes = array[:1].nbytes

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self._array[rows]


class _Array(stored.StoredArray):
    """An array in memory, which is not copied."""

    def __init__(self, where: str, array: np.ndarray):
        super().__init__(where, array.shape, array.dtype)
        self._array = array

    def rows(self, axes: str) -> tuple[_Rows, str]:
        if axes[0] == "N":
            return _Rows(self._array), axes
        return _Rows(np.moveaxis(self._array, -1, 0)), axes[-1] + axes[:-1]


def _array(where: str, value: Any) -> np.ndarray:
    if np.ma.is_masked(value):
        raise UsageError(
            f"{where}: has masked values; expected none: pass x.filled(0), or drop them"
        )
    try:
        array = np.asarray(value)
    except ValueError as error:  # Rows of several lengths.
        raise UsageError(f"{where}: {error}; expected one array: numpy.stack makes one") from error
    if array.dtype.hasobject and array.ndim and all(isinstance(v, str) for v in array.flat):
        return array.astype(str)  # Columns of a table hold words like this.
    if array.dtype.hasobject:
        raise UsageError(
            f"{where}: holds Python objects; expected numbers, or words as labels: pass an array "
            "of numbers such as x.astype(numpy.uint8), or of words alone"
        )
    return array


def _by_split(images: Any, labels: Any) -> _Arrays:
    """The arrays in the order of splits."""
    if not isinstance(images, Mapping):
        label_array = None if labels is None else _array("labels", labels)
        return {UNSPLIT: (_array("images", images), label_array)}
    if labels is not None:
        raise UsageError(
            "labels: beside a dict of splits; expected the labels in the dict: "
            "{'train': (images, labels)}"
        )
    by_split: _Arrays = {}
    for name, value in images.items():
        split = split_named(str(name))
        if split in by_split or split == UNSPLIT:
            raise UsageError(
                f"images[{name!r}]: expected the splits train, validation and test, each once"
            )
        pair = value if isinstance(value, tuple) else (value, None)
        if len(pair) != 2:
            raise UsageError(f"images[{name!r}]: a tuple of {len(pair)}; expected (images, labels)")
        image_array = _array(f"images[{name!r}]", pair[0])
        label_array = None if pair[1] is None else _array(f"labels[{name!r}]", pair[1])
        by_split[split] = image_array, label_array
    if not by_split:
        raise UsageError(
            "images: an empty dict; expected one of the splits train, validation, test"
        )
    return {split: by_split[split] for split in in_order(by_split)}


def _hash(digest: Any, array: np.ndarray) -> None:
    """Hashes the bytes of an array in C order, in blocks: a view may be far larger than memory."""
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, _BLOCK_BYTES // max(1, rows[:1].nbytes))
    for first in range(0, len(rows), step):
        digest.update(np.ascontiguousarray(rows[first : first + step]).view(np.uint8).data)


@contextlib.contextmanager
def readable(images: Any, labels: Any = None) -> Iterator[str]:
    """Within the block, arrays are the source of the name that it yields, as in --source.

    Args:
      images: an array, or split -> an array or (images, labels). Anything that numpy.asarray takes
        is an array.
      labels: the labels of an array; None without labels.

    Raises:
      UsageError: not arrays, or not splits.
    """
    arrays = _by_split(images, labels)
    digest = hashlib.sha256()
    for split, pair in arrays.items():
        for array in pair:
            if array is not None:
                digest.update(f"{split} {array.dtype} {array.shape};".encode())
                _hash(digest, array)
    # A data set remembers its sources by name.
    key = digest.hexdigest()[:16]
    _READ_NOW[key].append(arrays)
    try:
        yield f"{KIND}:{key}"
    finally:
        _READ_NOW[key].pop()


def open_arrays(key: str, options: SourceOptions = DEFAULTS) -> arrays_lib.ArraySource:
    """The arrays of a `readable` block of this process.

    Args:
      key: the name after the colon.
      options: see SourceOptions.

    Raises:
      UsageError: something that only an option can decide, or no block has such arrays.
      StageError: arrays that are no image set, or ambiguous.
    """
    try:
        arrays = _READ_NOW[key][-1]
    except IndexError:
        raise UsageError(
            f"--source={KIND}:{key}: no such arrays in this process; expected arrays that its "
            "caller has: save numpy.savez(FILE, x=images, y=labels), and name npz:FILE"
        ) from None
    pairs = {
        split: pairs_lib.Pair(
            _Array(f"images of {split}", images),
            None if labels is None else _Array(f"labels of {split}", labels),
        )
        for split, (images, labels) in arrays.items()
    }
    return pairs_lib.open_pairs(pairs, options, name=KIND)
