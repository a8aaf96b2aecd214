"""IDX files, plain or packed: MNIST, Fashion-MNIST, KMNIST, EMNIST, and the embedded sample."""

import math
import os
import re
import struct

import numpy as np

from pipeline import placement, storage
from pipeline.errors import StageError, UsageError
from pipeline.sources import arrays, source

_IDX_DTYPE_UINT8 = 0x08
# MNIST writes train-images-idx3-ubyte, or train-images.idx3-ubyte.
_FILE_NAME = re.compile(r"(?P<prefix>.*?)-?(?P<kind>images|labels)[-.]idx[13]-ubyte(\.gz)?")
_NUM_DIMS = {"images": 3, "labels": 1}


def read_idx(path: str, *, num_dims: int) -> arrays.FileRows:
    """Reads an IDX file of uint8 (http://yann.lecun.com/exdb/mnist, "THE IDX FILE FORMAT").

    Args:
      path: local path or URL; unpacked on the way if it ends in .gz.
      num_dims: dimensions expected: 3 for images, 1 for labels.

    Returns:
      uint8 array of that many dimensions, in the file.

    Raises:
      StageError: the magic number, or the size against what the header promises, is wrong.
    """
    file = arrays.open_local(path)
    size, header_bytes = file.seek(0, os.SEEK_END), 4 + 4 * num_dims
    header = arrays.read_at(file, 0, header_bytes)
    expected = struct.pack(">HBB", 0, _IDX_DTYPE_UINT8, num_dims)
    if header[:4] != expected:
        raise StageError(
            f"{path}: begins with {header[:4].hex() or 'nothing'}, expected the IDX magic number "
            f"{expected.hex()} (uint8, {num_dims} dimensions); is it the right file?"
        )
    if size < header_bytes:
        raise StageError(
            f"{path}: holds {size} bytes, expected an IDX header of {header_bytes} and what "
            "it promises; fetch or copy it again"
        )
    shape = struct.unpack(f">{num_dims}I", header[4:])
    if math.prod(shape) != size - header_bytes:
        raise StageError(
            f"{path}: the header promises {'×'.join(map(str, shape))} = {math.prod(shape)} bytes, "
            f"the file holds {size - header_bytes}; fetch or copy it again"
        )
    return arrays.FileRows(file, header_bytes, shape)


def _read_pair(images_path: str, labels_path: str) -> tuple[arrays.FileRows, np.ndarray]:
    """Images (n, H, W, 1) and labels (n,) of one split."""
    images, labels = read_idx(images_path, num_dims=3), read_idx(labels_path, num_dims=1)[:]
    if len(images) != len(labels):
        raise StageError(
            f"{images_path} holds {len(images)} images, {labels_path} holds {len(labels)} labels; "
            "expected as many labels as images: are both of the same set?"
        )
    if not math.prod(images.shape):
        raise StageError(
            f"{images_path}: holds {'×'.join(map(str, images.shape))} pixels; expected at least "
            "one image: leave the files of an empty split out"
        )
    images.shape = (*images.shape, 1)
    return images, labels


def _find_files(directory: str, beginning: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Split -> kind -> (file name, its prefix), of IDX files whose names begin so."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for name in storage.list_names(directory):
        match = _FILE_NAME.fullmatch(name)
        if not match or not name.startswith(beginning):
            continue
        prefix, kind = match["prefix"], match["kind"]
        of_split = found.setdefault(source.split_named(prefix), {})
        earlier = of_split.get(kind)
        if earlier and earlier[0] != name.removesuffix(".gz"):  # Plain goes before packed.
            raise StageError(
                f"--source=idx:{directory}/{beginning}: {earlier[0]} and {name} are "
                f"of one split; name one set by how its files begin, such as "
                f"idx:{storage.join(directory, re.split('-?(train|test|t10k)', prefix)[0])}"
            )
        of_split.setdefault(kind, (name, prefix))
    return found


def open_idx(place: str) -> arrays.ArraySource:
    """The image set in a directory of IDX files, plain or packed with gzip.

    A directory may lack one of the splits, never half of one. Which split a file is of
    is said by its prefix: train, t10k or test, val or validation, alone or with a name.

    Args:
      place: DIR, or DIR/BEGINNING for those of its files whose names begin so.

    Raises:
      StageError: no such directory, a file is missing or wrong, or shapes differ.
    """
    if not place:
        raise UsageError("--source=idx: names no directory; write --source=idx:DIR")
    directory, beginning = place, ""
    if not storage.is_dir(place):
        directory, _, beginning = place.rpartition("/")
        directory = directory or "."
    files = _find_files(directory, beginning) if storage.is_dir(directory) else {}
    if not files and beginning:
        raise StageError(
            f"--source=idx:{place}: no such directory; expected IDX files in it, or files whose "
            "names begin so"
        )
    if not files:
        names = storage.list_names(directory)
        raise StageError(
            f"--source=idx:{place}: no train-images-idx3-ubyte[.gz] nor "
            f"t10k-images-idx3-ubyte[.gz]; found {', '.join(names[:5]) or 'nothing'}"
        )
    splits = {}
    for split in placement.in_order(files):
        for kind, other in (("images", "labels"), ("labels", "images")):
            if kind not in files[split]:
                name, prefix = files[split][other]
                missing = f"{prefix}-{kind}-idx{_NUM_DIMS[kind]}-ubyte[.gz]".lstrip("-")
                raise StageError(f"--source=idx:{place}: no {missing} beside {name}; put it there")
        paths = [storage.join(directory, files[split][kind][0]) for kind in ("images", "labels")]
        splits[split] = _read_pair(*paths)
    return arrays.ArraySource(splits, name=f"idx:{place}")


def open_sample(rest: str = "") -> arrays.ArraySource:
    """The embedded set: MNIST's 10,000 test images as one set without splits."""
    if rest:
        raise UsageError(f"--source=sample:{rest}: the sample takes nothing after its name")
    directory = os.path.join(os.path.dirname(os.path.dirname(__file__)), "sample")
    images, labels = _read_pair(
        os.path.join(directory, "t10k-images-idx3-ubyte.gz"),
        os.path.join(directory, "t10k-labels-idx1-ubyte.gz"),
    )
    return arrays.ArraySource(
        {placement.UNSPLIT: (images, labels)}, name="sample", id_prefix="sample"
    )
