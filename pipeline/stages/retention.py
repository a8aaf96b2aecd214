"""Removes old exports, and never one that somebody may be reading."""

import os
from collections.abc import Iterator

from pipeline.cli.errors import StageError
from pipeline.stages import pointer, tasks
from pipeline.stages.manifest import MANIFEST, manifest_of
from pipeline.storage import files, lock

_STAGE = "export"


def remove_old(parent: str, latest: str, *, keep: int) -> Iterator[str]:
    """Removes old exports below a directory.

    Exports count in the order of their names, which begin with a date. Unfinished ones are removed
    if a finished one follows. What is no export, what a process writes, what `latest` names and
    what a running job takes rows from stays.

    Args:
      parent: the directory whose subdirectories are exports.
      latest: the pointer.
      keep: number of finished exports that stay.

    Yields:
      Each removed directory.

    Raises:
      StageError: a manifest is damaged.
    """
    target = pointer.read(latest)
    kept = {_place(target.directory)} if target else set()
    finished, unfinished, running = [], [], set()
    for name in files.list_names(parent):
        directory = files.join(parent, name)
        is_link = not files.is_url(parent) and os.path.islink(directory)
        if is_link or not files.is_dir(directory):
            continue
        if _place(directory) in kept:
            finished.append(directory)
            continue
        manifest, job = manifest_of(directory), tasks.Tasks(directory).job()
        if job and job["stage"] == _STAGE:
            if _is_held(directory):
                running.add(directory)
                kept.add(_place(job.get("reuses", "")))
            elif manifest is None:
                unfinished.append(directory)
        if manifest and manifest["stage"] == _STAGE:
            finished.append(directory)
    old = [directory for directory in finished[:-keep] if _place(directory) not in kept]
    last = finished[-1] if finished else ""
    old += [directory for directory in unfinished if directory < last]
    for directory in old:
        if directory not in running and _remove(directory):
            yield directory


def _place(directory: str) -> str:
    """A directory's name that does not depend on how it is written."""
    if files.is_url(directory) or not directory:
        return directory.rstrip("/")
    return os.path.realpath(directory)


def _is_held(directory: str) -> bool:
    try:
        with lock.hold(directory):
            return False
    except StageError:
        return True


def _remove(directory: str) -> bool:
    """Removes an export; its manifest or job last, so that a killed removal is begun again."""
    try:
        with lock.hold(directory):
            last = [MANIFEST, tasks.DIRECTORY]
            names = [name for name in files.list_names(directory) if name not in last]
            for name in [name for name in names if not lock.is_ours(name)] + last:
                files.remove(files.join(directory, name))
    except StageError:
        return False  # Another process has begun to write there.
    files.remove(directory)
    return True
