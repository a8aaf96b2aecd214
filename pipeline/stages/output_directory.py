"""How a Beam stage fills its output directory, in as many tries as it takes.

Until the stage writes `manifest.json`, `.progress/` holds `job.json` (the job's inputs and the
names of all its files) and one marker for each finished task (tasks.py). When a finished directory
gets further files, `manifest.json.previous` keeps the manifest before that.

After a power cut, as after a kill, the directory is finished or can be completed: the disk holds
job.json before the job's first file, every file before the manifest, the manifest before the job
counts as finished, and a removal before job.json goes.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.cli.errors import StageError
from pipeline.stages import contents, quarantine, tasks
from pipeline.stages.contents import LOST, TIMINGS, Records
from pipeline.stages.contracts import FileEntry, Job, Manifest, Marker
from pipeline.stages.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    PREVIOUS,
    differences,
    intact_entry,
    previous_of,
    readable_json,
    sealed_json,
    sync_files,
    through_json,
)
from pipeline.storage import files as files_lib
from pipeline.storage import lock


class Conflict(StageError):
    """The directory holds a run of this stage with other inputs."""


class UnfinishedConflict(Conflict):
    """That run is unfinished."""


def are_complete(
    directory: str, files: Iterable[FileEntry], *, records_by_size: bool = False
) -> bool:
    """Whether the files that a manifest lists have the bytes that it lists.

    Local files are read. Of an object the store's own checksum is compared. Where the store or an
    earlier version's entry has none, a small file is read, and of a file of records, which is
    large, the size is compared.

    Args:
      directory: the stage's; local path or fsspec URL.
      files: entries of the manifest.
      records_by_size: whether the size and both ends decide of local files of records; their
        readers check the content.

    Raises:
      StageError: the store fails.
    """

    def is_complete(entry: FileEntry) -> bool:
        if records_by_size and "num_examples" in entry and not files_lib.is_url(directory):
            path = files_lib.join(directory, entry["name"])
            return files_lib.looks_whole(path, entry["bytes"])
        return intact_entry(directory, entry, may_fetch="num_examples" not in entry) is not None

    return all(files_lib.each(directory, is_complete, files))


class OutputDirectory:
    """One stage's output directory, from its first file to its manifest.

    The command opens the directory with `opened`; workers get its `tasks` only.
    """

    def __init__(
        self,
        directory: str,
        *,
        stage: str,
        made_from: Mapping[str, Any],
        owned: re.Pattern[str],
        subdirectories: Sequence[str] = (),
        remedy: str = "name another directory, or pass --overwrite",
    ):
        """Describes the job; touches no file.

        Args:
          directory: local path or fsspec URL.
          stage: "preprocess" or "export".
          made_from: inputs and settings, a JSON value without times and places.
          owned: matches the path below the directory, with slashes, of each file that such a job
            writes, without manifests, timings and .progress/. If the manifest is lost, these paths
            tell whether the directory is output of this stage.
          subdirectories: where the job writes files, beside `directory` itself and quarantine/.
          remedy: what to do if the directory holds output of other inputs.
        """
        self._subdirectories = (*subdirectories, quarantine.DIRECTORY)
        self._contents = contents.Contents(directory, stage, owned, self._subdirectories)
        self._remedy, self._is_discarded = remedy, False
        self._keeps_previous: bool | None = None  # None if the job appends nothing.
        self._drops: Sequence[str] = ()
        self.directory = directory
        self.stage = stage
        # Through JSON and back, so that the value equals one read from a file.
        self.made_from = through_json(made_from)
        self.tasks = tasks.Tasks(directory)

    def _path(self, *names: str) -> str:
        return files_lib.join(self.directory, *names)

    @contextlib.contextmanager
    def locked(self, *, torn: bool = False) -> Iterator[None]:
        """Locks the directory for this process; creates the directory if necessary.

        Args:
          torn: whether to accept a directory of this stage whose manifest is lost or damaged.

        Raises:
          StageError: the directory holds other files, or another process writes to it.
        """
        # Before the lock leaves its file in the directory.
        self._contents.refuse_foreign(torn=torn)
        files_lib.make_dirs(self.directory)
        try:
            with lock.hold(self.directory):
                yield
        finally:
            if self._is_discarded:
                lock.forget(self.directory)
                files_lib.remove_empty(self.directory)

    @contextlib.contextmanager
    def opened(
        self,
        names: Sequence[str],
        *,
        overwrite: bool,
        reuses: str = "",
        mend: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    ) -> Iterator[Manifest | None]:
        """Locks the directory for this process and prepares it for this job.

        Args:
          names: every file that the job will make, without manifest and timings.
          overwrite: whether output of another job of this stage may be removed.
          reuses: a directory that the job reads, which must not be removed meanwhile.
          mend: makes anew what it can of a finished directory's missing and damaged files; returns
            the manifest as it is then.

        Yields:
          The manifest, if this same job is finished and its files are complete; else None.

        Raises:
          StageError: the directory holds other files or output of other inputs, or another
            process writes to it.
        """
        with self.locked(torn=overwrite):
            yield self._begin(names, overwrite=overwrite, reuses=reuses, mend=mend)

    def check(self) -> None:
        """Raises the StageErrors that `opened` raises without --overwrite; changes no file."""
        self._contents.refuse_foreign(torn=False)
        self._refuse_other(self._contents.records(torn=False))

    def owned_files(self) -> list[str]:
        """As `Contents.owned_files`."""
        return self._contents.owned_files()

    def _refuse_other(self, records: Records) -> None:
        manifest, existing = records.manifest, records.manifest or records.job
        differing = differences(existing["made_from"], self.made_from) if existing else []
        if differing:
            state, error = "finished", Conflict
            if not manifest:
                state, error = "unfinished", UnfinishedConflict
            raise error(
                f"--output_dir={self.directory}: holds {state} output of other inputs "
                f"({'; '.join(differing)}); {self._remedy}"
            )

    def _begin(
        self,
        names: Sequence[str],
        *,
        overwrite: bool,
        reuses: str,
        mend: Callable[[Manifest], Manifest],
    ) -> Manifest | None:
        """Removes or keeps existing output; returns the manifest if the job is finished."""
        records = self._contents.records(torn=overwrite)
        manifest, job = records.manifest, records.job
        if overwrite:
            self._clear(records)
            manifest = job = None
        else:
            self._refuse_other(records)
        is_pending = job is not None and job["made_from"] != self.made_from
        is_complete = manifest is not None and self.is_complete(manifest["files"])
        if manifest and not is_complete and not is_pending:
            manifest = mend(manifest)
            is_complete = self.is_complete(manifest["files"])
        if manifest and is_complete:
            self.forget_finished(manifest)
            return manifest
        if job and is_pending:
            raise self._other_append(job)
        self._remove_unfinished()
        self._write_job(self.made_from, names, reuses=reuses)
        files_lib.remove(self._path(MANIFEST))
        return None

    def undo_append(self, base: Manifest) -> None:
        """Removes the files of an unfinished append from a locked, finished directory.

        Args:
          base: the directory's manifest.
        """
        job = self.tasks.job()
        if job:
            kept = {entry["name"] for entry in base["files"]}
            self._remove_files([name for name in job["names"] if name not in kept])
            if previous_of(self.directory) == base:  # The append was about to replace `base`.
                self.forget_previous()
            files_lib.remove(self.tasks.path())

    def begin_append(self, names: Sequence[str], drops: Sequence[str] | None = None) -> None:
        """Prepares a locked, finished directory for further files; the directory stays finished.

        Args:
          names: every file that the job will make or replace.
          drops: files of the directory that go when the job is finished. None if all stay: then
            the manifest stays, too, as manifest.json.previous.
        """
        job = self.tasks.job()
        if job and job["made_from"] != self.made_from:
            raise self._other_append(job)
        self._remove_unfinished()
        self._drops, self._keeps_previous = drops or (), drops is None
        self._write_job(self.made_from, names, drops=self._drops)

    def complete_finished(self, manifest: Manifest) -> None:
        """Completes the job that made `manifest`, if it was killed after that."""
        job = self.tasks.job()
        if job and job["made_from"] == manifest["made_from"]:
            self.forget_finished(manifest)

    def forget_finished(self, manifest: Manifest) -> None:
        """Removes the leftovers of the job that made `manifest`, and of no other job."""
        # A killed try may have written the manifest and not waited for the disk.
        files_lib.sync(self.directory)
        job = self.tasks.job()
        if job is None or job["made_from"] == manifest["made_from"]:
            self._remove_unfinished()
            self._remove_files(job.get("drops", ()) if job else ())
            files_lib.remove(self.tasks.path())

    def replace_manifest(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Writes the manifest of a locked, finished directory anew; returns the manifest."""
        sync_files(self.directory, manifest["files"])
        files_lib.write_bytes(self._path(MANIFEST), sealed_json(manifest))
        return manifest

    def _other_append(self, job: Job) -> UnfinishedConflict:
        differing = "; ".join(differences(job["made_from"], self.made_from))
        return UnfinishedConflict(
            f"--output_dir={self.directory}: holds an unfinished --append or removal of other "
            f"inputs ({differing}); finish that first, or pass --overwrite to undo it"
        )

    def _remove_unfinished(self) -> None:
        subdirectories = map(self._path, self._subdirectories)
        for directory in (self.directory, self.tasks.path(), *subdirectories):
            files_lib.remove_unfinished(directory)

    def _write_job(
        self,
        made_from: Mapping[str, Any],
        names: Sequence[str],
        *,
        reuses: str = "",
        drops: Sequence[str] = (),
    ) -> None:
        files_lib.make_dirs(self.tasks.path())
        job: Job = {"stage": self.stage, "made_from": dict(made_from), "names": list(names)}
        if reuses:
            job["reuses"] = reuses
        if drops:
            job["drops"] = list(drops)
        files_lib.write_bytes(self.tasks.path(tasks.JOB), sealed_json(job))
        files_lib.sync(self.tasks.path())

    def is_complete(self, files: Iterable[FileEntry]) -> bool:
        """As `are_complete`."""
        return are_complete(self.directory, files)

    def looks_complete(self, files: Iterable[FileEntry]) -> bool:
        """As `is_complete`, without reading whole files of records: an append must not."""
        return are_complete(self.directory, files, records_by_size=True)

    def go_back(self, previous: Manifest) -> None:
        """Makes `manifest.json` the manifest before the last append, and forgets unfinished jobs.

        Args:
          previous: the content of manifest.json.previous; its files are on the disk.
        """
        files_lib.write_bytes(self._path(MANIFEST), sealed_json(previous))
        files_lib.remove(self.tasks.path())

    def forget_previous(self, *, damaged: bool = False) -> None:
        """Removes manifest.json.previous; if `damaged`, only a file that is damaged."""
        path = self._path(PREVIOUS)
        if not damaged or (not files_lib.is_dir(path) and not previous_of(self.directory)):
            files_lib.remove(path)

    def set_aside(self, names: Sequence[str]) -> None:
        """Moves files of the directory to a new directory in lost/, under the same paths."""
        earlier = [int(name) for name in files_lib.list_names(self._path(LOST)) if name.isdecimal()]
        folder = f"{1 + max(earlier, default=0):04d}"
        for name in names:
            target = self._path(LOST, folder, name)
            parent = target.rpartition("/")[0]
            files_lib.make_dirs(parent)
            files_lib.link(self._path(name), target)
            files_lib.sync(parent)
        self._remove_files(names)

    def _clear(self, records: Records) -> None:
        """Removes the output of earlier jobs, and nothing else."""
        manifest, job, is_torn = records
        existing = manifest or job
        if not existing and not self._contents.files():
            return
        names = [entry["name"] for entry in manifest["files"]] if manifest else []
        names += job["names"] if job else []
        names += self.owned_files() if is_torn else []
        # If this process is killed from here on, the next try finds an unfinished job to clear.
        self._write_job(existing["made_from"] if existing else {}, names)
        for name in (MANIFEST, PREVIOUS):
            files_lib.remove(self._path(name))
        files_lib.sync(self.directory)
        files_lib.remove(self._path(TIMINGS))
        self._remove_files(names)
        self.tasks.clear()  # job.json stays until the next job's takes its place.

    def _remove_files(self, names: Sequence[str]) -> None:
        files_lib.each(self.directory, lambda name: files_lib.remove(self._path(name)), names)
        if names:
            files_lib.sync(self.directory, *map(self._path, self._subdirectories))
        for name in self._subdirectories:
            files_lib.remove_empty(self._path(name))

    def discard(self) -> None:
        """Removes all that this job has written, and the directory if nothing else is in it."""
        job = self.tasks.job()
        self._remove_unfinished()
        self._remove_files(job["names"] if job else [])
        files_lib.remove(self.tasks.path())
        self._is_discarded = True

    def finish(
        self,
        manifest: Mapping[str, Any],
        markers: Mapping[str, Marker],
        **timings: Any,
    ) -> dict[str, Any]:
        """Writes timings.json and then the manifest, which makes the directory finished.

        Args:
          manifest: all keys but stage, format_version and made_from.
          markers: task -> marker; their seconds go to timings.json.
          **timings: further keys of timings.json.

        Returns:
          The manifest as written.
        """
        complete = {
            "stage": self.stage,
            "format_version": FORMAT_VERSION,
            "made_from": self.made_from,
            **manifest,
        }
        # A cluster repeats a killed task within the job; the first attempt may have left a file.
        self._remove_unfinished()
        content = {**tasks.timings(markers), **timings}
        files_lib.write_bytes(self._path(TIMINGS), readable_json(content))
        if self._keeps_previous:
            files_lib.link(self._path(MANIFEST), self._path(PREVIOUS))
        elif self._keeps_previous is False:
            files_lib.remove(self._path(PREVIOUS))
        sync_files(self.directory, complete["files"])
        files_lib.write_bytes(self._path(MANIFEST), sealed_json(complete))
        files_lib.sync(self.directory)
        self._remove_files(self._drops)
        files_lib.remove(self.tasks.path())
        return complete
