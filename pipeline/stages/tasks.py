"""What a Beam stage has done so far: a marker for each task, in `.progress/`.

A marker carries size and sha256 of the task's files, so a file is taken for whole
because of what it holds and not because something of its name exists.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.cli.errors import SourceChanged, StageError
from pipeline.stages import manifest_check
from pipeline.stages.manifest import read_file, read_sealed, sealed_json
from pipeline.storage import files

DIRECTORY = ".progress"
# What is being made; output_directory.py writes it.
JOB = "job.json"
# Where files wait, below it, that are to appear all at once; see staged_directory.py.
_STAGED = "files"
# What a task under way has noted of its progress, and how often it does.
_NOTE = ".count"
_NOTE_EVERY_SECS = 1.0


class Tasks:
    """The tasks of the job in one output directory; all that its workers know of it."""

    def __init__(self, directory: str, *, staged: bool = False):
        """Names where tasks write.

        Args:
          directory: the output directory, local path or fsspec URL.
          staged: whether files wait in `.progress/` until the whole job is done.
        """
        self.directory = directory
        self.files_directory = self.path(_STAGED) if staged else directory
        self._noted = 0.0

    def path(self, *names: str) -> str:
        """Path of a file that the job needs on its way; it goes when the job is finished."""
        return files.join(self.directory, DIRECTORY, *names)

    def _marker_path(self, task: str) -> str:
        return self.path(f"{task}.json")

    def job(self) -> dict[str, Any] | None:
        """What is being made in the directory; None if nothing is.

        Raises:
          StageError: job.json is not as this program writes it.
        """
        path = self.path(JOB)
        job = read_sealed(path)
        if job is not None:
            manifest_check.job(path, job)
        return job

    def _read_marker(self, task: str) -> dict[str, Any] | None:
        path = self._marker_path(task)
        marker = read_sealed(path)
        if marker is not None:
            manifest_check.marker(path, marker)
        return marker

    def clear(self) -> None:
        """Forgets all tasks, and removes files that wait; the note of the job stays."""
        for name in files.list_names(self.path()):
            if name != JOB:
                files.remove(self.path(name))

    def make_once(
        self, task: str, make: Callable[[], Mapping[str, Any]], *, made_of: str | None = None
    ) -> dict[str, Any] | None:
        """Does one task unless an earlier try has; afterwards its marker stands.

        Args:
          task: name of the task, unique in the job.
          make: writes the task's files and returns its marker: their "entries", the seconds
            it spent on each kind of work as "secs", and whatever else the job's end needs.
          made_of: names what the task is a function of, where that may change between two
            tries; then the marker has it as "made_of".

        Returns:
          The marker, whose "reused" says whether an earlier try did it; None if the task
          failed.
        """
        marker = self._whole_task(task)
        if marker is None or marker.get("made_of") != made_of:
            try:
                made = make()
            except SourceChanged:
                raise  # Then all tasks are to be done again.
            except (StageError, OSError) as error:
                # Not raised, so that the other tasks go on; `markers` raises it in the end. On a
                # disk that takes no marker either no other task can go on.
                self._write_marker(task, {"failed": str(error)})
                return None
            marker = {**made, "reused": False}
        else:
            marker = {**marker, "reused": True}
        self._write_marker(task, marker)
        return marker

    def _write_marker(self, task: str, marker: Mapping[str, Any]) -> None:
        files.write_bytes(self._marker_path(task), sealed_json(marker))

    def marker(self, task: str) -> dict[str, Any] | None:
        """What a try has written about a task; None if nothing, or it failed, or is damaged."""
        try:
            marker = self._read_marker(task)
        except StageError:
            return None
        return None if marker is None or "failed" in marker else marker

    def _whole_task(self, task: str) -> dict[str, Any] | None:
        """The marker of a task whose files are all as they were when it was marked."""
        marker = self.marker(task)
        try:
            for entry in marker["entries"] if marker else ():
                read_file(self.place_of(entry), entry)
        except StageError:
            return None  # A file is damaged: the task is done again.
        return marker

    def place_of(self, entry: Mapping[str, Any]) -> str:
        """The directory in which a task's file is: where it was written, or its last place."""
        staged = files.exists(files.join(self.files_directory, entry["name"]))
        return self.files_directory if staged else self.directory

    def num_done(self) -> int:
        """How many tasks are done so far; what a progress line counts."""
        names = files.list_names(self.path())
        return sum(name.endswith(".json") and name != JOB for name in names)

    def note(self, task: str, count: int) -> None:
        """Notes how far a task under way has come, now and then."""
        now = time.monotonic()
        if now - self._noted >= _NOTE_EVERY_SECS:
            self._noted = now
            files.write_bytes(self.path(f"{task}{_NOTE}"), b"%d" % count)

    def num_noted(self, sizes: Mapping[str, int]) -> int:
        """How many records are done so far, by what tasks under way have noted.

        Args:
          sizes: task -> how many records it has.
        """
        names = set(files.list_names(self.path()))
        total = 0
        for task, size in sizes.items():
            if f"{task}.json" in names:
                total += size
            elif f"{task}{_NOTE}" in names:
                note = files.read_bytes(self.path(f"{task}{_NOTE}"))
                total += int(note) if note.isdigit() else 0
        return total

    def markers(self, tasks: Sequence[str]) -> list[dict[str, Any]]:
        """The markers of `tasks`, in that order.

        Raises:
          StageError: a task failed, or has no marker.
        """

        def read(task: str) -> dict[str, Any]:
            return self._read_marker(task) or {"failed": f"{task} was not done"}

        markers = files.each(self.directory, read, tasks)
        failed = [marker["failed"] for marker in markers if "failed" in marker]
        if failed:
            more = f" (and {len(failed) - 1} more of {len(tasks)} files failed)" * (len(failed) > 1)
            raise StageError(
                f"{failed[0]}{more}; then run the same command again: it keeps the "
                f"{len(tasks) - len(failed)} files that are whole"
            )
        return markers


def timings(markers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Where the time of a job went: the contents of timings.json.

    Args:
      markers: task -> marker.
    """
    done = [marker for marker in markers.values() if not marker["reused"]]
    kinds = sorted({kind for marker in done for kind in marker["secs"]})
    return {
        "total_secs": {kind: sum(m["secs"].get(kind, 0.0) for m in done) for kind in kinds},
        "num_tasks": len(markers),
        "num_tasks_reused": len(markers) - len(done),
        "tasks": {
            task: {"secs": marker["secs"], "reused": marker["reused"]}
            for task, marker in markers.items()
        },
    }
