"""IDX files, plain or gzip: MNIST, Fashion-MNIST, KMNIST, EMNIST, and the embedded sample."""

import math
import os
import re
import struct
from collections.abc import Mapping

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources.local_file import LocalFile
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.splits import UNSPLIT, in_order, split_named
from pipeline.storage import files as files_lib

_IDX_DTYPE_UINT8 = 0x08
# MNIST writes train-images-idx3-ubyte, or train-images.idx3-ubyte.
_FILE_NAME = re.compile(r"(?P<prefix>.*?)-?(?P<kind>images|labels)[-.]idx[13]-ubyte(\.gz)?")
_NUM_DIMS = {"images": 3, "labels": 1}


def read_idx(path: str, *, num_dims: int) -> tuple[arrays.FileRows, str]:
    """Reads an IDX file of uint8 (http://yann.lecun.com/exdb/mnist, "THE IDX FILE FORMAT").

    Args:
      path: local path or URL; decompressed if it ends in .gz.
      num_dims: expected dimensions: 3 for images, 1 for labels.

    Returns:
      uint8 array of `num_dims` dimensions, in the file.
      The file's stamp before it was read.

    Raises:
      StageError: wrong magic number, or another size than the header states.
    """
    header_bytes = 4 + 4 * num_dims

    def shape_of(head: bytes) -> tuple[int, ...]:
        return _shape_of(head[:header_bytes], path, num_dims)

    file = LocalFile(path, expected_size=lambda head: header_bytes + math.prod(shape_of(head)))
    shape = shape_of(file.read(0, header_bytes))
    num_bytes, expected = file.num_bytes - header_bytes, math.prod(shape)
    if num_bytes != expected:
        # Decompression has stopped one byte after the expected size.
        more = " or more" if path.endswith(".gz") and num_bytes > expected else ""
        raise StageError(
            f"{path}: the header states {'×'.join(map(str, shape))} = {expected} bytes, the file "
            f"holds {num_bytes}{more}; download or copy it again"
        )
    return arrays.FileRows(file, header_bytes, shape), file.stamp


def _shape_of(header: bytes, path: str, num_dims: int) -> tuple[int, ...]:
    """The shape that a header states; raises a StageError if it is not an IDX header."""
    expected = struct.pack(">HBB", 0, _IDX_DTYPE_UINT8, num_dims)
    if header[:4] != expected:
        raise StageError(
            f"{path}: starts with {header[:4].hex() or 'nothing'}, expected the IDX magic number "
            f"{expected.hex()} (uint8, {num_dims} dimensions): check that this is the right file"
        )
    if len(header) < 4 + 4 * num_dims:
        raise StageError(
            f"{path}: holds {len(header)} bytes, expected an IDX header of {4 + 4 * num_dims} and "
            "the data; download or copy it again"
        )
    return struct.unpack(f">{num_dims}I", header[4:])


def _read_pair(
    images_path: str, labels_path: str
) -> tuple[arrays.FileRows, np.ndarray, Mapping[str, str]]:
    """Images (n, H, W, 1) and labels (n,) of one split, and the stamps of both files."""
    images, images_stamp = read_idx(images_path, num_dims=3)
    label_rows, labels_stamp = read_idx(labels_path, num_dims=1)
    labels = label_rows[:]
    if len(images) != len(labels):
        raise StageError(
            f"{images_path} holds {len(images)} images, {labels_path} holds {len(labels)} labels; "
            "expected as many labels as images: check that both belong to the same set"
        )
    if not math.prod(images.shape):
        raise StageError(
            f"{images_path}: holds {'×'.join(map(str, images.shape))} pixels; expected at least "
            "one image: remove the files of an empty split"
        )
    images.shape = (*images.shape, 1)
    return images, labels, {images_path: images_stamp, labels_path: labels_stamp}


def _find_files(directory: str, beginning: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Split -> kind -> (file name, its prefix) of the IDX files whose names start so."""
    files: dict[str, dict[str, tuple[str, str]]] = {}
    for name in files_lib.list_names(directory):
        match = _FILE_NAME.fullmatch(name)
        if not match or not name.startswith(beginning):
            continue
        prefix, kind = match["prefix"], match["kind"]
        split_files = files.setdefault(split_named(prefix), {})
        earlier = split_files.get(kind)
        # A plain file is listed before its compressed copy, and wins.
        if earlier and earlier[0] != name.removesuffix(".gz"):
            raise StageError(
                f"--source=idx:{directory}/{beginning}: {earlier[0]} and {name} belong to the same "
                "split; name one set by the start of its file names, such as "
                f"idx:{files_lib.join(directory, re.split('-?(train|test|t10k)', prefix)[0])}"
            )
        split_files.setdefault(kind, (name, prefix))
    return files


def open_idx(place: str, options: SourceOptions = DEFAULTS) -> arrays.ArraySource:
    """The image set in a directory of IDX files, plain or compressed with gzip.

    The prefix of a file states its split: train, t10k or test, val or validation, alone or with a
    name. A split needs both images and labels; a missing split is allowed.

    Args:
      place: DIR, or DIR/BEGINNING for the files whose names start with BEGINNING.
      options: see SourceOptions.

    Raises:
      StageError: no such directory, a file is missing or wrong, or shapes differ.
    """
    if not place:
        raise UsageError("--source=idx: names no directory; write --source=idx:DIR")
    directory, beginning = place, ""
    if not files_lib.is_dir(place):
        directory, _, beginning = place.rpartition("/")
        directory = directory or "."
    files = _find_files(directory, beginning) if files_lib.is_dir(directory) else {}
    if not files and beginning:
        raise StageError(
            f"--source=idx:{place}: no such directory; expected a directory of IDX files, or "
            "the start of their names"
        )
    if not files:
        names = files_lib.list_names(directory)
        raise StageError(
            f"--source=idx:{place}: no train-images-idx3-ubyte[.gz] nor "
            f"t10k-images-idx3-ubyte[.gz]; found {', '.join(names[:5]) or 'nothing'}"
        )
    splits, listed = {}, {}
    for split in in_order(files):
        for kind, other in (("images", "labels"), ("labels", "images")):
            if kind not in files[split]:
                name, prefix = files[split][other]
                missing = f"{prefix}-{kind}-idx{_NUM_DIMS[kind]}-ubyte[.gz]".lstrip("-")
                raise StageError(f"--source=idx:{place}: no {missing} beside {name}; add the file")
        paths = [files_lib.join(directory, files[split][kind][0]) for kind in ("images", "labels")]
        *splits[split], stamps = _read_pair(*paths)
        listed |= stamps
    return arrays.ArraySource(splits, name=f"idx:{place}", listed=listed)


def open_sample(argument: str = "", options: SourceOptions = DEFAULTS) -> arrays.ArraySource:
    """The embedded set: MNIST's 10,000 test images, a set without splits."""
    if argument:
        raise UsageError(
            f"--source=sample:{argument}: the sample takes no argument; write --source=sample"
        )
    directory = os.path.join(os.path.dirname(os.path.dirname(__file__)), "sample")
    # Nothing is listed: the copies on different machines have different file times.
    images, labels, _ = _read_pair(
        os.path.join(directory, "t10k-images-idx3-ubyte.gz"),
        os.path.join(directory, "t10k-labels-idx1-ubyte.gz"),
    )
    return arrays.ArraySource({UNSPLIT: (images, labels)}, name="sample", id_prefix="sample")
