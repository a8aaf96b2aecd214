"""IDX files, plain or gzip: MNIST, Fashion-MNIST, KMNIST, EMNIST, QMNIST, the embedded sample."""

import math
import os
import re
import struct

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources.local_file import LocalFile, OpenFile
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.readers.array_layout import pairs as pairs_lib
from pipeline.sources.readers.array_layout import stored
from pipeline.sources.splits import UNSPLIT, in_order, split_named
from pipeline.storage import files as files_lib

# Codes of dtypes in the magic number; numbers are big-endian.
_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
# MNIST writes train-images-idx3-ubyte, or train-images.idx3-ubyte; QMNIST labels-idx2-int.
_FILE_NAME = re.compile(
    r"(?P<prefix>.*?)-?(?P<kind>images|labels)[-.]idx[1-4]-"
    r"(ubyte|byte|short|int|float|double)(\.gz)?"
)
_NUM_DIMS = {"images": (3, 2, 4), "labels": (1, 2)}  # The usual number first.
# The columns of QMNIST's labels; the first one is the digit
# (https://github.com/facebookresearch/qmnist, "Using the QMNIST extended labels").
_QMNIST_COLUMNS = 8
# Bytes that are compared at a time.
_BLOCK_BYTES = 1 << 20


class _IdxFile(stored.StoredArray):
    """An IDX file (http://yann.lecun.com/exdb/mnist, "THE IDX FILE FORMAT")."""

    def __init__(self, path: str, kind: str):
        """Opens the file and reads the header.

        Args:
          path: local path or URL; plain or gzip.
          kind: images or labels.

        Raises:
          StageError: wrong magic number, or another size than the header states.
        """
        self._file = LocalFile(path, expected_size=lambda head: _header(head, path, kind)[-1])
        self.stamp = self._file.stamp
        head = self._file.read(0, 4 + 4 * max(_NUM_DIMS[kind]))
        shape, dtype, self._offset, expected = _header(head, path, kind)
        super().__init__(path, shape, dtype)
        if self._file.num_bytes != expected:
            num_bytes, expected = (n - self._offset for n in (self._file.num_bytes, expected))
            # Decompression has stopped one byte after the expected size.
            more = " or more" if self._file.is_gzip and num_bytes > expected else ""
            raise StageError(
                f"{path}: the header states {'×'.join(map(str, shape))} = {expected} bytes, the "
                f"file holds {num_bytes}{more}; download or copy it again"
            )

    def open(self) -> tuple[OpenFile, int]:
        """The file, and the byte at which the array begins."""
        return self._file, self._offset


