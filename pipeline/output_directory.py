"""How a Beam stage fills its output directory, in as many tries as it takes.

Until `manifest.json` is there, `.progress/` holds `job.json` (what is being made,
and the names of all files it will consist of) and one marker for each task that is
done. A marker carries size and sha256 of the task's files, so a file is taken for
whole because of what it holds and not because something of its name exists.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline import quarantine, storage
from pipeline.errors import StageError
from pipeline.stage import (
    FORMAT_VERSION,
    MANIFEST,
    differences,
    read_file,
    read_sealed,
    readable_json,
    sealed_json,
    through_json,
)

TIMINGS = "timings.json"
_PROGRESS = ".progress"
_JOB = "job.json"


class OutputDirectory:
    """One stage's output directory, from its first file to its manifest.

    The command opens it with `opened`; workers call only `make_once`.
    """

    def __init__(self, directory: str, *, stage: str, made_from: Mapping[str, Any]):
        """Names the directory and what is to be made in it.

        Args:
          directory: local path or fsspec URL.
          stage: "preprocess" or "export".
          made_from: inputs and settings, a JSON value free of times and places.
        """
        self.directory = directory
        self.stage = stage
        # Through JSON and back, so that it equals what is read from a file.
        self.made_from = through_json(made_from)

    def _path(self, *names: str) -> str:
        return storage.join(self.directory, *names)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the directory for this process, and makes it if it is not there.

        Raises:
          StageError: something else is in the directory, or another process writes to it.
        """
        self._refuse_foreign()  # Before the lock, which would leave its file there.
        storage.make_dirs(self.directory)
        with storage.lock(self.directory):
            yield

    @contextlib.contextmanager
    def opened(self, names: Sequence[str], *, overwrite: bool) -> Iterator[dict[str, Any] | None]:
        """Holds the directory for this process, made ready for this job.

        Args:
          names: every file that the job will make, without manifest and timings.
          overwrite: whether what another job of this stage made here may go.

        Yields:
          The manifest, if this very job is finished and its files are all there.

        Raises:
          StageError: something else is in the directory, or another process writes to it.
        """
        with self.held():
            yield self._begin(names, overwrite=overwrite)

    def _refuse_foreign(self) -> None:
        """Raises a StageError if what is in the directory is not of this stage."""
        known = read_sealed(self._path(MANIFEST)) or read_sealed(self._path(_PROGRESS, _JOB))
        if known is None:
            # A job killed before its first file leaves these two and nothing else.
            ours = (storage.LOCK, _PROGRESS)
            foreign = [n for n in storage.list_names(self.directory) if n not in ours]
            foreign += storage.list_finished_names(self._path(_PROGRESS))
            if foreign:
                raise StageError(
                    f"--output_dir={self.directory}: holds {foreign[0]!r} and neither {MANIFEST} "
                    f"nor {_PROGRESS}/, so it is no output of this command; name a new directory"
                )
        elif known["stage"] != self.stage:
            raise StageError(
                f"--output_dir={self.directory}: is the output of another stage; expected a new "
                f"directory, or one of {self.stage}"
            )

    def _begin(self, names: Sequence[str], *, overwrite: bool) -> dict[str, Any] | None:
        """Clears or keeps what is there; returns the manifest if nothing is left to do."""
        manifest = read_sealed(self._path(MANIFEST))
        job = read_sealed(self._path(_PROGRESS, _JOB))
        known = manifest or job
        if known:
            differ = differences(known["made_from"], self.made_from)
            if differ and not overwrite:
                state = "finished" if manifest else "unfinished"
                raise StageError(
                    f"--output_dir={self.directory}: holds {state} output of other inputs "
                    f"({'; '.join(differ)}); name another directory, or pass --overwrite"
                )
            if overwrite:
                self._clear(known, job)
                manifest = job = None
        if manifest and self.is_complete(manifest):
            self.forget_finished(manifest)
            return manifest
        if job and job["made_from"] != self.made_from:
            raise self._other_append(job)
        self._remove_unfinished()
        self._write_job(self.made_from, names)
        storage.remove(self._path(MANIFEST))
        return None

    def begin_append(
        self, names: Sequence[str], base: Mapping[str, Any], *, overwrite: bool
    ) -> None:
        """Makes a held, finished directory ready for further files; it stays finished.

        Args:
          names: every file that the job will make or make anew.
          base: the directory's manifest.
          overwrite: whether what an unfinished job of other inputs has appended may go.
        """
        job = read_sealed(self._path(_PROGRESS, _JOB))
        if job and job["made_from"] != self.made_from:
            if not overwrite:
                raise self._other_append(job)
            kept = {entry["name"] for entry in base["files"]}
            self._remove_files([name for name in job["names"] if name not in kept])
        self._remove_unfinished()
        self._write_job(self.made_from, names)

    def forget_finished(self, manifest: Mapping[str, Any]) -> None:
        """Removes what is left of the job that made `manifest`, and of none other."""
        job = read_sealed(self._path(_PROGRESS, _JOB))
        if job is None or job["made_from"] == manifest["made_from"]:
            self._remove_unfinished()
            storage.remove(self._path(_PROGRESS))

    def _other_append(self, job: Mapping[str, Any]) -> StageError:
        differ = "; ".join(differences(job["made_from"], self.made_from))
        return StageError(
            f"--output_dir={self.directory}: holds an unfinished --append of other inputs "
            f"({differ}); run that one to its end first, or pass --overwrite to undo it"
        )

    def _remove_unfinished(self) -> None:
        for directory in (self.directory, self._path(_PROGRESS), self._path(quarantine.DIRECTORY)):
            storage.remove_unfinished(directory)

    def _write_job(self, made_from: Mapping[str, Any], names: Sequence[str]) -> None:
        storage.make_dirs(self._path(_PROGRESS))
        job = {"stage": self.stage, "made_from": made_from, "names": list(names)}
        storage.write_bytes(self._path(_PROGRESS, _JOB), sealed_json(job))

    def is_complete(self, manifest: Mapping[str, Any]) -> bool:
        """Whether every file is there at its size; contents are checked when read."""
        for entry in manifest["files"]:
            try:
                if storage.num_bytes(self._path(entry["name"])) != entry["bytes"]:
                    return False
            except FileNotFoundError:
                return False
        return True

    def _clear(self, known: Mapping[str, Any], job: Mapping[str, Any] | None) -> None:
        """Removes what earlier jobs made here, and nothing else.

        Args:
          known: the manifest, or job.json if there is none.
          job: job.json, if there is one.
        """
        names = [entry["name"] for entry in known.get("files", ())]
        names += job["names"] if job else []
        # Killed from here on, the next try finds an unfinished job and clears the rest.
        self._write_job(known["made_from"], names)
        storage.remove(self._path(MANIFEST))
        self._remove_files(names)
        storage.remove(self._path(TIMINGS))
        storage.remove(self._path(_PROGRESS))

    def _remove_files(self, names: Sequence[str]) -> None:
        for name in names:
            # Nothing outside, whatever the file says.
            if os.path.basename(name) in (name, name.removeprefix(f"{quarantine.DIRECTORY}/")):
                storage.remove(self._path(name))
        if not storage.list_names(self._path(quarantine.DIRECTORY)):
            storage.remove(self._path(quarantine.DIRECTORY))

    def progress_path(self, name: str) -> str:
        """Path of a file that the job needs on its way; it goes when the job is finished."""
        return self._path(_PROGRESS, name)

    def _marker_path(self, task: str) -> str:
        return self._path(_PROGRESS, f"{task}.json")

    def make_once(
        self, task: str, make: Callable[[], tuple[list[dict[str, Any]], dict[str, float]]]
    ) -> dict[str, Any] | None:
        """Does one task unless an earlier try has; afterwards its marker stands.

        Args:
          task: name of the task, unique in the job.
          make: writes the task's files and returns their entries, and the seconds
            it spent on each kind of work.

        Returns:
          The marker, whose "reused" says whether an earlier try did it; None if the task
          failed.
        """
        marker = self._whole_task(task)
        if marker is None:
            try:
                entries, secs = make()
            except (StageError, OSError) as error:
                # Not raised, so that the other tasks go on; `markers` raises it in the end.
                try:
                    self._write_marker(task, {"failed": str(error)})
                except OSError:
                    # A full disk takes no marker either, and no other task can go on.
                    raise StageError(f"{self.directory}: {task}: {error}; make room") from error
                return None
            marker = {"entries": entries, "secs": secs, "reused": False}
        else:
            marker = {**marker, "reused": True}
        self._write_marker(task, marker)
        return marker

    def _write_marker(self, task: str, marker: Mapping[str, Any]) -> None:
        storage.write_bytes(self._marker_path(task), sealed_json(marker))

    def _whole_task(self, task: str) -> dict[str, Any] | None:
        """The marker of a task whose files are all as they were when it was marked."""
        try:
            marker = read_sealed(self._marker_path(task))
            if marker is None or "failed" in marker:
                return None
            for entry in marker["entries"]:
                read_file(self.directory, entry)
        except StageError:
            return None  # Damaged marker or file: the task is done again.
        return marker

    def num_done(self) -> int:
        """How many tasks are done so far; what a progress line counts."""
        names = storage.list_names(self._path(_PROGRESS))
        return sum(name.endswith(".json") and name != _JOB for name in names)

    def markers(self, tasks: Sequence[str]) -> list[dict[str, Any]]:
        """The markers of `tasks`, in that order.

        Raises:
          StageError: a task failed, or has no marker.
        """
        markers, failed = [], []
        for task in tasks:
            marker = read_sealed(self._marker_path(task)) or {"failed": f"{task} was not done"}
            if "failed" in marker:
                failed.append(marker["failed"])
            markers.append(marker)
        if failed:
            more = f" (and {len(failed) - 1} more of {len(tasks)} files failed)" * (len(failed) > 1)
            raise StageError(
                f"{failed[0]}{more}; then run the same command again: it keeps the "
                f"{len(tasks) - len(failed)} files that are whole"
            )
        return markers

    def finish(
        self, manifest: Mapping[str, Any], markers: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Writes timings.json and then the manifest, which makes the directory finished.

        Args:
          manifest: what the manifest says beside stage, version and made_from.
          markers: task -> marker; their seconds go to timings.json.

        Returns:
          The manifest as written.
        """
        done = [marker for marker in markers.values() if not marker["reused"]]
        kinds = sorted({kind for marker in done for kind in marker["secs"]})
        timings = {
            "total_secs": {kind: sum(m["secs"].get(kind, 0.0) for m in done) for kind in kinds},
            "num_tasks": len(markers),
            "num_tasks_reused": len(markers) - len(done),
            "tasks": {
                task: {"secs": marker["secs"], "reused": marker["reused"]}
                for task, marker in markers.items()
            },
        }
        whole = {
            "stage": self.stage,
            "format_version": FORMAT_VERSION,
            "made_from": self.made_from,
            **manifest,
        }
        storage.write_bytes(self._path(TIMINGS), readable_json(timings))
        storage.write_bytes(self._path(MANIFEST), sealed_json(whole))
        storage.remove(self._path(_PROGRESS))
        return whole
