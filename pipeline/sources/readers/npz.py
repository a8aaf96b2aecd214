"""NumPy archives: one with the arrays of all splits, or a directory of archives."""

import contextlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import source
from pipeline.sources.local_file import HEAD_BYTES, OpenFile
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.readers.array_layout import pairs as pairs_lib
from pipeline.sources.readers.array_layout import stored
from pipeline.sources.readers.array_layout.names import parse
from pipeline.sources.splits import UNSPLIT
from pipeline.storage import files, names, stamps

# Raised while reading a damaged or encrypted archive.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError)
# Methods that zipfile decompresses in steps of a bounded size. With LZMA and bzip2, one step can
# turn a few bytes into gigabytes.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# The name that numpy.savez gives to the first array without one.
_NAMELESS = "arr_0"


class _Member(stored.StoredArray):
    """An array of an archive, with only the header read."""

    def __init__(self, archive: "_Archive", key: str):
        """Reads the header.

        Raises:
          StageError: not an array, or of another size than its header states.
        """
        self._archive, self._key = archive, key
        where = f"{archive.path}: {key}"
        info = archive.zip.getinfo(f"{key}.npy")
        if info.compress_type not in _METHODS:
            raise StageError(
                f"{where} is compressed with another method than deflate; save it again with "
                "numpy.savez_compressed or numpy.savez"
            )
        with archive.member(key) as member:
            head = member.read(HEAD_BYTES)
        shape, is_fortran, dtype, self._offset = stored.read_npy_header(head, where)
        super().__init__(where, shape, dtype, is_fortran=is_fortran)
        self.check_numbers()
        self.check_size(info.file_size - self._offset)

    def open(self) -> tuple[OpenFile, int]:
        """Decompresses the array, never unpickled, into an unnamed file."""
        copy = tempfile.TemporaryFile()
        # zipfile yields at most file_size bytes, but may yield fewer.
        with self._archive.member(self._key) as member:
            shutil.copyfileobj(member, copy, 1 << 20)
        self.check_size(copy.tell() - self._offset)
        copy.flush()
        return OpenFile(copy, self._archive.path), self._offset


class _Archive:
    """An open archive."""

    def __init__(self, path: str, where: str, stack: contextlib.ExitStack):
        """Opens the archive.

        Args:
          path: local path or URL.
          where: the source, for messages.
          stack: closes the archive.

        Raises:
          StageError: no such file, no archive, or a member whose name leads elsewhere.
        """
        self.path, self._where = path, where
        try:
            with self._refusing_damage():
                file = stack.enter_context(files.open_read(path))
                self.stamp = stamps.of_open(file)
                self.zip = stack.enter_context(zipfile.ZipFile(file))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise StageError(f"{where}: no such file; expected an .npz archive") from error
        members = self.zip.namelist()
        for member in members:
            names.check(
                member.removesuffix("/"),
                f"{where}: holds a member named",
                "do not extract this archive; save the set again",
            )
        self.keys = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]

    @contextlib.contextmanager
    def _refusing_damage(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError):
            raise
        except _DAMAGED as error:
            raise StageError(
                f"{self._where}: not a complete .npz archive ({error}); download {self.path} again"
            ) from error

    @contextlib.contextmanager
    def member(self, key: str) -> Iterator[zipfile.ZipExtFile]:
        """The bytes of an array, decompressed on reading."""
        with self._refusing_damage(), self.zip.open(f"{key}.npy") as member:
            yield member

    def check_unchanged(self) -> None:
        """Raises SourceChanged if the file has changed since it was opened."""
        if stamps.of_path(self.path) != self.stamp:
            raise source.changed(self.path)


def open_npz(place: str, options: SourceOptions = DEFAULTS) -> arrays.ArraySource:
    """The image set in an .npz archive, or in a directory of archives.

    Args:
      place: FILE, local or a URL, with keys such as x_train and y_train, or images and labels; or
        DIR, where names of files and keys say the same; or DIR/BEGINNING, for the files whose
        names start with BEGINNING.
      options: see SourceOptions.

    Raises:
      UsageError: something that only a flag can decide.
      StageError: no such file, or arrays that are no image set, or ambiguous.
    """
    if not place:
        raise UsageError("--source=npz: names no file; write --source=npz:FILE or npz:DIR")
    where = f"--source=npz:{place}"
    paths, ignored, is_file, directory = [place], {}, True, ""
    if not files.exists(place) or files.is_dir(place):
        directory, beginning = pairs_lib.set_at(place)
        file_names, ignored = pairs_lib.files_of(directory, beginning, ".npz")
        is_file = not file_names and directory != place
        if not file_names and not is_file:
            raise StageError(f"{where}: holds no .npz file; expected at least one: name another")
        paths = [files.join(directory, name) for name in file_names] or paths
    with contextlib.ExitStack() as stack:
        archives = [_Archive(path, where, stack) for path in paths]
        members = {
            name: (archive, key)
            for archive in archives
            for name, key in _names(archive, with_file=not is_file).items()
        }
        names_by_split = pairs_lib.find_pairs(
            members, where, options, place="" if is_file else f"npz:{directory}"
        )
        notes = []
        if not names_by_split and list(members) == [_NAMELESS]:
            names_by_split = {UNSPLIT: {"images": _NAMELESS}}
            notes = [f"reads the only array, {_NAMELESS}, as images"]
        if not names_by_split:
            raise StageError(
                f"{where}: holds {', '.join(members) or 'nothing'}; expected images and labels of "
                "each split, such as x_train and y_train, or train_images and train_labels: save "
                "numpy.savez(FILE, x=images, y=labels)"
            )
        pairs = {
            split: pairs_lib.Pair(
                _Member(*members[kinds["images"]]),
                pairs_lib.open_labels(options, _Member, *members[kinds["labels"]])
                if "labels" in kinds
                else None,
            )
            for split, kinds in names_by_split.items()
        }
        opened = pairs_lib.open_pairs(
            pairs,
            options,
            name=f"npz:{place}",
            notes=[*notes, *pairs_lib.ignored_note(members, names_by_split)],
            listed={archive.path: archive.stamp for archive in archives},
            ignored=ignored,
        )
        for archive in archives:
            archive.check_unchanged()
    return opened


def _names(archive: _Archive, *, with_file: bool) -> dict[str, str]:
    """Name of each array -> its key.

    Args:
      archive: the archive.
      with_file: whether the name of the file is part of the name: alone if the archive holds one
        array and the name says what it holds.
    """
    if not with_file:
        return {key: key for key in archive.keys}
    stem = archive.path.rpartition("/")[2].removesuffix(".npz")
    if len(archive.keys) == 1 and parse(stem).kind:
        return {stem: archive.keys[0]}
    return {f"{stem}/{key}": key for key in archive.keys}
