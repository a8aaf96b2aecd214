"""The progress of a Beam stage: a marker for each finished task, in `.progress/`.

A marker carries size and sha256 of the task's files, so a file counts as complete because of its
content and not because of its name.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.cli.errors import SourceChanged, StageError
from pipeline.stages import manifest_check
from pipeline.stages.contracts import FailedMarker, Job, Marker, is_failed
from pipeline.stages.manifest import read_file, read_sealed, sealed_json, sync_files
from pipeline.storage import files

DIRECTORY = ".progress"
# Describes the job; output_directory.py writes this file.
JOB = "job.json"
# Suffix of the file that holds the progress of a running task, and how often the task writes it.
_NOTE = ".count"
_NOTE_EVERY_SECS = 1.0


class Tasks:
    """The tasks of the job in one output directory; workers see nothing else of it."""

    def __init__(self, directory: str):
        """Describes the output directory, a local path or fsspec URL; touches no file."""
        self.directory = directory
        self._noted = 0.0

    def path(self, *names: str) -> str:
        """Path of a temporary file of the job; removed when the job is finished."""
        return files.join(self.directory, DIRECTORY, *names)

    def _marker_path(self, task: str) -> str:
        return self.path(f"{task}.json")

    def job(self) -> Job | None:
        """The content of job.json; None if no job is unfinished.

        Raises:
          StageError: job.json is damaged, or has values that this program never writes.
        """
        path = self.path(JOB)
        content = read_sealed(path)
        return None if content is None else manifest_check.job(path, content)

    def _read_marker(self, task: str) -> Marker | FailedMarker | None:
        path = self._marker_path(task)
        content = read_sealed(path)
        return None if content is None else manifest_check.marker(path, content)

    def clear(self) -> None:
        """Removes all markers; job.json stays."""
        for name in files.list_names(self.path()):
            if name != JOB:
                files.remove(self.path(name))

    def make_once(
        self, task: str, make: Callable[[], Marker], *, made_of: str | None = None
    ) -> Marker | None:
        """Does one task unless an earlier try has done it; then writes its marker.

        Args:
          task: name of the task, unique in the job.
          make: writes the task's files and returns its marker: their "entries", the seconds
            it spent on each kind of work as "secs", and whatever else the job's end needs.
          made_of: identifies the task's input, if the input may change between two tries; stands
            in the marker as "made_of".

        Returns:
          The marker, whose "reused" says whether an earlier try did it; None if the task
          failed.
        """
        marker = self._completed_marker(task)
        if marker is None or marker.get("made_of") != made_of:
            try:
                new_marker = make()
            except SourceChanged:
                raise  # Then all tasks must be done again.
            except (StageError, OSError) as error:
                # Not raised, so that the other tasks go on; `markers` raises it at the end. If the
                # marker cannot be written either, no other task can succeed.
                self.write_marker(task, {"failed": str(error)})
                return None
            marker = {**new_marker, "reused": False}
        else:
            marker = {**marker, "reused": True}
        self.write_marker(task, marker)
        return marker

    def write_marker(self, task: str, marker: Marker | FailedMarker) -> None:
        """Writes a task's marker, in place of one that may be there; first its files are synced."""
        if not is_failed(marker):
            sync_files(self.directory, marker["entries"])
        files.write_bytes(self._marker_path(task), sealed_json(marker))

    def marker(self, task: str) -> Marker | None:
        """The marker of a finished task; None if it failed or the marker is damaged or missing."""
        try:
            marker = self._read_marker(task)
        except StageError:
            return None
        return None if marker is None or is_failed(marker) else marker

    def _completed_marker(self, task: str) -> Marker | None:
        """The marker of a task whose files still have the marker's checksums."""
        marker = self.marker(task)
        try:
            for entry in marker["entries"] if marker else ():
                read_file(self.directory, entry)
        except StageError:
            return None  # A damaged file: the task must be done again.
        return marker

    def num_done(self) -> int:
        """The number of tasks that have ended."""
        names = files.list_names(self.path())
        return sum(name.endswith(".json") and name != JOB for name in names)

    def note(self, task: str, count: int) -> None:
        """Records the progress of a running task, at most once a second."""
        now = time.monotonic()
        if now - self._noted >= _NOTE_EVERY_SECS:
            self._noted = now
            files.write_bytes(self.path(f"{task}{_NOTE}"), b"%d" % count)

    def num_records_done(self, sizes: Mapping[str, int]) -> int:
        """The number of finished records, those of running tasks included.

        Args:
          sizes: task -> number of its records.
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

    def markers(self, tasks: Sequence[str]) -> list[Marker]:
        """The markers of `tasks`, in that order.

        Raises:
          StageError: a task failed, or has no marker.
        """

        def read(task: str) -> Marker | FailedMarker:
            return self._read_marker(task) or {"failed": f"{task} was not done"}

        ended = files.each(self.directory, read, tasks)
        failed = [marker["failed"] for marker in ended if is_failed(marker)]
        if failed:
            more = ""
            if len(failed) > 1:
                more = f" (and {len(failed) - 1} more of {len(tasks)} files failed)"
            raise StageError(
                f"{failed[0]}{more}; then run the same command again: it keeps the "
                f"{len(tasks) - len(failed)} completed files"
            )
        return [marker for marker in ended if not is_failed(marker)]


def timings(markers: Mapping[str, Marker]) -> dict[str, Any]:
    """The content of timings.json: where the time of a job went.

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