def _header(head: bytes, path: str, kind: str) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Reads an IDX header.

    Returns:
      shape, dtype, and the bytes of the header and of the whole file.

    Raises:
      StageError: no IDX header, or not one of `kind`.
    """
    zeros, code, num_dims = struct.unpack(">HBB", head[:4].ljust(4, b"\xff"))
    if zeros or code not in _DTYPES or num_dims not in _NUM_DIMS[kind]:
        usual = _NUM_DIMS[kind][0]
        raise StageError(
            f"{path}: starts with {head[:4].hex() or 'nothing'}, expected the IDX magic number "
            f"{struct.pack('>HBB', 0, 0x08, usual).hex()} (uint8, {usual} dimensions) or another "
            f"one of {kind}: check that this is the right file"
        )
    num_header = 4 + 4 * num_dims
    if len(head) < num_header:
        raise StageError(
            f"{path}: holds {len(head)} bytes, expected an IDX header of {num_header} and "
            "the data; download or copy it again"
        )
    shape = struct.unpack(f">{num_dims}I", head[4:num_header])
    dtype = np.dtype(_DTYPES[code])
    return shape, dtype, num_header, num_header + math.prod(shape) * dtype.itemsize


def _open_pair(images_path: str, labels_path: str | None, options: SourceOptions) -> pairs_lib.Pair:
    """Images and labels of one split."""
    images, labels = _IdxFile(images_path, "images"), None
    if labels_path is not None:
        labels = pairs_lib.open_labels(options, _IdxFile, labels_path, "labels")
    if labels is not None and images.shape[0] != labels.shape[0] and options.labels != "none":
        raise StageError(
            f"{images_path} holds {images.shape[0]} images, {labels_path} holds {labels.shape[0]} "
            "labels; expected as many labels as images: check that both belong to the same set"
        )
    if not math.prod(images.shape):
        raise StageError(
            f"{images_path}: holds {'×'.join(map(str, images.shape))} pixels; expected at least "
            "one image: remove the files of an empty split"
        )
    return pairs_lib.Pair(images, labels)


def _find_files(
    directory: str, beginning: str, options: SourceOptions
) -> tuple[dict[str, dict[str, tuple[str, str]]], list[str], dict[str, int]]:
    """The IDX files of a directory whose names start so.

    Returns:
      Split -> kind -> (file name, its prefix).
      Notes on files that are passed over.
      Ending -> number of the files that are no IDX files.
    """
    files: dict[str, dict[str, tuple[str, str]]] = {}
    notes = []
    names, others = pairs_lib.files_of(directory, beginning, "")
    # Some programs unpack NAME into a directory NAME.
    inside = [
        f"{name}/{name}"
        for name in files_lib.list_names(directory)
        if name.startswith(beginning) and _FILE_NAME.fullmatch(name) and name not in names
    ]
    inside = [name for name in inside if files_lib.exists(files_lib.join(directory, name))]
    for name in [*names, *inside]:
        match = _FILE_NAME.fullmatch(name.partition("/")[0])
        if not match:
            ending = os.path.splitext(name)[1].lower()
            others[ending] = others.get(ending, 0) + 1
            continue
        prefix, kind = match["prefix"], match["kind"]
        split_files = files.setdefault(split_named(prefix), {})
        earlier = split_files.setdefault(kind, (name, prefix))[0]
        # A plain file is listed before its compressed copy, and wins.
        if earlier == name or (kind == "labels" and options.labels == "none"):
            continue
        is_copy = earlier == name.removesuffix(".gz")
        # Of QMNIST's labels, a file of class numbers alone goes before one with all columns.
        is_qmnist = split_files[kind][1] == prefix and "labels-idx2-int" in name
        if is_copy or is_qmnist:
            notes.append(f"reads {earlier}, and not {name}")
            continue
        if split_files[kind][1] != prefix or not _same_content(directory, kind, earlier, name):
            raise StageError(
                f"--source=idx:{directory}/{beginning}: {earlier} and {name} belong to the same "
                "split; name one set by the start of its file names, such as "
                f"idx:{files_lib.join(directory, re.split('-?(train|test|t10k)', prefix)[0])}"
            )
        notes.append(f"reads {earlier}; {name} has the same content")
    if options.labels == "none":
        files = {split: kinds for split, kinds in files.items() if "images" in kinds}
    return files, notes, others


def _same_content(directory: str, kind: str, *names: str) -> bool:
    """Whether two files hold the same bytes when they are decompressed."""
    first, second = (_IdxFile(files_lib.join(directory, name), kind).open()[0] for name in names)
    blocks = zip(first.blocks(_BLOCK_BYTES), second.blocks(_BLOCK_BYTES), strict=False)
    return first.num_bytes == second.num_bytes and all(a == b for a, b in blocks)


def open_idx(place: str, options: SourceOptions = DEFAULTS) -> arrays.ArraySource:
    """The image set in a directory of IDX files, plain or compressed with gzip.

    The prefix of a file states its split: train, t10k or test, val or validation, alone or with a
    name. A missing split is allowed. A test split may lack labels, and so may the whole set.

    Args:
      place: DIR, or DIR/BEGINNING for the files whose names start with BEGINNING.
      options: see SourceOptions.

    Raises:
      UsageError: something that only a flag can decide.
      StageError: no such directory, a file is missing or wrong, or shapes differ.
    """
    if not place:
        raise UsageError("--source=idx: names no directory; write --source=idx:DIR")
    directory, beginning = pairs_lib.set_at(place)
    files, notes, ignored = _find_files(directory, beginning, options)
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
    names = {split: [name for name, _ in kinds.values()] for split, kinds in files.items()}
    _, prefix = next(iter(files.get(UNSPLIT, {"": ("", "")}).values()))
    remedy = "move the files of one away"
    remedy += f", or read idx:{files_lib.join(directory, prefix)}- alone" if prefix else ""
    pairs_lib.refuse_whole_beside_splits(f"--source=idx:{place}", names, remedy)
    if any(name.lower().startswith("emnist") for found in names.values() for name in found):
        notes.append(
            "warning: EMNIST's files hold the columns of each image as its rows; --transpose makes "
            "the images upright"
        )
    is_labelled = options.labels != "none" and any("labels" in kinds for kinds in files.values())
    pairs = {}
    for split in in_order(files):
        for kind, other in (("images", "labels"), ("labels", "images")):
            # Labels of a test split may be unknown, and those of a whole set.
            is_needed = kind == "images" or (is_labelled and split != "test")
            if is_needed and kind not in files[split]:
                name, prefix = files[split][other]
                missing = f"{prefix}-{kind}-idx{_NUM_DIMS[kind][0]}-ubyte[.gz]".lstrip("-")
                remedy = " or ignore all labels with --labels=none" if kind == "labels" else ""
                raise StageError(
                    f"--source=idx:{place}: no {missing} beside {name}; add the file{remedy}"
                )
        paths = {kind: files_lib.join(directory, name) for kind, (name, _) in files[split].items()}
        pairs[split] = _open_pair(paths["images"], paths.get("labels"), options)
    return pairs_lib.open_pairs(
        pairs,
        options,
        name=f"idx:{place}",
        is_first_column=_is_qmnist,
        notes=notes,
        listed={file.where: file.stamp for pair in pairs.values() for file in pair if file},
        ignored=ignored,
    )


def _is_qmnist(labels: stored.StoredArray) -> bool:
    return labels.dtype.kind == "i" and labels.shape[1:] == (_QMNIST_COLUMNS,)


def open_sample(argument: str = "", options: SourceOptions = DEFAULTS) -> arrays.ArraySource:
    """The embedded set: MNIST's 10,000 test images, a set without splits."""
    if argument:
        raise UsageError(
            f"--source=sample:{argument}: the sample takes no argument; write --source=sample"
        )
    directory = os.path.join(os.path.dirname(os.path.dirname(__file__)), "sample")
    pair = _open_pair(
        os.path.join(directory, "t10k-images-idx3-ubyte.gz"),
        os.path.join(directory, "t10k-labels-idx1-ubyte.gz"),
        options,
    )
    # Nothing is listed: the copies on different machines have different file times.
    return pairs_lib.open_pairs({UNSPLIT: pair}, options, name="sample", id_prefix="sample")
