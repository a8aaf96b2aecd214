"""Parquet files: a column of images, and one of labels, as the dataset hubs publish them.

The parts are in parquet_files: which files belong together, which columns are read, and the copy
that records are read from.
"""

import collections
import functools
import hashlib
import json
import os

import numpy as np
import pyarrow as pa

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import source
from pipeline.sources.image_file import decode
from pipeline.sources.memory import Facts, Memory
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.readers.parquet_files import (
    classes,
    copying,
    listing,
    looking,
    reading,
    remembering,
    values,
)
from pipeline.sources.readers.parquet_files import columns as columns_lib
from pipeline.sources.readers.parquet_files.heads import Heads, heads_of
from pipeline.sources.splits import UNSPLIT
from pipeline.storage import files

# Pixels in lists that never exceed one of these are probably not of 0 to 255, as in npz files.
_DARK = (1, 16)


class ParquetSource:
    """A source over the rows of Parquet files."""

    def __init__(self, place: str, options: SourceOptions = DEFAULTS, memory: Memory | None = None):
        """Finds the columns, and copies them.

        Args:
          place: FILE, DIR or GLOB, local or a URL.
          options: see SourceOptions.
          memory: what an earlier job found; unchanged files are copied when their images are
            asked for.

        Raises:
          UsageError: --label_column has to name a column, or a column states splits.
          StageError: no files, damaged files, or files that are no image set.
          SourceChanged: a file changed while it was copied.
        """
        self._place, self._where, self._options = place, f"--source=parquet:{place}", options
        self._listing = listed_files = listing.list_files(place)
        if not listed_files.stamps:
            raise StageError(
                f"{self._where}: no such Parquet files; expected a file, a directory with "
                f"{', '.join(listing.ENDINGS)} files below, or a pattern such as "
                "DIR/train-*.parquet: mend the path"
            )
        splits = listing.splits_of(listed_files, self._where)
        self._paths = list(splits)
        self.listed = {path: listed_files.stamps[path] for path in self._paths}
        self.ignored = listed_files.ignored

        def read_schema(path: str) -> pa.Schema:
            with reading.opened(listed_files.full(path), self.listed[path]) as parquet:
                return parquet.schema_arrow

        schemas = remembering.schemas_in(memory, self.listed)
        others = [path for path in self._paths if path not in schemas]
        read_schemas = files.each(listed_files.root, read_schema, others)
        schemas |= zip(others, read_schemas, strict=True)
        self._schemas = schemas = {path: schemas[path] for path in self._paths}
        columns = columns_lib.find(
            schemas,
            self._where,
            requested=options.label_column,
            is_labelled=options.labels != "none",
        )
        if columns.label is None and options.labels != "none":
            listing.refuse_labels_in_names(listed_files, self._where)
        self._reading = remembering.reading_of(columns)
        self._known = remembering.known_in(memory, self.listed, self._reading)
        self._before = memory.about["reader"] if memory is not None else {"paths": [], "parts": []}
        stamp_by_path = {listed_files.full(path): stamp for path, stamp in self.listed.items()}
        split_by_path = dict(zip(stamp_by_path, splits.values(), strict=True))
        known = {listed_files.full(path): known.rows for path, known in self._known.items()}
        new = {path: stamp for path, stamp in stamp_by_path.items() if path not in known}
        looking.refuse_splits_in_rows(split_by_path, new, columns)
        if not looking.repeat(rows.labels for rows in known.values()):
            looking.refuse_distinct(stamp_by_path, columns, self._where)
        self._copy = copying.Copy(stamp_by_path, columns, options, known)
        self._labels = self._copy.labels
        sizes = collections.Counter[str]()
        for split, size in zip(splits.values(), np.diff(self._copy.starts).tolist(), strict=True):
            sizes[split] += size
        self.split_sizes = {split: size for split, size in sizes.items() if size}
        self.notes = [*listed_files.notes, *columns.notes]
        self.class_names: list[str] = []
        if columns.label is not None:
            named = classes.name_classes(self._copy, columns, schemas, self._where)
            self._labels, self.class_names = named.labels, named.class_names
            self.notes += named.notes
        if UNSPLIT not in sizes:
            counts = collections.Counter(splits.values())
            shown = ", ".join(f"{n:,} of {split}" for split, n in counts.items())
            self.notes.append(f"files are of the splits that their paths name: {shown}")
        if dark := next((limit for limit in _DARK if 0 < self._copy.highest <= limit), None):
            self.notes.append(
                f"warning: pixels are at most {self._copy.highest} of 255, nearly black, and "
                "stored as they are; a column that is written again with "
                f"(255 * x / {dark}).round() makes {dark} white"
            )

    def listing(self) -> dict[str, str]:
        """Path -> current stamp of each file."""
        try:
            return listing.list_files(self._place).stamps
        except (FileNotFoundError, NotADirectoryError):
            return {}

    @functools.cached_property
    def _heads(self) -> list[Heads]:
        """The headers of all images, by file."""
        known = [self._known.get(path) for path in self._paths]
        return [
            one.heads if one else heads_of(self._copy, number, self._options)
            for number, one in enumerate(known)
        ]

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """The most frequent image shape, by the headers of all images; adds to `notes`."""
        shapes = collections.Counter[tuple[int, int, int]]()
        for heads in self._heads:
            for shape, count in heads.shapes:
                shapes[shape] += count
        if not shapes:
            places = zip(self._copy.starts.tolist(), self._heads, strict=False)
            first, row, reason = next((n, *h.refused) for n, h in places if h.refused)
            raise StageError(
                f"{self._where}: none of its {len(self._labels):,} images can be read "
                f"({self.where(first + row)}: {reason}); expected PNG, JPEG or another format that "
                "Pillow reads, or pixels in lists: write the table again"
            )
        if len(shapes) > 1:
            shown = (f"{'×'.join(map(str, s))} ({n:,})" for s, n in shapes.most_common(5))
            more = ", …" if len(shapes) > 5 else ""
            self.notes.append(f"images are of {len(shapes):,} shapes: {', '.join(shown)}{more}")
        if num_of_16_bits := sum(heads.num_of_16_bits for heads in self._heads):
            self.notes.append(
                f"{num_of_16_bits:,} images of 16 bits are scaled to 8 bits: 65535 becomes 255"
            )
        if num_tiffs := sum(heads.num_tiffs for heads in self._heads):
            self.notes.append(f"{num_tiffs:,} TIFFs go to quarantine: --allow_tiff reads them")
        return max(shapes.items(), key=lambda item: (item[1], item[0]))[0]

    @functools.cached_property
    def _parts(self) -> list[bytes]:
        """Digests of the parts of all images, one after another.

        Those of the first files that have not changed are in the memory.
        """
        copy, before = self._copy, self._before
        num_same = remembering.num_same(before["paths"], self._paths, self._known)
        parts = [bytes.fromhex(part) for part in before["parts"]]
        if num_same < max(len(before["paths"]), len(self._paths)):
            # The last part that is equal may end in a file that is not.
            num_bytes = int(copy.offsets[copy.starts[num_same]])
            parts = parts[: num_bytes // arrays.HASH_BYTES]
        return [*parts, *arrays.part_digests(copying.Bytes(copy), len(parts))]

    def fingerprint(self) -> str:
        """sha256 over paths below DIR, images, labels and class names."""
        copy = self._copy
        digest = hashlib.sha256(json.dumps([self.split_sizes, self.class_names]).encode())
        for path, first in zip(self._paths, copy.starts.tolist(), strict=False):
            digest.update(os.fsencode(path) + f"\0{first};".encode())
        for array, dtype in ((self._labels, "<i8"), (copy.offsets, "<i8"), (copy.shapes, "<i4")):
            digest.update(np.ascontiguousarray(array, dtype))
        for part in self._parts:
            digest.update(part)
        if any(heads.num_tiffs for heads in self._heads):  # Earlier versions read them.
            digest.update(b"without TIFFs")
        return digest.hexdigest()

    def file_numbers(self, indices: np.ndarray) -> np.ndarray:
        """The place of each record's file in `listed`."""
        return np.searchsorted(self._copy.starts, indices, side="right") - 1

    def ways(self) -> list[str]:
        """How the rows of each file are read, and the names of the classes of its labels."""
        ways, names = [], self.class_names
        for first, rows in zip(self._copy.starts.tolist(), self._copy.rows, strict=False):
            _, places = np.unique(rows.labels, return_index=True)
            labels = self._labels[first + places].tolist()
            own = [names[label] if 0 <= label < len(names) else min(label, 0) for label in labels]
            digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()
            ways.append(f"{digest} {self._reading}")
        return ways

    def facts(self) -> Facts:
        """Schemas, the places of rows in the copy, labels, and headers."""
        columns = remembering.columns_of(list(self._schemas.values()), self._copy.rows, self._heads)
        about = {
            "reading": self._reading,
            "paths": self._paths,
            "parts": [part.hex() for part in self._parts],
        }
        return Facts(columns, np.ones(len(self._paths), bool), about)

    def _places(self, indices: np.ndarray) -> list[tuple[str, int]]:
        """The file of each record, and its row."""
        numbers = self.file_numbers(indices)
        rows = indices - self._copy.starts[numbers]
        pairs = zip(numbers.tolist(), rows.tolist(), strict=True)
        return [(self._paths[number], row) for number, row in pairs]

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """`<path below DIR>#<row>`."""
        places = self._places(indices)
        return [f"{path}#{row}".encode(errors="backslashreplace") for path, row in places]

    def where(self, index: int) -> str:
        """The file and the row."""
        [(path, row)] = self._places(np.array([index]))
        return f"{self._listing.full(path)}#{row}"

    def read(self, indices: np.ndarray) -> tuple[source.OneByOne, np.ndarray]:
        """Decodes the images at `indices`, each on access."""
        copy, labels = self._copy, self._labels[indices]
        copy.load(np.unique(self.file_numbers(indices)).tolist())
        # As Python's numbers, which cost less to look at one by one.
        firsts, ends = copy.offsets[indices].tolist(), copy.offsets[indices + 1].tolist()
        rows = list(zip(firsts, ends, copy.shapes[indices].tolist(), labels.tolist(), strict=True))
        return source.OneByOne(lambda i: self._image(*rows[i]), len(rows)), labels

    def _image(
        self, first: int, end: int, shape: list[int], label: int
    ) -> np.ndarray | source.Unreadable:
        """The image in the bytes `first` to `end` − 1 of the copy."""
        if not source.UNLABELLED <= label < len(self.class_names):
            what = "that is no whole number" if label == values.NOT_WHOLE else f"{label}"
            return source.Unreadable(f"label {what}, expected -1 to {len(self.class_names) - 1}")
        data, options = self._copy.read(first, end), self._options
        try:
            if values.is_encoded(shape):
                return decode(
                    data,
                    options.max_image_pixels,
                    options.background,
                    allow_tiff=options.allow_tiff,
                )
        except ValueError as error:
            return source.Unreadable(str(error))
        if values.is_fault(shape):
            return source.Unreadable(data.decode())
        return np.frombuffer(data, np.uint8).reshape(shape)


def open_parquet(
    place: str, options: SourceOptions = DEFAULTS, memory: Memory | None = None
) -> ParquetSource:
    """The image set in Parquet files.

    Args:
      place: FILE, DIR or GLOB, local or a URL. Names of files, and of directories below DIR,
        state the splits.
      options: see SourceOptions.
      memory: see ParquetSource.

    Raises:
      UsageError: --label_column has to name a column.
      StageError: no such files, or no image set.
    """
    if not place:
        raise UsageError("--source=parquet: names no file; write --source=parquet:FILE_DIR_OR_GLOB")
    return ParquetSource(place, options, memory)
