"""Parquet files: a column of images, and one of labels, as the dataset hubs publish them.

Records of a shard lie all over the files, and Parquet is decoded in pages. So opening a source
copies the images, still encoded, to one unnamed local file, from which records are read one by
one. parquet_columns.py finds the columns and says what their values mean.
"""

import collections
import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import source
from pipeline.sources.image_file import decode, shape_of
from pipeline.sources.local_file import OpenFile
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays, parquet_columns
from pipeline.sources.splits import UNSPLIT, in_order, split_named
from pipeline.storage import files, stamps, trees

_ENDINGS = (".parquet", ".parq", ".pq")
_MAGIC = re.compile(r"[*?[]")
_DAMAGED = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError)
# Bytes that pyarrow reads from a file at once, and decodes to at once.
_READ_BYTES, _BATCH_BYTES, _BATCH_ROWS = 1 << 20, 1 << 24, 1_024
# Beyond this, a chunk of this size is not unpacked: deflate's largest ratio. Rows of images are
# never so much alike.
_MAX_RATIO, _MAX_BOMB_BYTES = 1_032, 1 << 26
# Rows that a byte of a file may hold: nulls and repetitions take a few bits.
_MAX_ROWS_PER_BYTE = 16
# Allowance for data beside the pixels of an image file, as in folder.py.
_EXTRA_BYTES = 1 << 20
_MAX_SHOWN = 3


class _Listing(NamedTuple):
    """The files of a source."""

    root: str  # Directory or URL that holds them all.
    stamps: dict[str, str]  # Path below the root -> stamp, sorted.
    ignored: dict[str, int]  # Ending -> number of other files.
    notes: list[str]

    def full(self, path: str) -> str:
        return files.join(self.root, path) if self.root else path


def _list_files(place: str) -> _Listing:
    """Lists the files of FILE, DIR or GLOB; none if nothing is there."""
    if files.is_dir(place):
        place = place.rstrip("/") or "/"
        tree = trees.read_tree(place)
        found = {p: stamp for p, stamp in tree.stamps.items() if p.lower().endswith(_ENDINGS)}
        others = (os.path.splitext(path)[1].lower() for path in tree.stamps.keys() - found.keys())
        links = tree.skipped_links
        shown = ", ".join(links[:_MAX_SHOWN]) + (", …" if len(links) > _MAX_SHOWN else "")
        note = f"{len(links)} links to directories that are already listed are skipped: {shown}"
        return _Listing(place, found, dict(collections.Counter(others)), [note] if links else [])
    if stamp := stamps.of_path(place):
        root, _, name = place.rpartition("/")
        return _Listing(root or ("/" if place.startswith("/") else ""), {name: stamp}, {}, [])
    parts = place.split("/")
    number = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), None)
    if number is None:
        return _Listing(place, {}, {}, [])
    root = "/".join(parts[:number]) or ("/" if number else ".")
    pattern = _pattern("/".join(parts[number:]))
    tree = trees.read_tree(root) if files.is_dir(root) else trees.Tree({}, [])
    found = {path: stamp for path, stamp in tree.stamps.items() if pattern.fullmatch(path)}
    return _Listing(root, found, {}, [])


def _pattern(glob: str) -> re.Pattern[str]:
    """A shell's pattern: * and ? stop at a slash, **/ is any number of directories."""
    tokens = {"**/": "(?:.*/)?", "*": "[^/]*", "**": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*+|\?|\[!?[^]/]+\])", glob)
    return re.compile(
        "".join(
            tokens.get(part)
            or (part.replace("[!", "[^") if i % 2 and part[0] == "[" else re.escape(part))
            for i, part in enumerate(parts)
        )
    )


def _splits_of(listing: _Listing, where: str, *, is_chosen: bool) -> dict[str, str]:
    """Path -> split, in the order of the records.

    Args:
      listing: the files.
      where: the source, for messages.
      is_chosen: whether the user has named the files that belong together.

    Raises:
      StageError: directories that each are a set, or files with and without a split.
    """
    splits: dict[str, str] = {}
    directories: dict[str, dict[str, None]] = {}  # Split -> directories that are no splits.
    for path in listing.stamps:
        *above, name = path.split("/")
        named = (split_named(part) for part in (name, *reversed(above)))
        splits[path] = next((split for split in named if split != UNSPLIT), UNSPLIT)
        own = "/".join(part for part in above if split_named(part) == UNSPLIT)
        directories.setdefault(splits[path], {})[own] = None
    found = set(splits.values())
    if UNSPLIT in found and len(found) > 1:
        with_split = next(path for path, split in splits.items() if split != UNSPLIT)
        without = next(path for path, split in splits.items() if split == UNSPLIT)
        raise StageError(
            f"{where}: {with_split} names a split, and {without} names none; expected train, "
            "validation or test in the name of each file or of its directory: rename or move "
            "files, or name some, as parquet:DIR/train-*.parquet"
        )
    for split, owners in directories.items():
        if len(owners) > 1 and not is_chosen:
            shown = ", ".join(f"{owner or '.'}/" for owner in list(owners)[:5])
            raise StageError(
                f"{where}: {shown} all hold {'files' if split == UNSPLIT else split}; expected one "
                f"set: name its directory, as parquet:{listing.full(next(filter(None, owners)))}, "
                f"or all files of one set with parquet:{listing.full('**/*.parquet')}"
            )
    order = {split: number for number, split in enumerate(in_order(found))}
    return dict(sorted(splits.items(), key=lambda item: (order[item[1]], item[0])))


