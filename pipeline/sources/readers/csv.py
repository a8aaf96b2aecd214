"""CSV files with an image in each row: its pixels, and a label or an id if the file has them."""

import collections
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import source
from pipeline.sources.memory import Facts, Memory
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.readers.csv_table import classes, columns, header, label_column, unchanged
from pipeline.sources.readers.csv_table.table import Table
from pipeline.sources.splits import UNSPLIT, in_order, split_named
from pipeline.storage import stamps

_NAME = re.compile(r".*\.(csv|tsv)(\.gz)?", re.IGNORECASE)


class CsvSource:
    """A source over the rows of CSV files, one file a split."""

    def __init__(
        self,
        tables: Mapping[str, Table],
        options: SourceOptions,
        *,
        notes: Iterable[str] = (),
        ignored: Mapping[str, int] | None = None,
        entries: Mapping[str, str] | None = None,
    ):
        """Decides what the columns hold.

        Args:
          tables: split -> its file.
          options: see SourceOptions.
          notes: see Source.
          ignored: see Source.
          entries: see unchanged.py.

        Raises:
          UsageError: more than one column may hold the labels, or none may.
          StageError: a file holds no images, or image shapes differ.
        """
        self._tables = list(tables.values())
        heads = [table.head for table in self._tables]
        requested = options.label_column
        missing = [
            label_column.missing(head, requested, len(columns.id_like(head))) for head in heads
        ]
        if all(missing):
            raise UsageError(f"--label_column={requested}: {heads[0].path} {missing[0]}")
        for table in self._tables:
            table.decide(options)
        shapes = {t.path: header.shape_of(t.num_pixels) for t in self._tables}
        if len(set(shapes.values())) > 1:
            raise StageError(
                f"image shapes differ between files: {shapes}; expected one shape in the whole set"
            )
        self.image_shape = next(iter(shapes.values()))
        self.split_sizes = dict(zip(tables, map(len, self._tables), strict=True))
        self._starts = np.cumsum([0, *self.split_sizes.values()])
        self._labelled = [t for t in self._tables if t.columns.label is not None]
        self._are_words = classes.are_words(self._labelled)
        _check_order(self._tables)
        self._scanned: tuple[list[str], set[str]] | None = None
        self.listed = {table.path: table.stamp for table in self._tables}
        of_tables = [f"{table.path}: {note}" for table in self._tables for note in table.notes]
        self.notes = [*notes, *of_tables]
        self.ignored, self._entries = dict(ignored or {}), dict(entries or {})

    def listing(self) -> dict[str, str]:
        """Path -> current stamp of each file."""
        return stamps.of_paths(self.listed)

    def _scan(self) -> tuple[list[str], set[str]]:
        """Names of the classes, and paths of files in which more rows are read than before."""
        if self._scanned is None:
            if self._are_words:
                self._scanned = classes.of_words(self._labelled), set()
            else:
                *self._scanned, note = classes.of_numbers(self._labelled)
                self.notes += [note] if note else []
        return self._scanned

    @property
    def class_names(self) -> list[str]:
        """Labels that are words, sorted; else 0 to the highest label; empty without labels."""
        return self._scan()[0]

    def fingerprint(self) -> str:
        """sha256 over the files' bytes, and over what an earlier version decided otherwise."""
        digest = hashlib.sha256()
        for split, table in zip(self.split_sizes, self._tables, strict=True):
            digest.update(f"{split} {len(table)};".encode())
            if table.columns.is_chosen:
                digest.update(f"labels in column {table.columns.label};".encode())
            if table.columns.ids is not None:
                digest.update(f"ids in column {table.columns.ids};".encode())
            if table.columns.label is None:
                digest.update(b"no labels;")
            elif self._are_words:
                digest.update(b"labels are words;")
            elif table.path in self._scan()[1]:
                digest.update(b"numbers as decimals or in quotes;")
            if table.order.places is not None:
                digest.update(b"pixels in the order of names;" + table.order.places.tobytes())
            table.hash_into(digest)
        return digest.hexdigest()

    def file_numbers(self, indices: np.ndarray) -> np.ndarray:
        """The place of each record's file in `listed`."""
        return np.searchsorted(self._starts, indices, side="right") - 1

    def ways(self) -> list[str]:
        """Whether labels are words, for each file: other files decide nothing else about one."""
        return ["words" if self._are_words else "numbers"] * len(self._tables)

    def facts(self) -> Facts:
        """What a source over the same files is, without opening them."""
        about = {
            "entries": self._entries,
            "class_names": self.class_names,  # Their scan adds to the notes.
            "notes": self.notes,
            "ignored": self.ignored,
            "split_sizes": list(self.split_sizes.items()),
            "image_shape": self.image_shape,
            "paths": list(self.listed),
            "ways": self.ways(),
            "has_ids": any(table.columns.ids is not None for table in self._tables),
        }
        others = self._entries.keys() - self.listed.keys()
        stamps_ = [self._entries[path] for path in others]
        read_stamps = [s for s in stamps_ if s not in (unchanged.DIRECTORY, unchanged.OTHER)]
        return Facts({}, np.ones(len(self.listed), bool), about, read_stamps)

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """`<split>-<value of the id column>`, else `<split>-<row, 7 digits>`."""
        prefixes = [split.encode() for split in self.split_sizes]
        ids = arrays.number_ids(prefixes, self._starts, indices)
        if any(table.columns.ids is not None for table in self._tables):
            for position, (table, row) in enumerate(self._rows(indices)):
                if table.columns.ids is not None:
                    split = ids[position].partition(b"-")[0]
                    ids[position] = b"%s-%s" % (split, table.id_of(row))
        return ids

    def _rows(self, indices: np.ndarray) -> Iterator[tuple[Table, int]]:
        """The table and the row in it, for each index."""
        numbers = self.file_numbers(indices)
        rows = indices - self._starts[numbers]
        for number, row in zip(numbers.tolist(), rows.tolist(), strict=True):
            yield self._tables[number], row

    def where(self, index: int) -> str:
        """The file and the line."""
        [(table, row)] = self._rows(np.array([index]))
        return table.where(row)

    def read(self, indices: np.ndarray) -> tuple[list[np.ndarray | source.Unreadable], np.ndarray]:
        """Parses the rows at `indices`."""
        if self._are_words:
            self._scan()
        images, labels = [], np.empty(len(indices), np.int64)
        for position, (table, row) in enumerate(self._rows(indices)):
            image, labels[position] = table.read(row, self.image_shape)
            images.append(image)
        return images, labels


