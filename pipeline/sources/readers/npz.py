"""NumPy archives with keys of Keras (`x_train`, `y_train`, …) or MedMNIST (`train_images`, …)."""

import io
import math
import re
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import source
from pipeline.sources.local_file import OpenFile
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.splits import in_order, split_named
from pipeline.storage import files, names, stamps

_WORDS = r"train|training|val|valid|validation|test|testing"
# Raised while reading a damaged or encrypted archive.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError)
_KEYS = {
    "images": re.compile(rf"(x|images?)(_({_WORDS}))?|({_WORDS})_(x|images?)"),
    "labels": re.compile(rf"(y|labels?)(_({_WORDS}))?|({_WORDS})_(y|labels?)"),
}


# Methods that zipfile decompresses in steps of a bounded size. With LZMA and bzip2, one step can
# turn a few bytes into gigabytes.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Bytes read of an array before it is decompressed; NumPy's header is shorter.
_HEAD_BYTES = 1 << 16


class _Member:
    """An array of an archive, with only the header read."""

    def __init__(self, archive: zipfile.ZipFile, key: str, path: str):
        """Reads the header.

        Raises:
          StageError: not an array of numbers, or of another size than its header states.
        """
        self._archive, self._info = archive, archive.getinfo(f"{key}.npy")
        self.key, self._path, self._where = key, path, f"{path}: {key}"
        if self._info.compress_type not in _METHODS:
            raise StageError(
                f"{self._where} is compressed with another method than deflate; save it again with "
                "numpy.savez_compressed or numpy.savez"
            )
        with archive.open(self._info) as member:
            head = io.BytesIO(member.read(_HEAD_BYTES))
        self.shape, self._fortran_order, self.dtype = _read_header(head, self._where)
        if self.dtype.hasobject:
            raise StageError(
                f"{self._where} holds Python objects, which are never unpickled; expected numbers: "
                "save the array with a numeric dtype"
            )
        self._offset = head.tell()
        self._check_size(self._info.file_size)

    def _check_size(self, num_bytes: int) -> None:
        """Raises a StageError unless a member of `num_bytes` bytes holds exactly the array."""
        data_bytes, expected = num_bytes - self._offset, math.prod(self.shape) * self.dtype.itemsize
        if min(self.shape, default=0) < 0 or data_bytes != expected:
            raise StageError(
                f"{self._where}: its header states {self.dtype} {self.shape}, but it holds "
                f"{data_bytes} bytes; save it again"
            )

    def read(self) -> np.ndarray | arrays.FileRows:
        """Decompresses the array, never unpickled; uint8 images stay in an unnamed file."""
        shape, dtype = self.shape, self.dtype
        copy = tempfile.TemporaryFile()
        # zipfile yields at most file_size bytes, but may yield fewer.
        with self._archive.open(self._info) as member:
            shutil.copyfileobj(member, copy, 1 << 20)
        self._check_size(copy.tell())
        copy.flush()
        if dtype == np.uint8 and len(shape) in (3, 4) and not self._fortran_order:
            return arrays.FileRows(OpenFile(copy, self._path), self._offset, shape)
        copy.seek(self._offset)
        order = "F" if self._fortran_order else "C"
        return np.ndarray(shape, dtype, copy.read(), order=order)


def _read_header(file: BinaryIO, where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, is Fortran order, dtype) of an .npy file."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        return readers[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError) as error:
        raise StageError(
            f"{where}: not a NumPy array ({error}); save it with numpy.savez"
        ) from error


def _read_pair(
    images: _Member, labels: _Member, split: str, path: str
) -> tuple[np.ndarray | arrays.FileRows, np.ndarray]:
    """Images (n, H, W, C) and labels (n,), decompressed only if their headers fit.

    Images may be stored as (n, H, W), and labels as (n, 1), as MedMNIST does.
    """
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)):
        raise StageError(
            f"{path}: {images.key}: {images.dtype} {shape}; expected uint8 (n, H, W), "
            "(n, H, W, 1) or (n, H, W, 3): save pixels as 0 to 255"
        )
    images.shape = shape if len(shape) == 4 else (*shape, 1)
    if labels.shape[1:] == (1,):
        labels.shape = labels.shape[:1]
    arrays.check_pair(f"npz:{path}: {split}", images, labels)
    return images.read(), labels.read()


def open_npz(path: str, options: SourceOptions = DEFAULTS) -> arrays.ArraySource:
    """The image set in an .npz archive.

    Args:
      path: local path or URL. A key is x or images, y or labels, before or after the name of
        the split; keys without a split make a set without splits.
      options: see SourceOptions.

    Raises:
      StageError: no such file, or other keys, dtypes or shapes.
    """
    if not path:
        raise UsageError("--source=npz: names no file; write --source=npz:FILE")
    where = f"--source=npz:{path}"
    try:
        with files.open_read(path) as file, zipfile.ZipFile(file) as archive:
            stamp = stamps.of_open(file)
            members = archive.namelist()
            for member in members:
                names.check(
                    member.removesuffix("/"),
                    f"{where}: holds a member named",
                    "do not extract this archive; save the set again",
                )
            keys = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
            keys_by_split: dict[str, dict[str, str]] = {}
            for key in keys:
                for kind, pattern in _KEYS.items():
                    if pattern.fullmatch(key.lower()):
                        split = split_named(key.replace("_", " "))
                        other = keys_by_split.setdefault(split, {}).setdefault(kind, key)
                        if other != key:
                            raise StageError(
                                f"{where}: {other} and {key} are both {kind} of {split}; expected "
                                "one key: save the set without the other"
                            )
            complete = [split for split, kinds in keys_by_split.items() if len(kinds) == len(_KEYS)]
            if not complete or len(complete) < len(keys_by_split):
                raise StageError(
                    f"{where}: holds {', '.join(keys) or 'nothing'}; expected images and labels of "
                    "each split, such as x_train and y_train, or train_images and train_labels"
                )
            splits = {}
            for split in in_order(complete):
                images = _Member(archive, keys_by_split[split]["images"], path)
                labels = _Member(archive, keys_by_split[split]["labels"], path)
                splits[split] = _read_pair(images, labels, split, path)
            stamp_after = stamps.of_path(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise StageError(f"{where}: no such file; expected an .npz archive") from error
    except _DAMAGED as error:
        raise StageError(
            f"{where}: not a complete .npz archive ({error}); download it again"
        ) from error
    if stamp_after != stamp:
        raise source.changed(path)
    return arrays.ArraySource(splits, name=f"npz:{path}", listed={path: stamp})
