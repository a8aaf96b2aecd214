"""Folders of image files: `train/<class>/*` or `<class>/*`."""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import source
from pipeline.sources.image_file import decode, shape_of
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.splits import UNSPLIT, in_order, split_named
from pipeline.storage import files as files_lib
from pipeline.storage import stamps, trees

# A file with one of these extensions is a record; other files are ignored.
_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm"),
)
# Files read in parallel for the fingerprint: enough to keep an object store busy.
_NUM_THREADS = 8
_HASH_BYTES = 1 << 20
_NO_CLASS = "lies in no class directory, expected <class>/FILE or <split>/<class>/FILE"
# Allowance for data beside the pixels: profiles, thumbnails, text.
_EXTRA_BYTES = 1 << 20
# Skipped links that a message names.
_MAX_SHOWN = 3


class FolderSource:
    """A source over image files; the directory of a file is its class."""

    def __init__(self, directory: str, max_pixels: int = source.MAX_IMAGE_PIXELS):
        """Lists the files.

        Args:
          directory: local path or URL.
          max_pixels: limit on height × width of an image; a larger one is `Unreadable`.

        Raises:
          StageError: no images, or ambiguous class directories.
        """
        # Pillow warns of damage, which is quarantined, and of harmless oddities.
        warnings.filterwarnings("ignore", module="PIL")
        self._directory, self._max_pixels = directory, max_pixels
        # Uncompressed, a pixel with 8 bits a channel takes at most 4 bytes. Larger files are not
        # read.
        self._max_bytes = 4 * max_pixels + _EXTRA_BYTES
        tree = trees.read_tree(directory)
        self.listed = _images_of(tree)
        self.notes: list[str] = []
        if tree.skipped_links:
            shown = ", ".join(tree.skipped_links[:_MAX_SHOWN])
            if len(tree.skipped_links) > _MAX_SHOWN:
                shown += ", …"
            self.notes.append(
                f"{len(tree.skipped_links)} links to directories that are already listed under "
                f"another path are skipped: {shown}"
            )
        files = list(self.listed)
        parts, skipped = _below_single_directories([path.split("/") for path in files])
        if skipped:
            self.notes.append(f"reads {skipped}/, the only directory")
        tops = {part[0] for part in parts if len(part) > 1}
        if not tops:
            raise StageError(
                f"--source=folder:{directory}: {len(files)} images and no class directories; "
                "expected <class>/FILE or <split>/<class>/FILE: make a directory for each class, "
                "even for a single one"
            )
        splits = {top: split_named(top) for top in tops}
        has_splits = UNSPLIT not in splits.values()
        deep = {part[0] for part in parts if len(part) > 2 and splits[part[0]] in ("train", "test")}
        if deep and not has_splits:
            others = sorted(top for top in tops if splits[top] == UNSPLIT)
            raise StageError(
                f"--source=folder:{directory}: {min(deep)}/ looks like a split, {others[0]}/ like "
                "a class; expected only splits or only classes at the top level: move one of them"
            )
        num_levels = 2 if has_splits else 1
        default = in_order(splits.values())[0] if has_splits else UNSPLIT
        records = []  # (split, path, class)
        for path, part in zip(files, parts, strict=True):
            class_name = part[num_levels - 1] if len(part) > num_levels else ""
            split = splits[part[0]] if has_splits and len(part) > 1 else default
            records.append((split, path, class_name))
        order = {split: i for i, split in enumerate(in_order({r[0] for r in records}))}
        records.sort(key=lambda record: (order[record[0]], record[1]))
        classes = sorted({record[2] for record in records} - {""})
        # Part of the fingerprint, so that a set which an earlier version read differently from the
        # same files has another id.
        self._choices = b"below " + os.fsencode(skipped) if skipped else b""
        if all(re.fullmatch("[0-9]+", name) for name in classes):
            by_number = sorted(classes, key=int)  # Class "10" is number 10 and not number 2.
            self._choices += b" classes by number" if by_number != classes else b""
            classes = by_number
        self.class_names = [name.encode(errors="backslashreplace").decode() for name in classes]
        labels = {name: label for label, name in enumerate(classes)}
        self._paths = [record[1] for record in records]
        self._labels = np.array([labels.get(record[2], -1) for record in records], np.int64)
        self.split_sizes = dict(collections.Counter(record[0] for record in records))
        self._scanned: tuple[str, tuple[int, int, int]] | None = None

    def listing(self) -> dict[str, str]:
        """Path below the directory -> current stamp of each image file."""
        try:
            return _images_of(trees.read_tree(self._directory))
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def _refusal(self, path: str) -> str:
        """The reason why a file is not read; "" if it is read."""
        num_bytes = stamps.num_bytes(self.listed[path])
        if num_bytes is None and self.listed[path].startswith("is "):
            return f"{self.listed[path]}, expected a file"  # Reached through a link.
        if num_bytes is not None and num_bytes > self._max_bytes:
            return (
                f"{num_bytes:,} bytes, expected at most {self._max_bytes:,}: 4 a pixel and a "
                "mebibyte; --max_image_pixels allows more"
            )
        return ""

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[BinaryIO]:
        """Opens a file that `_refusal` does not refuse.

        Raises:
          SourceChanged: the file does not match its listed stamp.
          OSError: the file cannot be read.
        """
        full, listed = files_lib.join(self._directory, path), self.listed[path]
        try:
            if files_lib.is_url(full):
                data = files_lib.read_bytes(full)
                if not stamps.may_be_of(data, listed):
                    raise source.changed(full)
                file = io.BytesIO(data)
            else:
                file = files_lib.open_read(full)
        except OSError as error:
            if stamps.of_path(full) != listed:
                raise source.changed(full) from error
            raise
        with file:
            try:
                yield file
            finally:  # After a failure too.
                if not files_lib.is_url(full) and stamps.of_open(file) != listed:
                    raise source.changed(full)

    def _scan(self) -> tuple[str, tuple[int, int, int]]:
        """Fingerprint and most frequent shape, from one pass over all files."""
        if self._scanned is None:

            def scan_file(path: str) -> tuple[bytes, tuple[int, ...] | str]:
                if refusal := self._refusal(path):
                    size = stamps.num_bytes(self.listed[path])
                    return hashlib.sha256(str(size).encode()).digest(), refusal
                digest = hashlib.sha256()
                try:
                    with self._opened(path) as file:
                        while block := file.read(_HASH_BYTES):
                            digest.update(block)
                        file.seek(0)
                        shape, is_turned = shape_of(file, self._max_pixels)
                        if is_turned:  # An earlier version stored these images as they lie.
                            digest.update(b"upright")
                except OSError as error:  # A broken link; its record will be quarantined.
                    return b"", str(error)
                except ValueError as error:
                    shape = str(error)
                return digest.digest(), shape

            digest, shapes, reason = hashlib.sha256(), collections.Counter(), ""
            digest.update(self._choices)
            with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
                for path, (content, shape) in zip(
                    self._paths, pool.map(scan_file, self._paths), strict=True
                ):
                    digest.update(os.fsencode(path) + b"\0" + content)
                    if isinstance(shape, str):
                        reason = reason or f"{path}: {shape}"
                    else:
                        shapes[shape] += 1
            if not shapes:
                raise StageError(
                    f"--source=folder:{self._directory}: none of its {len(self._paths)} images "
                    f"can be opened ({reason}); expected PNG, JPEG or another format that Pillow "
                    "reads: convert the images, or name another directory"
                )
            shape, _ = max(shapes.items(), key=lambda item: (item[1], item[0]))
            self._scanned = digest.hexdigest(), shape
        return self._scanned

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The most frequent image shape."""
        return self._scan()[1]

    def fingerprint(self) -> str:
        """sha256 over paths and contents of all images, and over choices made in reading them."""
        return self._scan()[0]

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """Paths below the directory."""
        return [self._paths[index].encode(errors="backslashreplace") for index in indices]

    def where(self, index: int) -> str:
        """The file."""
        return files_lib.join(self._directory, self._paths[index])

    def read(self, indices: np.ndarray) -> tuple[source.OneByOne, np.ndarray]:
        """Decodes the files at `indices`, each on access."""
        images = source.OneByOne(lambda i: self._image(int(indices[i])), len(indices))
        return images, self._labels[indices]

    def _image(self, index: int) -> np.ndarray | source.Unreadable:
        path = self._paths[index]
        if self._labels[index] < 0:
            return source.Unreadable(_NO_CLASS)
        if refusal := self._refusal(path):
            return source.Unreadable(refusal)
        try:
            with self._opened(path) as file:
                data = file.read()
            return decode(data, self._max_pixels)
        except (ValueError, OSError) as error:
            return source.Unreadable(str(error))


def _below_single_directories(parts: list[list[str]]) -> tuple[list[list[str]], str]:
    """Paths without the directories that hold all others, as an archive leaves them.

    Args:
      parts: directories and file name of each path.

    Returns:
      The paths below those directories.
      The directories that are left out, with slashes; "" if there are none.
    """
    skipped = []
    while parts and all(len(part) > 2 for part in parts):
        tops = {part[0] for part in parts}
        if len(tops) > 1 or split_named(parts[0][0]) != UNSPLIT:
            break
        skipped.append(parts[0][0])
        parts = [part[1:] for part in parts]
    return parts, "/".join(skipped)


def _images_of(tree: trees.Tree) -> dict[str, str]:
    return {p: stamp for p, stamp in tree.stamps.items() if p.lower().endswith(_EXTENSIONS)}


def open_folder(directory: str, options: SourceOptions = DEFAULTS) -> FolderSource:
    """The image set in a directory of image files.

    Args:
      directory: local path or URL. If all its subdirectories are named after splits (train,
        test, val, …), they hold the class directories; else they are the class directories.
      options: see SourceOptions.

    Raises:
      StageError: no such directory, no images, or ambiguous class directories.
    """
    if not directory:
        raise UsageError("--source=folder: names no directory; write --source=folder:DIR")
    if not files_lib.is_dir(directory):
        raise StageError(
            f"--source=folder:{directory}: no such directory; expected a directory of "
            "images: name another one"
        )
    return FolderSource(directory.rstrip("/") or "/", options.max_image_pixels)
