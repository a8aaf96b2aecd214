"""What an output directory holds: what it says of itself, and whose files are in it."""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.cli.errors import StageError
from pipeline.stages import tasks
from pipeline.stages.contracts import Job, Manifest
from pipeline.stages.manifest import (
    MANIFEST,
    PREVIOUS,
    manifest_of,
    previous_of,
    readable_json,
)
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
          torn: whether a directory of the stage may have lost its manifest. Then another file
            shows that this program wrote there, and no foreign file may be beside.
        """
        records = self.records(torn=torn)
        previous = previous_of(self._directory) if records.is_torn else None
        stages = {r["stage"] for r in (records.manifest, records.job, previous) if r}
        if stages - {self._stage}:
            raise StageError(
                f"--output_dir={self._directory}: is the output of another stage; expected a new "
                f"directory, or output of {self._stage}"
            )
        names = self.files() if not (records.manifest or records.job) else []
        if not names or (torn and previous):
            return
        foreign = [name for name in names if not self._is_owned(name)]
        if torn and not foreign and self._has_mark():
            return
        if not torn:
            self.records(torn=False)  # Raises if the manifest is damaged.
        remedy = "name a new directory"
        if previous:
            remedy = "mend the data set with python -m pipeline.verify --repair"
        elif self._has_mark():
            remedy = "pass --overwrite to make this directory again, or name a new one"
            if foreign:
                remedy = f"move {foreign[0]} away first, and {remedy}"
        raise StageError(
            f"--output_dir={self._directory}: holds {(foreign or names)[0]!r} and neither an "
            f"intact {MANIFEST} nor {tasks.DIRECTORY}/{tasks.JOB}, so it is no output of this "
            f"command, or has lost them; {remedy}"
        )

    def _has_mark(self) -> bool:
        """Whether a file is there that only this program writes."""
        beginning = readable_json({"stage": self._stage}).rstrip(b"\n}")
        for path in (files_lib.join(self._directory, MANIFEST), self._tasks.path(tasks.JOB)):
            with contextlib.suppress(OSError, StageError):
                if files_lib.read_bytes(path).startswith(beginning):
                    return True
        with contextlib.suppress(OSError, ValueError, StageError, AttributeError):
            timings = json.loads(files_lib.read_bytes(files_lib.join(self._directory, TIMINGS)))
            return bool(timings.keys() >= tasks.timings({}).keys())
        return False

    def files(self) -> list[str]:
        """Paths of all finished files, with slashes.

        A directory that the stage does not write, or a link to a directory, stands for its files,
        and ends with a slash. A job that was killed before its first file leaves none.
        """
        paths: list[str] = []
        for name in files_lib.list_names(self._directory):
            path = files_lib.join(self._directory, name)
            if not files_lib.is_dir(path):
                paths.append(name)
            elif name == LOST:
                continue
            elif name in (tasks.DIRECTORY, *self._subdirectories) and not os.path.islink(path):
                tree = trees.read_tree(path, hidden=True)
                paths += [f"{name}/{below}" for below in tree.stamps]
            else:
                paths.append(f"{name}/")
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
            path in (MANIFEST, PREVIOUS, TIMINGS)
            or (path.startswith(f"{tasks.DIRECTORY}/") and path.endswith(_OF_A_JOB))
            or bool(self._owned.fullmatch(path))
        )