class _Reader:
    """Reads Parquet files that must be as they were listed."""

    def __init__(self, listing: _Listing):
        self._listing = listing

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[pq.ParquetFile]:
        full = self._listing.full(path)
        try:
            with files.open_read(full) as file:
                if stamps.of_open(file) != self._listing.stamps[path]:
                    raise source.changed(full)
                head, num_bytes = file.read(4), file.seek(0, io.SEEK_END)
                if head not in (b"PAR1", b"PARE"):
                    raise ValueError(f"{num_bytes:,} bytes that begin with {head!r}, not PAR1")
                file.seek(0)
                yield self._parsed(file, num_bytes)
        except _DAMAGED as error:
            if stamps.of_path(full) != self._listing.stamps[path]:
                raise source.changed(full) from error
            if isinstance(error, OSError) and error.errno in files.FULL:
                raise StageError(
                    f"{tempfile.gettempdir()}: {error.strerror}; images are copied to that "
                    "directory: free some space, or name another one with TMPDIR"
                ) from error
            reason = " ".join(str(error).split())[:300]
            raise StageError(
                f"{full}: not a whole Parquet file that can be read ({reason}); expected one "
                "without encryption: download it or write it again"
            ) from error
        if stamps.of_path(full) != self._listing.stamps[path]:
            raise source.changed(full)

    def _parsed(self, file: BinaryIO, num_bytes: int) -> pq.ParquetFile:
        parquet = pq.ParquetFile(
            file, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
        )
        num_rows = parquet.metadata.num_rows
        if num_rows < 0 or num_rows > _MAX_ROWS_PER_BYTE * num_bytes:
            raise ValueError(f"states {num_rows:,} rows in {num_bytes:,} bytes")
        return parquet

    def schema(self, path: str) -> pa.Schema:
        """The schema of a file, with the types of Arrow."""
        with self._opened(path) as parquet:
            return parquet.schema_arrow

    def batches(self, path: str, names: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a file, so many at a time that they take bounded memory."""
        with self._opened(path) as parquet:
            num_read = 0
            for number in range(parquet.num_row_groups):
                group = parquet.metadata.row_group(number)
                for batch in parquet.iter_batches(
                    batch_size=_rows_at_a_time(group, names),
                    row_groups=[number],
                    columns=names,
                    use_threads=False,
                ):
                    num_read += len(batch)
                    yield batch
            if num_read != parquet.metadata.num_rows:
                raise ValueError(f"states {parquet.metadata.num_rows:,} rows, holds {num_read:,}")


def _rows_at_a_time(group: pq.RowGroupMetaData, names: list[str]) -> int:
    """How many rows of a row group to decode at once; raises a ValueError for a bomb."""
    num_bytes = 0
    for number in range(group.num_columns):
        chunk = group.column(number)
        if not chunk.path_in_schema.startswith(tuple(names)):
            continue
        # A value takes up to 8 bytes in memory, however few it takes in the file.
        unpacked = max(chunk.total_uncompressed_size, 8 * chunk.num_values)
        if unpacked > max(_MAX_BOMB_BYTES, _MAX_RATIO * chunk.total_compressed_size):
            raise ValueError(
                f"{chunk.path_in_schema!r} unpacks from {chunk.total_compressed_size:,} bytes to "
                f"{unpacked:,}, expected at most {_MAX_RATIO:,} times as many"
            )
        num_bytes += max(0, unpacked)
    per_row = num_bytes // max(1, group.num_rows)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, per_row)))


class ParquetSource:
    """A source over the rows of Parquet files."""

    def __init__(self, place: str, options: SourceOptions = DEFAULTS):
        """Finds the columns, and copies them.

        Args:
          place: FILE, DIR or GLOB, local or a URL.
          options: see SourceOptions.

        Raises:
          UsageError: --label_column has to name a column.
          StageError: no files, damaged files, or files that are no image set.
          SourceChanged: a file changed while it was copied.
        """
        self._place, self._where, self._options = place, f"--source=parquet:{place}", options
        self._listing = listing = _list_files(place)
        if not listing.stamps:
            raise StageError(
                f"{self._where}: no such Parquet files; expected a file, a directory with "
                f"{', '.join(_ENDINGS)} files below, or a pattern such as DIR/train-*.parquet: "
                "mend the path"
            )
        self.listed, self.ignored = dict(listing.stamps), listing.ignored
        splits = _splits_of(listing, self._where, is_chosen=not files.is_dir(place))
        self._paths, reader = list(splits), _Reader(listing)
        schemas = files.each(listing.root, reader.schema, self._paths)
        columns = parquet_columns.find(
            dict(zip(self._paths, schemas, strict=True)),
            self._where,
            label_column=options.label_column,
            is_labelled=options.labels != "none",
        )
        self._copy(reader, columns)
        sizes = collections.Counter[str]()
        for split, num_rows in zip(splits.values(), np.diff(self._starts).tolist(), strict=True):
            sizes[split] += num_rows
        self.split_sizes = {split: size for split, size in sizes.items() if size}
        self._name_classes(columns, [dict(zip(s.names, s.types, strict=True)) for s in schemas])
        self.notes = [*listing.notes, *columns.notes, *self._notes(columns, splits)]
        self._shape: tuple[int, int, int] | None = None

    def _copy(self, reader: _Reader, columns: parquet_columns.Columns) -> None:
        """Copies the images of all files to a local file, and keeps labels and offsets."""
        copy = tempfile.TemporaryFile()
        max_pixels = self._options.max_image_pixels
        # Uncompressed, a pixel with 8 bits a channel takes at most 4 bytes.
        max_bytes = 4 * max_pixels + _EXTRA_BYTES
        self._texts: dict[str, int] = {}
        starts, lengths, shapes, labels = [0], [], [], []
        for path in self._paths:
            names = [name for name in (columns.image, columns.label) if name is not None]
            num_rows = 0
            for batch in reader.batches(path, names):
                if not len(batch):
                    continue
                cells = parquet_columns.cells(batch.column(columns.image), max_pixels, max_bytes)
                copy.write(cells.data)
                lengths.append(cells.lengths)
                shapes.append(cells.shapes)
                if columns.label in batch.schema.names:
                    column = batch.column(columns.label)
                    labels.append(parquet_columns.label_numbers(column, self._texts))
                else:
                    labels.append(np.full(len(batch), source.UNLABELLED, np.int64))
                num_rows += len(batch)
            starts.append(starts[-1] + num_rows)
        copy.flush()
        self._file, self._starts = OpenFile(copy, self._where), np.array(starts)
        self._ends = np.cumsum([0, *np.concatenate([*lengths, np.zeros(0, np.int64)])])
        self._shapes = np.concatenate([*shapes, np.zeros((0, 3), np.int32)])
        self._labels = np.concatenate([*labels, np.zeros(0, np.int64)])

    def _name_classes(
        self, columns: parquet_columns.Columns, types: list[Mapping[str, pa.DataType]]
    ) -> None:
        """Sets the class names; labels become positions in them."""
        names, labels = columns.class_names, self._labels
        if self._texts:
            is_numbers = all(re.fullmatch("[0-9]+", text) for text in self._texts)
            found = sorted(self._texts, key=int if is_numbers else str)
            names = names or found
            number = {name: label for label, name in enumerate(dict.fromkeys([*names, *found]))}
            own = np.array([*(number[text] for text in self._texts), -1], np.int64)
            self._labels = labels = own[labels]
        is_bool = all(pa.types.is_boolean(t[columns.label]) for t in types if columns.label in t)
        highest = int(labels.max(initial=-1))
        if highest < 0:
            names = []
        elif not names and is_bool:
            names = ["false", "true"]
        elif not names:
            names = arrays.class_names_up_to(highest, f"{self._where}: {columns.label!r}")
        self.class_names = names

    def _notes(self, columns: parquet_columns.Columns, splits: Mapping[str, str]) -> list[str]:
        """What the files and the labels show."""
        notes = []
        if UNSPLIT not in splits.values():
            counts = collections.Counter(splits.values())
            shown = (f"{s} {n:,} file{'s' if n > 1 else ''}" for s, n in counts.items())
            notes.append(f"the names of files and directories state the splits: {', '.join(shown)}")
        num_unlabelled = int((self._labels == source.UNLABELLED).sum())
        if columns.label and num_unlabelled:
            notes.append(
                f"{num_unlabelled:,} of {len(self._labels):,} records are unlabelled: their label "
                "is missing or -1"
            )
        return notes

    def listing(self) -> dict[str, str]:
        """Path -> current stamp of each file."""
        try:
            return _list_files(self._place).stamps
        except (FileNotFoundError, NotADirectoryError):
            return {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The most frequent image shape, by the headers of all images."""
        if self._shape is None:
            shapes, reason = collections.Counter[tuple[int, int, int]](), ""
            for index, shape in enumerate(self._shapes):
                if parquet_columns.is_fault(shape):
                    reason = reason or f"{self.where(index)}: {self._data(index).decode()}"
                elif not parquet_columns.is_encoded(shape):
                    shapes[tuple(shape.tolist())] += 1
                else:
                    try:
                        data = io.BytesIO(self._data(index))
                        shapes[shape_of(data, self._options.max_image_pixels)[0]] += 1
                    except ValueError as error:
                        reason = reason or f"{self.where(index)}: {error}"
            if not shapes:
                raise StageError(
                    f"{self._where}: none of its {len(self._shapes):,} images can be read "
                    f"({reason}); expected PNG, JPEG or another format that Pillow reads, or "
                    "pixels in lists: write the table again"
                )
            if len(shapes) > 1:
                shown = (f"{'×'.join(map(str, s))} ({n:,})" for s, n in shapes.most_common(5))
                more = ", …" if len(shapes) > 5 else ""
                self.notes.append(f"images of {len(shapes):,} shapes: {', '.join(shown)}{more}")
            self._shape = max(shapes.items(), key=lambda item: (item[1], item[0]))[0]
        return self._shape

    def fingerprint(self) -> str:
        """sha256 over paths below DIR, images, labels and class names."""
        digest = hashlib.sha256(json.dumps([self.split_sizes, self.class_names]).encode())
        for path, first in zip(self._paths, self._starts.tolist(), strict=False):
            digest.update(os.fsencode(path) + f"\0{first};".encode())
        for values, dtype in ((self._labels, "<i8"), (self._ends, "<i8"), (self._shapes, "<i4")):
            digest.update(np.ascontiguousarray(values, dtype))
        arrays.hash_rows(digest, arrays.FileRows(self._file, 0, (self._file.num_bytes,)))
        return digest.hexdigest()

    def _place_of(self, index: int) -> tuple[str, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._paths[number], index - int(self._starts[number])

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """`<path below DIR>#<row>`."""
        places = map(self._place_of, indices.tolist())
        return [f"{path}#{row}".encode(errors="backslashreplace") for path, row in places]

    def where(self, index: int) -> str:
        """The file and the row."""
        path, row = self._place_of(index)
        return f"{self._listing.full(path)}#{row}"

    def read(self, indices: np.ndarray) -> tuple[source.OneByOne, np.ndarray]:
        """Decodes the images at `indices`, each on access."""
        images = source.OneByOne(lambda i: self._image(int(indices[i])), len(indices))
        return images, self._labels[indices]

    def _data(self, index: int) -> bytes:
        return self._file.read(int(self._ends[index]), int(self._ends[index + 1]))

    def _image(self, index: int) -> np.ndarray | source.Unreadable:
        label, num_classes = int(self._labels[index]), len(self.class_names)
        if label == parquet_columns.NOT_WHOLE:
            return source.Unreadable("a label that is no whole number, expected a class number")
        if label < source.UNLABELLED or label >= max(num_classes, 0) > 0:
            return source.Unreadable(f"label {label}, expected -1 to {num_classes - 1}")
        shape, data = self._shapes[index], self._data(index)
        if parquet_columns.is_fault(shape):
            return source.Unreadable(data.decode())
        if not parquet_columns.is_encoded(shape):
            return np.frombuffer(data, np.uint8).reshape(shape)
        try:
            return decode(data, self._options.max_image_pixels, self._options.background)
        except ValueError as error:
            return source.Unreadable(str(error))


def open_parquet(place: str, options: SourceOptions = DEFAULTS) -> ParquetSource:
    """The image set in Parquet files.

    Args:
      place: FILE, DIR or GLOB, local or a URL. Names of files, and of directories below DIR,
        state the splits.
      options: see SourceOptions.

    Raises:
      UsageError: --label_column has to name a column.
      StageError: no such files, or no image set.
    """
    if not place:
        raise UsageError(
            "--source=parquet: names no file; write --source=parquet:FILE, DIR or GLOB"
        )
    return ParquetSource(place, options)
