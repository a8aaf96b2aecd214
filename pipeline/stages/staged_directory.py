"""An output directory that changes from one finished state to the next all at once.

While a job runs, its files wait in `.progress/files/`, and what an earlier job has
finished stays as it is; so a job that fails, or may not publish, has changed nothing.
In the end the files are moved to their places and those that are of no use any more go.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.cli.errors import StageError
from pipeline.stages import quarantine, tasks
from pipeline.stages.manifest import (
    MANIFEST,
    differences,
    manifest_of,
    readable_json,
    sealed_json,
    through_json,
)
from pipeline.stages.output_directory import TIMINGS, OutputDirectory
from pipeline.storage import files as files_lib


class StagedDirectory(OutputDirectory):
    """One stage's output directory, from one manifest to the next."""

    def __init__(
        self,
        directory: str,
        *,
        stage: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Any],
    ):
        """Names the directory and what is to be made in it.

        Args:
          directory: local path or fsspec URL.
          stage: "export".
          settings: what a directory is made with, and keeps unless it is overwritten.
          inputs: what may differ from one run to the next.
        """
        super().__init__(directory, stage=stage, made_from={**settings, **inputs})
        self._settings = through_json(settings)
        self.tasks = tasks.Tasks(directory, staged=True)
        # Files of this stage that lie in the directory, whichever job put them there.
        self._there: set[str] = set()
        self._overwrites = False  # Whether nothing of an earlier job is used.

    @contextlib.contextmanager
    def begun(self, *, overwrite: bool) -> Iterator[dict[str, Any] | None]:
        """Holds the directory for this process, made ready for this job.

        Args:
          overwrite: whether what was made with other settings may go, and nothing of what is
            there may be used again.

        Yields:
          The manifest of what is there and may be used again, whatever its inputs; None if
          there is nothing.

        Raises:
          StageError: something else is in the directory, or another process writes to it.
        """
        with self.held():
            yield self._prepare(overwrite)

    def _prepare(self, overwrite: bool) -> dict[str, Any] | None:
        manifest = manifest_of(self.directory)
        job = self.tasks.job()
        files = manifest["files"] if manifest else ()
        self._there = {entry["name"] for entry in files} | set(job["there"] if job else ())
        if overwrite:
            self._overwrites = True
            if not (job and job["overwrites"] and job["made_from"] == self.made_from):
                # First the note of what is there: killed here, the next try knows it by that.
                self._write_job_state(publishing=False)
                self.tasks.clear()
            self._remove_unfinished()
            return None
        # Where an overwriting job was stopped, its settings are the ones that count.
        self._refuse_other_settings(job if job and job["overwrites"] else manifest or job)
        self._overwrites = bool(job and job["overwrites"])
        self._remove_unfinished()
        return None if self._overwrites or (job and job["publishing"]) else manifest

    def _refuse_other_settings(self, known: Mapping[str, Any] | None) -> None:
        if known is None:
            return
        there = {k: known["made_from"][k] for k in self._settings if k in known["made_from"]}
        if differ := differences(there, self._settings):
            raise StageError(
                f"--output_dir={self.directory}: holds output made with other settings "
                f"({'; '.join(differ)}); name another directory, or pass --overwrite"
            )

    def begin_job(self) -> None:
        """Notes what is being made; from here on there are tasks."""
        self._write_job_state(publishing=False)
        files_lib.make_dirs(self.tasks.files_directory)

    def _write_job_state(self, *, publishing: bool) -> None:
        files_lib.make_dirs(self.tasks.path())
        job = {
            "stage": self.stage,
            "made_from": self.made_from,
            "overwrites": self._overwrites,
            "publishing": publishing,
            "there": sorted(self._there),
        }
        files_lib.write_bytes(self.tasks.path(tasks.JOB), sealed_json(job))

    def is_finished(self, manifest: Mapping[str, Any] | None) -> bool:
        """Whether `manifest` is what this job would make, and its files are all there."""
        return (
            manifest is not None
            and manifest["made_from"] == self.made_from
            and self.is_complete(manifest["files"])
        )

    def tidy(self, manifest: Mapping[str, Any]) -> None:
        """Removes what jobs have left that are neither `manifest`'s files nor needed to go on."""
        self._remove_files(sorted(self._there - {entry["name"] for entry in manifest["files"]}))
        files_lib.remove(self.tasks.path())

    def publish(self, manifest: Mapping[str, Any], timings: Mapping[str, Any]) -> dict[str, Any]:
        """Moves the job's files to their places, writes the manifest, and tidies up.

        Args:
          manifest: what the manifest says beside stage, version and made_from.
          timings: the contents of timings.json.

        Returns:
          The manifest as written.
        """
        whole = self._stamped(manifest)
        names = [entry["name"] for entry in whole["files"]]
        staged = self.tasks.files_directory
        waiting = {*files_lib.list_names(staged)}
        of_quarantine = files_lib.list_names(files_lib.join(staged, quarantine.DIRECTORY))
        waiting |= {f"{quarantine.DIRECTORY}/{name}" for name in of_quarantine}
        replaced = self._there & waiting
        self._there |= set(names)
        self._write_job_state(publishing=True)  # Files that change fit no manifest for a moment.
        if replaced:
            files_lib.remove(self._path(MANIFEST))
        if of_quarantine:
            files_lib.make_dirs(self._path(quarantine.DIRECTORY))

        def move(name: str) -> None:
            files_lib.move(files_lib.join(staged, name), self._path(name))

        files_lib.each(staged, move, [name for name in names if name in waiting])
        files_lib.write_bytes(self._path(TIMINGS), readable_json(timings))
        files_lib.write_bytes(self._path(MANIFEST), sealed_json(whole))
        self.tidy(whole)
        return whole
