"""Removes old exports, and never one that somebody may be reading."""

import contextlib
import os
import sys
import uuid
from collections.abc import Iterator

from pipeline.cli.errors import StageError
from pipeline.stages import pointer, tasks
from pipeline.stages.contracts import Job, Manifest
from pipeline.stages.manifest import MANIFEST, manifest_of, sealed_json
from pipeline.storage import files, lock

_STAGE = "export"
# Begins the names of local directories whose removal has begun.
_REMOVING = ".removing-"


def remove_old(parent: str, latest: str, *, keep: int) -> Iterator[str]:
    """Removes old exports below a directory.

    Exports count in the order of their names, which begin with a date. Rejected and unfinished ones
    do not count, and are removed if a good one follows. What is no export, what a process writes,
    what `latest` or another pointer in `parent` names, and what a running job in `parent` takes
    rows from stays. A directory with a damaged manifest stays, and a line says so.

    Args:
      parent: the directory whose subdirectories are exports.
      latest: the pointer.
      keep: number of good exports that stay.

    Yields:
      Each removed directory.

    Raises:
      StageError: no such directory.
    """
    if not files.is_dir(parent):
        raise StageError(f"--of={parent}: no such directory; expected the directory of the exports")
    files.sync(os.path.dirname(latest.rstrip("/")))  # A killed job may have moved the pointer.
    kept = _named_places(parent, latest)
    good: list[str] = []
    others: list[str] = []
    manifests: dict[str, Manifest | None] = {}
    for directory in _directories(parent):
        try:
            manifest, job = manifest_of(directory), tasks.Tasks(directory).job()
        except StageError as error:
            print(f"latest: {directory} stays: {error}", file=sys.stderr)
            continue
        if job and job["stage"] == _STAGE and _is_held(directory):
            kept += [files.place(directory), files.place(job.get("reuses") or directory)]
        record = manifest or job
        if record and record["stage"] == _STAGE:
            manifests[directory] = manifest
            is_good = manifest and not manifest.get("rejected")
            (good if is_good else others).append(directory)
    last = good[-1] if good else ""
    for directory in [*good[:-keep], *(name for name in others if name < last)]:
        if not _is_needed(directory, kept) and _remove(directory, latest, manifests[directory]):
            yield directory


def _directories(parent: str) -> Iterator[str]:
    """The directories in `parent`, links excluded; finishes removals that were killed."""
    for name in files.list_names(parent):
        directory = files.join(parent, name)
        if not files.is_dir(directory) or _is_link(directory):
            continue
        if name.startswith(_REMOVING):
            with contextlib.suppress(FileNotFoundError):  # Another process finishes it, too.
                files.remove(directory)
        else:
            yield directory


def _is_link(path: str) -> bool:
    return not files.is_url(path) and os.path.islink(path)


def _named_places(parent: str, latest: str) -> list[str]:
    """The places that `latest` and the other pointers in `parent` name."""
    paths = [files.join(parent, name) for name in files.list_names(parent)]
    if not files.is_url(parent):
        return [files.place(path) for path in [latest, *filter(os.path.islink, paths)]]
    pointers = [path.removesuffix(".json") for path in paths if path.endswith(".json")]
    places = []
    for path in [latest, *pointers]:
        with contextlib.suppress(StageError):  # Another object, which is no pointer.
            if target := pointer.read(path):
                places.append(files.place(target.directory))
    return places


def _is_needed(directory: str, kept: list[str]) -> bool:
    return any(files.is_within(path, directory) for path in kept)


def _is_held(directory: str) -> bool:
    try:
        with lock.hold(directory):
            return False
    except StageError:
        return True


def _remove(directory: str, latest: str, manifest: Manifest | None) -> bool:
    """Removes an export unless a pointer or a process has come to use it.

    Args:
      directory: the export.
      latest: the pointer.
      manifest: the manifest that the directory had when it was found to be old.

    Returns:
      Whether the export is removed.
    """
    parent = os.path.dirname(directory)
    try:
        with lock.hold(directory):
            with lock.hold_path(latest):
                is_needed = _is_needed(directory, _named_places(parent, latest))
                if is_needed or manifest_of(directory) != manifest:
                    return False
                directory = _set_aside(directory, manifest)
            for name in files.list_names(directory):
                if name != tasks.DIRECTORY and not lock.is_ours(name):
                    files.remove(files.join(directory, name))
    except StageError:
        return False  # Another process has begun to write there.
    files.remove(directory)
    return True


def _set_aside(directory: str, manifest: Manifest | None) -> str:
    """Makes an export look like no finished one, so that a killed removal is begun again.

    Returns:
      Where its files are now. Locally they move in one step. On an object store the export becomes
      an unfinished one.
    """
    if not files.is_url(directory):
        parent, name = os.path.split(directory)
        hidden = os.path.join(parent, f"{_REMOVING}{name}-{uuid.uuid4().hex}")
        os.rename(directory, hidden)
        files.sync(parent)
        return hidden
    if manifest:
        names = [entry["name"] for entry in manifest["files"]]
        job: Job = {"stage": _STAGE, "made_from": manifest["made_from"], "names": names}
        files.write_bytes(tasks.Tasks(directory).path(tasks.JOB), sealed_json(job))
        files.remove(files.join(directory, MANIFEST))
    return directory
