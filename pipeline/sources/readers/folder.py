"""Folders of image files: `train/<class>/*`, `<class>/*`, `train/*` or images alone."""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import source
from pipeline.sources.image_file import EXTENSIONS, Header, RefusedNow, decode, read_header
from pipeline.sources.memory import Facts, Memory
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers.folder_tree import oddities
from pipeline.sources.readers.folder_tree.contents import Contents
from pipeline.sources.readers.folder_tree.layout import find_layout
from pipeline.sources.readers.folder_tree.places import Place, directory_of, printable
from pipeline.sources.splits import in_order
from pipeline.storage import files as files_lib
from pipeline.storage import stamps, trees

# A directory that macOS adds to an archive; its files describe the others.
_NO_IMAGES = "__MACOSX"
# An ending in the account of files that are not read. "scan.0001" and "at 10.30 o'clock" have none.
_ENDING = re.compile(r"(?=.*[a-z])\.[a-z0-9]{1,8}")
# Files read in parallel for the fingerprint: enough to keep an object store or a network disk busy.
_NUM_THREADS = 8
# Files that a thread reads in one task: a task a file costs as much as a small file does.
_FILES_AT_A_TIME = 32
_HASH_BYTES = 1 << 16
# Allowance for data beside the pixels: profiles, thumbnails, text.
_EXTRA_BYTES = 1 << 20
# Skipped links that a note names.
_MAX_SHOWN = 3