def _check_order(tables: Sequence[Table]) -> None:
    """Raises a StageError if two files may hold the pixels in different orders."""
    for table in tables:
        for other in tables:
            mine, others = table.pixel_names, other.pixel_names
            is_unknown = table.order.places is not None and others is None
            if is_unknown or (mine and others and mine != others and set(mine) == set(others)):
                raise StageError(
                    f"{table.path} and {other.path}: the pixel columns are not in the same order; "
                    "expected one order in the whole set: write the columns of both in one order, "
                    "with names"
                )


def open_csv(
    path: str, options: SourceOptions = DEFAULTS, memory: Memory | None = None
) -> CsvSource | unchanged.UnchangedCsv:
    """The image set in a CSV file, or in a directory with one file for each split.

    csv_table/columns.py decides which columns hold the label, the id and the pixels of a square
    image, row by row.

    Args:
      path: FILE, local or a URL, a set without splits; or DIR, where file names (*train*.csv,
        *test*.csv) state the split.
      options: see SourceOptions.
      memory: what an earlier job found; if all files are unchanged, none is opened.

    Raises:
      UsageError: more than one column may hold the labels, or none may.
      StageError: no such file, or not such a table.
    """
    if not path:
        raise UsageError("--source=csv: names no file; write --source=csv:FILE")
    entries = unchanged.entries_of(path, _NAME.fullmatch)
    if memory is not None and unchanged.is_as_before(memory, entries):
        return unchanged.UnchangedCsv(memory, entries, lambda: open_csv(path, options))
    if list(entries) == [path]:
        return CsvSource({UNSPLIT: Table(path)}, options, entries=entries)
    tables: dict[str, Table] = {}
    names = {entry.rpartition("/")[2]: entry for entry in entries}
    directories = [name for name, entry in names.items() if entries[entry] == unchanged.DIRECTORY]
    notes = [f"directories are not read: {', '.join(directories)}"] if directories else []
    ignored: dict[str, int] = collections.Counter()
    for name in sorted(names.keys() - set(directories)):
        ending = os.path.splitext(name)[1].lower()
        if not _NAME.fullmatch(name):
            ignored[ending] += 1
            continue
        table = Table(names[name])
        if not header.may_hold_pixels(table.head):
            shown = ", ".join((table.head.names or ["without names"])[:5])
            notes.append(
                f"{name} is not read: its {table.head.num_columns} columns ({shown}) hold no pixels"
            )
            ignored[ending] += 1
            continue
        split = split_named(name)
        if split in tables:
            raise StageError(
                f"--source=csv:{path}: {tables[split].path} and {name} belong to the same split; "
                "expected one file for each split: name one file"
            )
        tables[split] = table
    if not tables:
        raise StageError(
            f"--source=csv:{path}: no .csv or .tsv files of images in this directory"
            f"{''.join(f'; {note}' for note in notes)}; expected at least one: name another "
            "directory, or the file itself"
        )
    if UNSPLIT in tables and len(tables) > 1:
        others = ", ".join(table.path for split, table in tables.items() if split != UNSPLIT)
        raise StageError(
            f"--source=csv:{path}: the name of {tables[UNSPLIT].path} states no split (train, "
            f"validation or test), beside {others}; expected one file for each split, since images "
            "in two files would be in two splits: name one file, or move the file away"
        )
    return CsvSource(
        {s: tables[s] for s in in_order(tables)},
        options,
        notes=notes,
        ignored=ignored,
        entries=entries,
    )
