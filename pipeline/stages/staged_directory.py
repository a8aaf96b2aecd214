"""An output directory that changes from one finished state to the next.

While a job runs, its files wait in `.progress/files/`, and the output of the last job stays as it
is; so a job that fails, or is rejected, has changed nothing. At the end the job moves its files to
their places and removes the files that are obsolete.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

from pipeline.cli.errors import StageError
from pipeline.stages import quarantine, tasks
from pipeline.stages.contracts import ExportManifest, Manifest, StagedJob
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
        """Describes the job; touches no file.

        Args:
          directory: local path or fsspec URL.
          stage: "export".
          settings: what a directory keeps from run to run, unless it is overwritten.
          inputs: what may differ between runs.
        """
        super().__init__(directory, stage=stage, made_from={**settings, **inputs})
        self._settings = through_json(settings)
        self.tasks = tasks.Tasks(directory, staged=True)
        # Names of this stage's files in the directory, of any job.
        self._existing_files: set[str] = set()
        self._overwrites = False  # Whether the job ignores the output of earlier jobs.

    @contextlib.contextmanager
    def begun(self, *, overwrite: bool) -> Iterator[ExportManifest | None]:
        """Locks the directory for this process and prepares it for this job.

        Args:
          overwrite: whether output of other settings may be removed, and existing output must
            not be reused.

        Yields:
          The manifest of the reusable output, made from any inputs; None if nothing is reusable.

        Raises:
          StageError: the directory holds other files or output of other settings, or another
            process writes to it.
        """
        with self.locked():
            yield self._prepare(overwrite)

    def _prepare(self, overwrite: bool) -> ExportManifest | None:
        manifest = cast(ExportManifest | None, manifest_of(self.directory))
        job = cast(StagedJob | None, self.tasks.job())
        files = manifest["files"] if manifest else []
        self._existing_files = {entry["name"] for entry in files} | set(job["there"] if job else ())
        if overwrite:
            self._overwrites = True
            if not (job and job["overwrites"] and job["made_from"] == self.made_from):
                # First the list of existing files, by which the next try knows them after a kill.
                self._write_job_state(publishing=False)
                self.tasks.clear()
            self._remove_unfinished()
            return None
        # If a job that overwrites was stopped, its settings count.
        self._refuse_other_settings(job if job and job["overwrites"] else manifest or job)
        self._overwrites = bool(job and job["overwrites"])
        self._remove_unfinished()
        return None if self._overwrites or (job and job["publishing"]) else manifest

    def _refuse_other_settings(self, existing: Manifest | StagedJob | None) -> None:
        if existing is None:
            return
        made_from = existing["made_from"]
        existing_settings = {key: made_from[key] for key in self._settings if key in made_from}
        if differing := differences(existing_settings, self._settings):
            raise StageError(
                f"--output_dir={self.directory}: holds output made with other settings "
                f"({'; '.join(differing)}); name another directory, or pass --overwrite"
            )

    def begin_job(self) -> None:
        """Writes job.json; from here on tasks may run."""
        self._write_job_state(publishing=False)
        files_lib.make_dirs(self.tasks.files_directory)

    def _write_job_state(self, *, publishing: bool) -> None:
        files_lib.make_dirs(self.tasks.path())
        job: StagedJob = {
            "stage": self.stage,
            "made_from": self.made_from,
            "overwrites": self._overwrites,
            "publishing": publishing,
            "there": sorted(self._existing_files),
        }
        files_lib.write_bytes(self.tasks.path(tasks.JOB), sealed_json(job))

    def is_finished(self, manifest: Manifest | None) -> bool:
        """Whether this job would make `manifest`, and its files are complete."""
        return (
            manifest is not None
            and manifest["made_from"] == self.made_from
            and self.is_complete(manifest["files"])
        )

    def tidy(self, manifest: Manifest) -> None:
        """Removes the files of all jobs but those that `manifest` lists."""
        listed = {entry["name"] for entry in manifest["files"]}
        self._remove_files(sorted(self._existing_files - listed))
        files_lib.remove(self.tasks.path())

    def commit(self, manifest: Mapping[str, Any], timings: Mapping[str, Any]) -> dict[str, Any]:
        """Moves the job's files to their places, writes the manifest, and tidies up.

        Args:
          manifest: all keys but stage, format_version and made_from.
          timings: the contents of timings.json.

        Returns:
          The manifest as written.
        """
        complete = self._stamped(manifest)
        names = [entry["name"] for entry in complete["files"]]
        staged = self.tasks.files_directory
        waiting = {*files_lib.list_names(staged)}
        quarantine_files = files_lib.list_names(files_lib.join(staged, quarantine.DIRECTORY))
        waiting |= {f"{quarantine.DIRECTORY}/{name}" for name in quarantine_files}
        replaced = self._existing_files & waiting
        self._existing_files |= set(names)
        self._write_job_state(publishing=True)  # While files move, they fit no manifest.
        if replaced:
            files_lib.remove(self._path(MANIFEST))
        if quarantine_files:
            files_lib.make_dirs(self._path(quarantine.DIRECTORY))

        def move(name: str) -> None:
            files_lib.move(files_lib.join(staged, name), self._path(name))

        files_lib.each(staged, move, [name for name in names if name in waiting])
        files_lib.write_bytes(self._path(TIMINGS), readable_json(timings))
        files_lib.write_bytes(self._path(MANIFEST), sealed_json(complete))
        self.tidy(cast(Manifest, complete))
        return complete
