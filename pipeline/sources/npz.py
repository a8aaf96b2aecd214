"""NumPy archives: `x_train`, `y_train`, … as Keras has them, `train_images`, … as MedMNIST has."""

import lzma
import math
import re
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

from pipeline import names, placement, storage
from pipeline.errors import StageError, UsageError
from pipeline.sources import arrays, source

_WORDS = r"train|training|val|valid|validation|test|testing"
# What reading a damaged or encrypted archive raises; OSError is what bz2 raises.
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError)
_KEYS = {
    "images": re.compile(rf"(x|images?)(_({_WORDS}))?|({_WORDS})_(x|images?)"),
    "labels": re.compile(rf"(y|labels?)(_({_WORDS}))?|({_WORDS})_(y|labels?)"),
}


def _read_array(archive: zipfile.ZipFile, key: str, path: str) -> np.ndarray | arrays.FileRows:
    """An array of the archive; images of bytes stay in an unnamed file. Never unpickled."""
    plain = tempfile.TemporaryFile()
    with archive.open(f"{key}.npy") as packed:
        shutil.copyfileobj(packed, plain, 1 << 20)
    plain.flush()
    plain.seek(0)
    shape, fortran_order, dtype = _read_header(plain, f"{path}: {key}")
    if dtype.hasobject:
        raise StageError(
            f"{path}: {key} holds Python objects, which are never unpickled; expected numbers: "
            "save the array with another dtype"
        )
    offset = plain.tell()
    found = plain.seek(0, 2) - offset
    if min(shape, default=0) < 0 or found != math.prod(shape) * dtype.itemsize:
        raise StageError(
            f"{path}: {key} promises {dtype} {shape}, and holds {found} bytes; save it again"
        )
    if dtype == np.uint8 and len(shape) in (3, 4) and not fortran_order:
        return arrays.FileRows(plain, offset, shape)
    plain.seek(offset)
    order = "F" if fortran_order else "C"
    return np.ndarray(shape, dtype, plain.read(), order=order)


def _read_header(file: BinaryIO, where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype of an .npy file."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        return readers[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError) as error:
        raise StageError(f"{where}: no NumPy array ({error}); save it with numpy.savez") from error


def _as_images(array: np.ndarray | arrays.FileRows, where: str) -> np.ndarray | arrays.FileRows:
    """An array (n, H, W), (n, H, W, 1) or (n, H, W, 3) as (n, H, W, C)."""
    shape = array.shape
    if array.dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)):
        raise StageError(
            f"{where}: {array.dtype} {shape}; expected uint8 (n, H, W), (n, H, W, 1) or "
            "(n, H, W, 3): save pixels as 0 to 255"
        )
    array.shape = shape if len(shape) == 4 else (*shape, 1)
    return array


def open_npz(path: str) -> arrays.ArraySource:
    """The image set in an .npz archive.

    Args:
      path: local path or URL. Keys say what they hold: x or images, y or labels, before or
        after the split; without a split the set has none.

    Raises:
      StageError: no such file, or not such keys, dtypes or shapes.
    """
    if not path:
        raise UsageError("--source=npz: names no file; write --source=npz:FILE")
    where = f"--source=npz:{path}"
    try:
        with storage.open_read(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            for member in members:
                names.check(
                    member.removesuffix("/"),
                    f"{where}: holds a member named",
                    "do not unpack an archive of such names; save the set anew",
                )
            keys = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
            found: dict[str, dict[str, str]] = {}
            for key in keys:
                for kind, pattern in _KEYS.items():
                    if pattern.fullmatch(key.lower()):
                        split = source.split_named(key.replace("_", " "))
                        other = found.setdefault(split, {}).setdefault(kind, key)
                        if other != key:
                            raise StageError(
                                f"{where}: {other} and {key} are both {kind} of {split}; expected "
                                "one: save the set without the other"
                            )
            complete = [split for split, kinds in found.items() if len(kinds) == len(_KEYS)]
            if not complete or len(complete) < len(found):
                raise StageError(
                    f"{where}: holds {', '.join(keys) or 'nothing'}; expected images and labels of "
                    "each split, as x_train and y_train, or train_images and train_labels"
                )
            splits = {}
            for split in placement.in_order(complete):
                images_key, labels_key = found[split]["images"], found[split]["labels"]
                images = _as_images(_read_array(archive, images_key, path), f"{path}: {images_key}")
                labels = _read_array(archive, labels_key, path)
                if len(labels.shape) == 2 and labels.shape[1] == 1:  # MedMNIST's.
                    labels = labels[:, 0]
                splits[split] = images, labels
    except (FileNotFoundError, IsADirectoryError) as error:
        raise StageError(f"{where}: no such file; expected an .npz archive") from error
    except _DAMAGED as error:
        raise StageError(f"{where}: no whole .npz archive ({error}); fetch it again") from error
    return arrays.ArraySource(splits, name=f"npz:{path}")
