"""CSV files that are as an earlier job found them: opened when a record is asked for."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.sources import source
from pipeline.sources.memory import Facts, Memory
from pipeline.sources.readers import arrays
from pipeline.storage import files, stamps

# The stamp of a directory, and of a file that is told by its name to be no CSV.
DIRECTORY, OTHER = "directory", ""


def entries_of(path: str, is_csv: Callable[[str], Any]) -> dict[str, str]:
    """All that decides what is read at a path.

    Args:
      path: FILE or DIR, local or a URL.
      is_csv: whether a file of this name is opened.

    Returns:
      Path of the file, or of each file and directory in DIR -> stamp, DIRECTORY, or OTHER.
    """
    if not files.is_dir(path):
        return {path: stamps.of_path(path)}

    def stamp_of(entry: str) -> str:
        if files.is_dir(entry):
            return DIRECTORY
        return stamps.of_path(entry) if is_csv(entry.rpartition("/")[2]) else OTHER

    names = [name for name in files.list_names(path) if not name.startswith(".")]
    paths = [files.join(path, name) for name in names]
    return dict(zip(paths, files.each(path, stamp_of, paths), strict=True))


class UnchangedCsv:
    """The source over CSV files that have not changed since a memory was made."""

    def __init__(self, memory: Memory, entries: Mapping[str, str], open_again: Callable[[], Any]):
        """Reads nothing.

        Args:
          memory: of the same `entries`; see `is_as_before`.
          entries: see `entries_of`.
          open_again: opens the same CsvSource.
        """
        about = memory.about["reader"]
        self._memory, self._open_again = memory, open_again
        self.listed = {path: entries[path] for path in about["paths"]}
        self.split_sizes: dict[str, int] = dict(about["split_sizes"])
        self.class_names: Sequence[str] = about["class_names"]
        self.image_shape: tuple[int, int, int] = tuple(about["image_shape"])
        self.notes: list[str] = about["notes"]
        self.ignored: dict[str, int] = about["ignored"]
        self._starts = np.cumsum([0, *self.split_sizes.values()])

    @functools.cached_property
    def _opened(self) -> Any:
        """The source over the open files; raises SourceChanged if they are others by now."""
        opened = self._open_again()
        for path, stamp in self.listed.items():
            if opened.listed.get(path) != stamp:
                raise source.changed(path)
        # Labels that are words have numbers by the names of all classes.
        if list(opened.class_names) != list(self.class_names):
            raise source.changed(next(iter(self.listed)))
        return opened

    def listing(self) -> dict[str, str]:
        """Path -> current stamp of each file."""
        return stamps.of_paths(self.listed)

    def fingerprint(self) -> str:
        """See CsvSource."""
        return self._memory.about["fingerprint"]

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """See CsvSource."""
        if self._memory.about["reader"]["has_ids"]:
            return self._opened.ids(indices)
        return arrays.number_ids([s.encode() for s in self.split_sizes], self._starts, indices)

    def where(self, index: int) -> str:
        """The file and the line."""
        return self._opened.where(index)

    def read(self, indices: np.ndarray) -> tuple[list[np.ndarray | source.Unreadable], np.ndarray]:
        """Parses the rows at `indices`."""
        return self._opened.read(indices)

    def file_numbers(self, indices: np.ndarray) -> np.ndarray:
        """The place of each record's file in `listed`."""
        return np.searchsorted(self._starts, indices, side="right") - 1

    def ways(self) -> list[str]:
        """How the rows of each file are read."""
        return self._memory.about["reader"]["ways"]

    def facts(self) -> Facts:
        """Those of the memory."""
        return Facts({}, np.ones(len(self.listed), bool), self._memory.about["reader"])


def is_as_before(memory: Memory, entries: Mapping[str, str]) -> bool:
    """Whether a memory is of the same entries, and none of them can have changed."""
    return memory.about["is_settled"] and memory.about["reader"]["entries"] == dict(entries)