class FolderSource:
    """A source over image files; their directories are splits and classes."""

    def __init__(
        self, directory: str, options: SourceOptions = DEFAULTS, memory: Memory | None = None
    ):
        """Lists the files.

        Args:
          directory: local path or URL.
          options: see SourceOptions.
          memory: what an earlier job found; unchanged files are opened to decode them alone.

        Raises:
          UsageError: directories that have more than one meaning.
          StageError: no images.
        """
        # Pillow warns of damage, which is quarantined, and of harmless oddities.
        warnings.filterwarnings("ignore", module="PIL")
        self._directory, self._options, self._memory = directory, options, memory
        self._is_url, self._prefix = files_lib.is_url(directory), files_lib.join(directory, "")
        # Uncompressed, a pixel with 8 bits a channel takes at most 4 bytes. Larger files are not
        # read.
        self._max_bytes = 4 * options.max_image_pixels + _EXTRA_BYTES
        tree = trees.read_tree(directory)
        self.listed = _images_of(tree)
        ignored = [path for path in tree.stamps if path not in self.listed]
        self.ignored = collections.Counter(map(_ending, ignored))
        where = f"--source=folder:{directory}"
        if not self.listed:
            others = ", ".join(
                f"{number:,} {ending or 'without an ending'}"
                for ending, number in self.ignored.most_common()
            )
            raise StageError(
                f"{where}: 0 images among {self.ignored.total():,} files"
                f"{f' ({others})' if others else ''}; expected files that end in "
                f"{', '.join(EXTENSIONS[:3])} or another of Pillow's endings: name another "
                "directory, or convert the images"
            )
        layout = find_layout(self.listed, options, where)
        self.notes: list[str] = []
        if tree.skipped_links:
            shown = printable(", ".join(tree.skipped_links[:_MAX_SHOWN]))
            if len(tree.skipped_links) > _MAX_SHOWN:
                shown += ", …"
            self.notes.append(
                f"{len(tree.skipped_links)} links to directories that are already listed under "
                f"another path are skipped: {shown}"
            )
        self.notes += layout.notes
        self.notes += oddities.of_directories(
            (path for path in ignored if _NO_IMAGES not in path.split("/")), layout.places
        )
        self._choices = layout.choices
        self.class_names = [
            name.encode(errors="backslashreplace").decode() for name in layout.class_names
        ]
        labels = {name: label for label, name in enumerate(layout.class_names)}
        self._places = layout.places
        paths = collections.defaultdict(list)  # Split -> its files in order.
        for path in self.listed:
            paths[self._place(path).split].append(path)
        self.split_sizes = {split: len(paths[split]) for split in in_order(paths)}
        self._paths = [path for split in self.split_sizes for path in paths[split]]
        self.listed = {path: self.listed[path] for path in self._paths}
        self._labels = np.array(
            [labels.get(self._place(path).class_name, source.UNLABELLED) for path in self._paths],
            np.int64,
        )

    def _place(self, path: str) -> Place:
        return self._places[directory_of(path)]

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
        full, listed = self._prefix + path, self.listed[path]
        try:
            if self._is_url:
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
                if not self._is_url and stamps.of_open(file) != listed:
                    raise source.changed(full)

    def _scan_file(self, path: str) -> tuple[bytes, Header | str]:
        """A digest of a file, and its header or the reason why the image is not read."""
        if refusal := self._refusal(path):
            size = stamps.num_bytes(self.listed[path])
            return hashlib.sha256(str(size).encode()).digest(), refusal
        digest = hashlib.sha256()
        options = self._options
        try:
            with self._opened(path) as file:
                block = file.read(_HASH_BYTES)
                # Most files fit in a block, and are not read again for the header.
                image = io.BytesIO(block) if len(block) < _HASH_BYTES else file
                while block:
                    digest.update(block)
                    block = file.read(_HASH_BYTES)
                image.seek(0)
                header = read_header(
                    image,
                    options.max_image_pixels,
                    options.background,
                    allow_tiff=options.allow_tiff,
                )
                # Earlier versions stored turned images as they lie, and refused 16 bits of grey.
                digest.update(b"upright" if header.is_turned else b"")
                if header.is_of_deep_colour:
                    self._check_pixels(image)
                elif header.is_of_16_bits:
                    digest.update(b"16 bits")
        except RefusedNow as error:
            digest.update(b"refused")
            header = str(error)
        except OSError as error:  # A broken link; its record will be quarantined.
            return b"", str(error)
        except ValueError as error:
            header = str(error)
        return digest.digest(), header

    def _check_pixels(self, image: BinaryIO) -> None:
        """Raises a RefusedNow if the pixels tell; other faults do not change the fingerprint."""
        image.seek(0)
        try:
            self._decode(image.read())
        except RefusedNow:
            raise
        except ValueError:
            pass

    def _scan_files(self, paths: list[str]) -> list[tuple[bytes, Header | str]]:
        return [self._scan_file(path) for path in paths]

    def _num_threads(self, paths: list[str]) -> int:
        """Several if reading waits for a disk or a network; else threads slow each other down."""
        if self._is_url:
            return _NUM_THREADS
        self._scan_files(paths[:1])  # Imports Pillow.
        start, busy_start = time.perf_counter(), time.thread_time()
        self._scan_files(paths[1 : 1 + _FILES_AT_A_TIME])
        waits = time.perf_counter() - start > 2 * (time.thread_time() - busy_start)
        return _NUM_THREADS if waits else 1

    @functools.cached_property
    def _contents(self) -> Contents:
        """Digests and headers: those of unchanged files from the memory, others from a pass.

        The pass also adds to `notes`.
        """
        contents, places = Contents(len(self._paths)), list(range(len(self._paths)))
        if self._memory is not None:
            rows = self._memory.rows_of(self.listed)
            contents.recall(self._memory, rows)
            places = np.flatnonzero(rows < 0).tolist()
        paths = [self._paths[place] for place in places]
        starts = range(0, len(paths), _FILES_AT_A_TIME)
        tasks = [paths[start : start + _FILES_AT_A_TIME] for start in starts]
        with concurrent.futures.ThreadPoolExecutor(self._num_threads(paths)) as pool:
            scanned = itertools.chain.from_iterable(pool.map(self._scan_files, tasks))
            for place, (digest, header) in zip(places, scanned, strict=True):
                contents.add(place, digest, header)
        if not contents.shapes():
            place, reason = contents.first_refused()
            raise StageError(
                f"--source=folder:{self._directory}: none of its {len(self._paths)} images "
                f"can be opened ({printable(f'{self._paths[place]}: {reason}')}); expected PNG, "
                "JPEG or another format that Pillow reads: convert the images, or name another "
                "directory"
            )
        self.notes += contents.notes(self._paths) + oddities.of_files(self._paths, self._places)
        return contents

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The most frequent image shape."""
        return self._contents.shapes()[0][0]

    def fingerprint(self) -> str:
        """sha256 over paths and contents of all images, and over choices made in reading them."""
        digest = hashlib.sha256(self._choices)
        for place, path in enumerate(self._paths):
            digest.update(os.fsencode(path) + b"\0" + self._contents.digest_of(place))
        return digest.hexdigest()

    def file_numbers(self, indices: np.ndarray) -> np.ndarray:
        """The place of each record's file in `listed`."""
        return indices

    def ways(self) -> list[str]:
        """What the directory of each listed file says of its record."""
        ways = {
            directory: json.dumps([place.split, place.class_name, place.fault])
            for directory, place in self._places.items()
        }
        return [ways[directory_of(path)] for path in self._paths]

    def facts(self) -> Facts:
        """Digests and headers."""
        return Facts(*self._contents.columns())

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """Paths below the directory."""
        return [self._paths[index].encode(errors="backslashreplace") for index in indices]

    def where(self, index: int) -> str:
        """The file."""
        return self._prefix + self._paths[index]

    def read(self, indices: np.ndarray) -> tuple[source.OneByOne, np.ndarray]:
        """Decodes the files at `indices`, each on access."""
        images = source.OneByOne(lambda i: self._image(int(indices[i])), len(indices))
        return images, self._labels[indices]

    def _image(self, index: int) -> np.ndarray | source.Unreadable:
        path = self._paths[index]
        if reason := self._place(path).fault or self._refusal(path):
            return source.Unreadable(reason)
        try:
            with self._opened(path) as file:
                data = file.read()
            return self._decode(data)
        except (ValueError, OSError) as error:
            return source.Unreadable(str(error))

    def _decode(self, data: bytes) -> np.ndarray:
        options = self._options
        return decode(
            data, options.max_image_pixels, options.background, allow_tiff=options.allow_tiff
        )


def _images_of(tree: trees.Tree) -> dict[str, str]:
    """Path -> stamp of the images in a tree."""
    return {
        path: stamp
        for path, stamp in tree.stamps.items()
        if path.lower().endswith(EXTENSIONS) and _NO_IMAGES not in path.split("/")
    }


def _ending(path: str) -> str:
    """The ending of a file's name in lower case, such as .txt; "" without an ending."""
    ending = os.path.splitext(path)[1].lower()
    return ending if _ENDING.fullmatch(ending) else ""


def open_folder(
    directory: str, options: SourceOptions = DEFAULTS, memory: Memory | None = None
) -> FolderSource:
    """The image set in a directory of image files.

    Args:
      directory: local path or URL. If all its subdirectories are named after splits (train,
        test, val, …), they hold the class directories; else they are the class directories.
        Without class directories, images have no labels. See folder_tree/.
      options: see SourceOptions.
      memory: see FolderSource.

    Raises:
      UsageError: directories that have more than one meaning.
      StageError: no such directory, or no images.
    """
    if not directory:
        raise UsageError("--source=folder: names no directory; write --source=folder:DIR")
    if not files_lib.is_dir(directory):
        raise StageError(
            f"--source=folder:{directory}: no such directory; expected a directory of "
            "images: name another one"
        )
    return FolderSource(directory.rstrip("/") or "/", options, memory)
