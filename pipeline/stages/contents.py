"""What an output directory holds: what it says of itself, and whose files are in it."""

import contextlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.cli.errors import StageError
from pipeline.stages import tasks
from pipeline.stages.contracts import Job, Manifest
from pipeline.stages.manifest import MANIFEST, PREVIOUS, manifest_of, previous_of
from pipeline.storage import files as files_lib
from pipeline.storage import lock, trees

TIMINGS = "timings.json"
# Directory of files that a repair takes out of the output, and nobody removes.
LOST = "lost"
# Ends of the names in .progress/.
_OF_A_JOB = (".json", ".npy", ".npz", ".count")


class Records(NamedTuple):
    """What a directory says of itself; None without such a file, or if the file is damaged."""

    manifest: Manifest | None
    job: Job | None
    is_torn: bool  # Whether one is damaged, or neither exists.


class Contents:
    """The contents of one stage's output directory."""

    def __init__(
        self, directory: str, stage: str, owned: re.Pattern[str], subdirectories: Sequence[str]
    ):
        """Arguments as of OutputDirectory; `subdirectories` are all. Touches no file."""
        self._directory, self._stage, self._owned = directory, stage, owned
        self._subdirectories, self._tasks = subdirectories, tasks.Tasks(directory)

    def records(self, *, torn: bool) -> Records:
        """Reads manifest.json and job.json.

        Args:
          torn: whether they may be damaged; otherwise that raises a StageError.
        """
        found: list[Any] = []
        is_torn = False
        for read in (lambda: manifest_of(self._directory), self._tasks.job):
            try:
                found.append(read())
            except StageError:
                if not torn:
                    raise
                found.append(None)
                is_torn = True
        manifest, job = found
        return Records(manifest, job, is_torn or not any(found))

    def refuse_foreign(self, *, torn: bool) -> None:
        """Raises a StageError if the directory holds files that are not of the stage.

        Args:
          torn: whether a directory of the stage may have lost its manifest.
        """
        records = self.records(torn=torn)
        existing = records.manifest or records.job or previous_of(self._directory)
        if existing:
            if {r["stage"] for r in (existing, records.job) if r} != {self._stage}:
                raise StageError(
                    f"--output_dir={self._directory}: is the output of another stage; expected a "
                    f"new directory, or output of {self._stage}"
                )
            return
        names = self.files()
        foreign = [name for name in names if not self._is_owned(name)]
        if not foreign:
            of_any_program = (MANIFEST, PREVIOUS, TIMINGS)
            if not names or (torn and not set(of_any_program).issuperset(names)):
                return
            self.records(torn=False)  # Raises if the manifest is damaged.
        remedy = "" if foreign else ", or pass --overwrite to make this directory again"
        raise StageError(
            f"--output_dir={self._directory}: holds {(foreign or names)[0]!r} and neither an "
            f"intact {MANIFEST} nor {tasks.DIRECTORY}/{tasks.JOB}, so it is no output of this "
            f"command, or has lost them; name a new directory{remedy}"
        )

    def files(self) -> list[str]:
        """Paths of all finished files, with slashes.

        A directory that the stage does not write stands for its files. A job that was killed before
        its first file leaves none.
        """
        paths: list[str] = []
        for name in files_lib.list_names(self._directory):
            below = [name]
            if name in (tasks.DIRECTORY, *self._subdirectories):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # A file.
                    tree = trees.read_tree(files_lib.join(self._directory, name), hidden=True)
                    below = [f"{name}/{path}" for path in tree.stamps]
            paths += below
        return [
            path
            for path in paths
            if not lock.is_ours(path) and not files_lib.is_unfinished(path.rpartition("/")[2])
        ]

    def owned_files(self) -> list[str]:
        """The paths of all files of records and descriptions, listed in the manifest or not."""
        return list(filter(self._owned.fullmatch, self.files()))

    def _is_owned(self, path: str) -> bool:
        return (
            path in (MANIFEST, PREVIOUS, TIMINGS, LOST)
            or (path.startswith(f"{tasks.DIRECTORY}/") and path.endswith(_OF_A_JOB))
            or bool(self._owned.fullmatch(path))
        )
