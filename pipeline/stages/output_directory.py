"""How a Beam stage fills its output directory, in as many tries as it takes.

Until `manifest.json` is there, `.progress/` holds `job.json` (what is being made,
and the names of all files it will consist of) and one marker for each task that is
done (tasks.py).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.cli.errors import StageError
from pipeline.stages import quarantine, tasks
from pipeline.stages.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    differences,
    manifest_of,
    read_file,
    readable_json,
    sealed_json,
    through_json,
)
from pipeline.storage import files as files_lib
from pipeline.storage import lock

TIMINGS = "timings.json"


class UnfinishedConflict(StageError):
    """The directory holds an unfinished run of this stage with other inputs."""


def are_there(directory: str, files: Iterable[Mapping[str, Any]]) -> bool:
    """Whether files that a manifest lists are whole.

    Those that hold records are large; of them it sees that they are there at their size,
    and who reads them checks what they hold.
    """

    def is_there(entry: Mapping[str, Any]) -> bool:
        try:
            if files_lib.num_bytes(files_lib.join(directory, entry["name"])) != entry["bytes"]:
                return False
            if "num_examples" not in entry:
                read_file(directory, entry)
        except (FileNotFoundError, StageError):
            return False
        return True

    return all(files_lib.each(directory, is_there, files))


class OutputDirectory:
    """One stage's output directory, from its first file to its manifest.

    The command opens it with `opened`; workers see no more than its `tasks`.
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
        self.tasks = tasks.Tasks(directory)

    def _path(self, *names: str) -> str:
        return files_lib.join(self.directory, *names)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the directory for this process, and makes it if it is not there.

        Raises:
          StageError: something else is in the directory, or another process writes to it.
        """
        self._refuse_foreign()  # Before the lock, which would leave its file there.
        files_lib.make_dirs(self.directory)
        with lock.held(self.directory):
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
        known = [k for k in (manifest_of(self.directory), self.tasks.job()) if k]
        if not known:
            # A job killed before its first file leaves these two and nothing else.
            names = files_lib.list_names(self.directory)
            foreign = [n for n in names if n != tasks.DIRECTORY and not lock.is_ours(n)]
            foreign += files_lib.list_finished_names(self.tasks.path())
            if foreign:
                raise StageError(
                    f"--output_dir={self.directory}: holds {foreign[0]!r} and neither {MANIFEST} "
                    f"nor {tasks.DIRECTORY}/, so it is no output of this command; name a new "
                    "directory"
                )
        elif any(k["stage"] != self.stage for k in known):
            raise StageError(
                f"--output_dir={self.directory}: is the output of another stage; expected a new "
                f"directory, or one of {self.stage}"
            )

    def _begin(self, names: Sequence[str], *, overwrite: bool) -> dict[str, Any] | None:
        """Clears or keeps what is there; returns the manifest if nothing is left to do."""
        manifest = manifest_of(self.directory)
        job = self.tasks.job()
        known = manifest or job
        if known:
            differ = differences(known["made_from"], self.made_from)
            if differ and not overwrite:
                state, error = "finished", StageError
                if not manifest:
                    state, error = "unfinished", UnfinishedConflict
                raise error(
                    f"--output_dir={self.directory}: holds {state} output of other inputs "
                    f"({'; '.join(differ)}); name another directory, or pass --overwrite"
                )
            if overwrite:
                self._clear(known, job)
                manifest = job = None
        if manifest and self.is_complete(manifest["files"]):
            self.forget_finished(manifest)
            return manifest
        if job and job["made_from"] != self.made_from:
            raise self._other_append(job)
        self._remove_unfinished()
        self._write_job(self.made_from, names)
        files_lib.remove(self._path(MANIFEST))
        return None

    def undo_append(self, base: Mapping[str, Any]) -> None:
        """Removes what an unfinished append has added to a held, finished directory.

        Args:
          base: the directory's manifest.
        """
        job = self.tasks.job()
        if job:
            kept = {entry["name"] for entry in base["files"]}
            self._remove_files([name for name in job["names"] if name not in kept])
            files_lib.remove(self.tasks.path())

    def begin_append(self, names: Sequence[str]) -> None:
        """Makes a held, finished directory ready for further files; it stays finished.

        Args:
          names: every file that the job will make or make anew.
        """
        job = self.tasks.job()
        if job and job["made_from"] != self.made_from:
            raise self._other_append(job)
        self._remove_unfinished()
        self._write_job(self.made_from, names)

    def forget_finished(self, manifest: Mapping[str, Any]) -> None:
        """Removes what is left of the job that made `manifest`, and of none other."""
        job = self.tasks.job()
        if job is None or job["made_from"] == manifest["made_from"]:
            self._remove_unfinished()
            files_lib.remove(self.tasks.path())

    def _other_append(self, job: Mapping[str, Any]) -> UnfinishedConflict:
        differ = "; ".join(differences(job["made_from"], self.made_from))
        return UnfinishedConflict(
            f"--output_dir={self.directory}: holds an unfinished --append of other inputs "
            f"({differ}); run that one to its end first, or pass --overwrite to undo it"
        )

    def _remove_unfinished(self) -> None:
        for directory in (self.directory, self.tasks.path(), self._path(quarantine.DIRECTORY)):
            files_lib.remove_unfinished(directory)

    def _write_job(self, made_from: Mapping[str, Any], names: Sequence[str]) -> None:
        files_lib.make_dirs(self.tasks.path())
        job = {"stage": self.stage, "made_from": made_from, "names": list(names)}
        files_lib.write_bytes(self.tasks.path(tasks.JOB), sealed_json(job))

    def is_complete(self, files: Iterable[Mapping[str, Any]]) -> bool:
        """Whether files of the manifest are whole, as far as `are_there` looks."""
        return are_there(self.directory, files)

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
        files_lib.remove(self._path(MANIFEST))
        self._remove_files(names)
        files_lib.remove(self._path(TIMINGS))
        files_lib.remove(self.tasks.path())

    def _remove_files(self, names: Sequence[str]) -> None:
        files_lib.each(self.directory, lambda name: files_lib.remove(self._path(name)), names)
        files_lib.remove_empty(self._path(quarantine.DIRECTORY))

    def _stamped(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """A manifest with what every one says."""
        return {
            "stage": self.stage,
            "format_version": FORMAT_VERSION,
            "made_from": self.made_from,
            **manifest,
        }

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
        whole = self._stamped(manifest)
        # A cluster repeats what a worker was killed at within the job, which so ends well.
        self._remove_unfinished()
        files_lib.write_bytes(self._path(TIMINGS), readable_json(tasks.timings(markers)))
        files_lib.write_bytes(self._path(MANIFEST), sealed_json(whole))
        files_lib.remove(self.tasks.path())
        return whole
