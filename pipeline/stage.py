"""What every stage's output directory promises: manifest, identity, progress.

A stage's directory is finished when its `manifest.json` is there, which is
written last. Until then `.progress/` holds `job.json` (what is being made, and
the names of all files it will consist of) and one marker for each task that is
done. A marker carries size and sha256 of the task's files, so a file is taken for
whole because of what it holds and not because something of its name exists.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.errors import StageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TIMINGS = "timings.json"
_PROGRESS = ".progress"
_JOB = "job.json"
_LOCK = ".lock"

# Which command makes the directory that a reader misses.
_MADE_BY = {
    "preprocess": "python -m pipeline.preprocess",
    "train": "python -m trainer.main",
    "export": "python -m pipeline.export",
}


def canonical_json(value: Any) -> bytes:
    """The one JSON text of `value`: sorted keys, no spaces. What ids are hashed over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def readable_json(value: Any) -> bytes:
    """JSON for files that people open; keys stand in the order they were made in."""
    return (json.dumps(value, indent=1) + "\n").encode()


def content_id(made_from: Any) -> str:
    """16 hex digits that name `made_from`, a JSON value free of times and places."""
    return hashlib.sha256(canonical_json(made_from)).hexdigest()[:16]


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What differs between two settings, one readable line a key."""
    lines = []
    for key in sorted({*there, *asked}):
        if there.get(key) != asked.get(key):
            if isinstance(there.get(key), Mapping) and isinstance(asked.get(key), Mapping):
                lines += [f"{key}.{line}" for line in differences(there[key], asked[key])]
            else:
                lines.append(f"{key} is {there.get(key)!r} there and {asked.get(key)!r} here")
    return lines


def file_entry(name: str, data: bytes) -> dict[str, Any]:
    """The entry by which markers and manifests know a file: name, bytes, sha256."""
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_file(directory: str, name: str, data: bytes) -> dict[str, Any]:
    """Writes a file of the stage atomically and returns its entry."""
    storage.write_bytes(storage.join(directory, name), data)
    return file_entry(name, data)


def read_file(directory: str, entry: Mapping[str, Any]) -> bytes:
    """Reads a file that a manifest names.

    Raises:
      StageError: the file is missing, or its bytes are not the manifest's.
    """
    path = storage.join(directory, entry["name"])
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise StageError(
            f"{path}: missing, though {MANIFEST} lists it; make the directory again"
        ) from error
    found = file_entry(entry["name"], data)
    if found["sha256"] != entry["sha256"]:
        raise StageError(
            f"{path}: damaged: {found['bytes']} bytes with sha256 {found['sha256'][:12]}…, but "
            f"{MANIFEST} lists {entry['bytes']} bytes with {entry['sha256'][:12]}…; delete this "
            "file and run the command that made the directory again, it remakes what is missing"
        )
    return data


def _read_json(path: str) -> Any | None:
    """The JSON value in a file, or None where there is no such file."""
    try:
        return json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StageError(
            f"{path}: not valid JSON ({error}); make the directory again with --overwrite"
        ) from error


def read_manifest(directory: str, stage: str, flag: str) -> dict[str, Any]:
    """The manifest of a finished directory of the given stage.

    Args:
      directory: the stage's output directory.
      stage: "preprocess", "train" or "export".
      flag: the flag that named the directory, for the error message.

    Raises:
      StageError: no such directory, unfinished, or made by something else.
    """
    made_by = _MADE_BY[stage]
    if not storage.is_dir(directory):
        raise StageError(f"{flag}={directory}: no such directory; expected the output of {made_by}")
    manifest = _read_json(storage.join(directory, MANIFEST))
    if manifest is None:
        raise StageError(
            f"{flag}={directory}: has no {MANIFEST}, so it is unfinished or something else; "
            f"make it with {made_by}"
        )
    if not isinstance(manifest, dict) or manifest.get("stage") != stage:
        found = manifest.get("stage") if isinstance(manifest, dict) else manifest
        raise StageError(
            f"{flag}={directory}: {MANIFEST} is of stage {found!r}, expected {stage!r}; "
            f"name a directory made by {made_by}"
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        raise StageError(
            f"{flag}={directory}: {MANIFEST} has format version "
            f"{manifest.get('format_version')!r}, this program reads {FORMAT_VERSION}; "
            f"make it again with {made_by} --overwrite"
        )
    return manifest


class OutputDirectory:
    """One stage's output directory, from its first file to its manifest.

    Use under `storage.lock(directory)`. Workers call only `make_once`.
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
        self.made_from = json.loads(canonical_json(made_from))

    def _path(self, *names: str) -> str:
        return storage.join(self.directory, *names)

    def begin(self, names: Sequence[str], *, overwrite: bool) -> dict[str, Any] | None:
        """Makes the directory ready for this job.

        Args:
          names: every file that the job will make, without manifest and timings.
          overwrite: whether what another job made here may go.

        Returns:
          The manifest, if this very job is finished and its files are all there.

        Raises:
          StageError: something else is in the directory.
        """
        manifest = _read_json(self._path(MANIFEST))
        job = _read_json(self._path(_PROGRESS, _JOB))
        if manifest is None and job is None:
            # A job killed before its first file leaves these two and nothing else.
            ours = (_LOCK, _PROGRESS)
            foreign = [n for n in storage.list_names(self.directory) if n not in ours]
            if foreign:
                raise StageError(
                    f"--output_dir={self.directory}: holds {foreign[0]!r} and neither {MANIFEST} "
                    f"nor {_PROGRESS}/, so it is no output of this command; name a new directory"
                )
        else:
            known = manifest if manifest is not None else job
            differ = differences(
                {"stage": known.get("stage"), **known.get("made_from", {})},
                {"stage": self.stage, **self.made_from},
            )
            if differ and not overwrite:
                state = "finished" if manifest is not None else "unfinished"
                raise StageError(
                    f"--output_dir={self.directory}: holds {state} output of other inputs "
                    f"({'; '.join(differ)}); name another directory, or pass --overwrite"
                )
            if overwrite:
                self._clear(manifest, job)
                manifest = None
        storage.remove_unfinished(self.directory)
        storage.remove_unfinished(self._path(_PROGRESS))
        if manifest is not None and self._is_complete(manifest):
            storage.remove(self._path(_PROGRESS))
            return manifest
        storage.make_dirs(self._path(_PROGRESS))
        job = {"stage": self.stage, "made_from": self.made_from, "names": list(names)}
        storage.write_bytes(self._path(_PROGRESS, _JOB), readable_json(job))
        storage.remove(self._path(MANIFEST))
        return None

    def _is_complete(self, manifest: Mapping[str, Any]) -> bool:
        """Whether every file is there at its size; contents are checked when read."""
        for entry in manifest["files"]:
            try:
                if storage.num_bytes(self._path(entry["name"])) != entry["bytes"]:
                    return False
            except FileNotFoundError:
                return False
        return True

    def _clear(self, manifest: Mapping[str, Any] | None, job: Mapping[str, Any] | None) -> None:
        """Removes what this command made here, and nothing else."""
        storage.remove(self._path(MANIFEST))  # First: from here on it is unfinished.
        names = [entry["name"] for entry in (manifest or {}).get("files", [])]
        names += (job or {}).get("names", [])
        for name in names:
            storage.remove(self._path(name))
        storage.remove(self._path(TIMINGS))
        storage.remove(self._path(_PROGRESS))

    def _marker_path(self, task: str) -> str:
        return self._path(_PROGRESS, f"{task}.json")

    def make_once(
        self, task: str, make: Callable[[], tuple[list[dict[str, Any]], dict[str, float]]]
    ) -> None:
        """Does one task unless an earlier try has; afterwards its marker stands.

        Args:
          task: name of the task, unique in the job.
          make: writes the task's files and returns their entries, and the seconds
            it spent on each kind of work.
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
                return
            marker = {"entries": entries, "secs": secs}
            reused = False
        else:
            reused = True
        self._write_marker(task, {**marker, "reused": reused})

    def _write_marker(self, task: str, marker: Mapping[str, Any]) -> None:
        storage.write_bytes(self._marker_path(task), readable_json(marker))

    def _whole_task(self, task: str) -> dict[str, Any] | None:
        """The marker of a task whose files are all as they were when it was marked."""
        try:
            marker = _read_json(self._marker_path(task))
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
            marker = _read_json(self._marker_path(task)) or {"failed": f"{task} was not done"}
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
        storage.write_bytes(self._path(MANIFEST), readable_json(whole))
        storage.remove(self._path(_PROGRESS))
        return whole
