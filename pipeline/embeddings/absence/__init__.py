"""Finds every file that still names or shows a record that was to be removed.

Directories are listed: a file counts though no manifest names it.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from pipeline.cli.errors import StageError
from pipeline.embeddings.absence import contents, pictures
from pipeline.embeddings.absence.wanted import Wanted, read
from pipeline.stages import pointer, tasks
from pipeline.stages.manifest import MANIFEST, manifest_of
from pipeline.storage import files, trees

__all__ = ["Finding", "Search", "Wanted", "describe", "find", "read"]


class Finding(NamedTuple):
    """A file that names or shows records, or may do so."""

    path: str
    what: str  # "names", "shows", or why the file may hold the records.
    num_records: int  # 0 if the file cannot be read.
    example: str  # An id; the hash of a record where the file holds no id.

    def __str__(self) -> str:
        if not self.num_records:
            return f"{self.path}: {self.what}"
        example = f"such as {self.example!r}"
        return f"{self.path}: {self.what} {self.num_records:,} of the records, {example}"


def describe(findings: Iterable[Finding]) -> list[str]:
    """A line for each finding."""
    return list(map(str, findings))


def find(directory: str, wanted: Wanted) -> Iterator[Finding]:
    """The findings of a `Search`."""
    return Search(directory, wanted).findings()


class Search:
    """A search below a data set, an export, a directory of exports, or a cache."""

    def __init__(self, directory: str, wanted: Wanted):
        """Touches no file; `directory` is a local path or URL, or a pointer to a directory."""
        self.directory, self._wanted = directory.rstrip("/") or "/", wanted
        self.num_files = 0  # Files of a kind that names or shows records.
        self.models: list[str] = []  # Model directories: weights are not looked into.
        self._paths: frozenset[str] = frozenset()
        self._hashing: dict[str, contents.Hashing] = {}

    def findings(self) -> Iterator[Finding]:
        """Looks into each file.

        Raises:
          StageError: no such directory.
        """
        if not files.is_dir(self.directory):
            self.directory = pointer.resolve(self.directory)
        if not files.is_dir(self.directory):
            raise StageError(
                f"{self.directory}: no such directory; expected a data set, an export, a directory "
                "of exports, or a cache"
            )
        paths = list(trees.read_tree(self.directory, hidden=True).stamps)
        self._paths = frozenset(paths)
        for path in paths:
            yield from self._look(path)

    def _look(self, path: str) -> Iterator[Finding]:
        file = self._file(path)
        if file.name == MANIFEST:
            self._note_model(path)
        reader, what = contents.reader_of(file), "names"
        if reader is None:
            reader, what = pictures.reader_of(file, self._beside(path)), "shows"
        if reader is None:
            return
        self.num_files += 1
        matches, reason = set(), ""
        try:
            for record_id, sha in reader(file):
                if match := self._wanted.match(record_id, sha):
                    matches.add(match)
        except contents.UNREADABLE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        if matches:
            yield Finding(file.path, what, len(matches), min(matches))
        if reason:
            yield Finding(file.path, f"cannot be read, so it may hold them ({reason})", 0, "")

    def _file(self, path: str) -> contents.File:
        folder, _, name = path.rpartition("/")
        return contents.File(
            files.join(self.directory, *path.split("/")),
            files.finished_name(name),
            folder.rpartition("/")[2],
            lambda: self._hashing_of(self._root(path)),
            self._wanted,
        )

    def _root(self, path: str) -> str:
        """The nearest directory above a file that is the output of a stage; "" without one."""
        while path:
            path = path.rpartition("/")[0]
            prefix = f"{path}/" if path else ""
            if not {f"{prefix}{MANIFEST}", f"{prefix}{tasks.DIRECTORY}/{tasks.JOB}"}.isdisjoint(
                self._paths
            ):
                break
        return path

    def _beside(self, path: str) -> Callable[[str], contents.File | None]:
        """Takes a name below the export that holds a picture; None if no such file exists."""
        export = path.rpartition("/")[0].rpartition("/")[0]

        def file(name: str) -> contents.File | None:
            other = f"{export}/{name}" if export else name
            return self._file(other) if other in self._paths else None

        return file

    def _hashing_of(self, root: str) -> contents.Hashing:
        if root not in self._hashing:
            directory = files.join(self.directory, *filter(None, root.split("/")))
            seeds, prefixes = set(), set()
            for read_record in (manifest_of, lambda path: tasks.Tasks(path).job()):
                try:
                    record: Any = read_record(directory)
                except StageError:
                    continue  # Damaged.
                made_from = record["made_from"] if record else {}
                if isinstance(made_from.get("seed"), int):
                    seeds.add(made_from["seed"])
                for part in made_from.values():
                    if isinstance(part, dict) and isinstance(part.get("id_prefix"), str):
                        prefixes.add(part["id_prefix"])
            self._hashing[root] = contents.Hashing(seeds, prefixes)
        return self._hashing[root]

    def _note_model(self, path: str) -> None:
        directory = files.join(self.directory, *path.split("/")[:-1])
        try:
            manifest = manifest_of(directory)
        except StageError:
            return
        if manifest and manifest["stage"] == "train":
            self.models.append(directory)
