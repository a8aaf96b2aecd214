"""A pointer to the newest of several finished directories, which moves in one atomic step.

Locally the pointer is a symbolic link. On an object store it is one object, PATH.json, with the
keys "path" and "export_id". A finished directory never changes, so a reader that has followed the
pointer once reads one export, whatever happens to the pointer meanwhile.
"""

import json
import os
import pathlib
from typing import NamedTuple, cast

from pipeline.cli.errors import StageError, UsageError
from pipeline.stages import gate, output_directory, tasks
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import ExportManifest
from pipeline.storage import files, lock


class Target(NamedTuple):
    """Where a pointer points."""

    directory: str
    export_id: str  # "" if the directory has no manifest, or a damaged one.


def _without_slash(path: str) -> str:
    """A path without slashes at its end, which would make a link the directory that it names."""
    return path.rstrip("/") or path


def _object(path: str) -> str:
    return f"{path}.json"


def read(path: str) -> Target | None:
    """Where the pointer points; None if it does not exist.

    Raises:
      StageError: another file or directory is in its place, or it names no export.
    """
    path = _without_slash(path)
    if files.is_url(path):
        try:
            content = json.loads(files.read_bytes(_object(path)))
            return Target(str(content["path"]), str(content["export_id"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(
                f"--latest={path}: {_object(path)} is no pointer ({error}); expected the keys path "
                "and export_id: remove the object, or name another path"
            ) from error
    if not os.path.lexists(path):
        return None
    if not os.path.islink(path):
        raise StageError(
            f"--latest={path}: is no symbolic link; expected a path that this command makes a "
            "link: name another path"
        )
    directory = files.place(path)
    try:
        manifest = manifest_lib.manifest_of(directory)
        record = manifest or tasks.Tasks(directory).job()
    except StageError:
        return Target(directory, "")  # The pointer may leave a damaged export.
    if os.path.exists(directory) and (record is None or record["stage"] != "export"):
        raise StageError(
            f"--latest={path}: is a link to {directory}, which is no export; expected a link that "
            "this command has made: name another path, or, if the export has lost its manifest, "
            "make that export again without --latest"
        )
    return Target(directory, cast(ExportManifest, manifest)["export_id"] if manifest else "")


def resolve(path: str) -> str:
    """The directory to read for a path that may be a pointer."""
    path = _without_slash(path)
    if not files.is_url(path):
        return files.place(path) if os.path.islink(path) else path
    if files.exists(files.join(path, manifest_lib.MANIFEST)):
        return path
    target = read(path)
    return target.directory if target else path


def check(path: str, directory: str) -> None:
    """Raises a UsageError unless a pointer at `path` can name `directory`."""
    path = _without_slash(path)
    if files.is_url(path) != files.is_url(directory):
        raise UsageError(
            f"--latest={path}: expected a URL if the directory is a URL, and else a local path; "
            f"the directory is {directory}"
        )
    parent = path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
    if files.is_within(parent, directory):
        raise UsageError(
            f"--latest={path}: lies in the directory that it shall name, {directory}; name a path "
            "outside of it"
        )
    if _leads_through(directory, path):
        raise UsageError(
            f"--latest={path}: the directory that it shall name, {directory}, is this path or lies "
            "below it; name another path"
        )


def _leads_through(directory: str, link: str) -> bool:
    """Whether `directory` is the path of a link, or lies below that path."""
    if files.is_url(link):
        return files.is_within(directory, link)

    def unfollowed(path: str) -> str:
        parent, name = os.path.split(path)
        return os.path.join(os.path.realpath(parent), name)

    path = pathlib.PurePath(directory)
    return unfollowed(link) in [unfollowed(str(p)) for p in (path, *path.parents)]


def move(path: str, directory: str, *, seen: Target | None, is_new: bool = False) -> bool:
    """Moves the pointer to a finished export, in one atomic step.

    Args:
      path: the pointer.
      directory: the export, or a pointer to it.
      seen: what `read` gave when the job began.
      is_new: whether the caller has just finished the export, or checked its files.

    Returns:
      Whether the pointer moved; False if it named the directory already.

    Raises:
      UsageError: see `check`.
      StageError: the export is unfinished, incomplete or rejected, another job has moved the
        pointer, or moves it now.
    """
    path, flag = _without_slash(path), "--output_dir" if is_new else "--to"
    directory = resolve(directory)
    manifest = _good_manifest(path, directory, flag)
    check(path, directory)
    if not is_new and not output_directory.are_complete(directory, manifest["files"]):
        raise StageError(
            f"{flag}={directory}: a file is missing or damaged, so --latest={path} stays where it "
            "is; expected the files as they were exported: name another export"
        )
    if not files.is_url(path):
        files.make_dirs(os.path.dirname(path) or ".")
    with lock.hold_path(path):
        _good_manifest(path, directory, flag)  # It may have been removed meanwhile.
        now = read(path)
        if (now and now.directory) != (seen and seen.directory):
            raise StageError(
                f"--latest={path}: names {now.directory if now else 'nothing'} now, and named "
                f"{seen.directory if seen else 'nothing'} when this job began; expected one job at "
                "a time: look at both exports, and move it with python -m pipeline.latest"
            )
        target = Target(directory, manifest["export_id"])
        if files.is_url(path):
            if now == target:
                return False
            text = json.dumps({"path": directory, "export_id": manifest["export_id"]}) + "\n"
            files.write_bytes(_object(path), text.encode())
            return True
        if now and files.is_same_place(now.directory, directory):
            files.sync(os.path.dirname(path))  # A killed job may have moved it.
            return False
        # Relative, so that a tree of exports can be moved as a whole. The kernel goes up from
        # where the link lies, so neither path may hold another link.
        parent = files.place(os.path.dirname(path) or ".")
        files.sync(directory)  # A killed job may have written the manifest.
        files.swap_link(os.path.relpath(files.place(directory), parent), path)
        return True


def _good_manifest(path: str, directory: str, flag: str) -> ExportManifest:
    """The manifest of a finished export; raises a StageError if the export was rejected."""
    manifest = manifest_lib.read_manifest(directory, "export", flag)
    if rejection := gate.rejection(directory, manifest):
        raise StageError(
            f"{rejection}, so --latest={path} stays where it is; name an export that was not "
            "rejected"
        )
    return manifest
