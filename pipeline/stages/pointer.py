"""A pointer to the newest of several finished directories, which moves in one atomic step.

Locally the pointer is a symbolic link. On an object store it is one object, PATH.json, with the
keys "path" and "export_id". A finished directory never changes, so a reader that has followed the
pointer once reads one export, whatever happens to the pointer meanwhile.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.cli.errors import StageError, UsageError
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files, lock


class Target(NamedTuple):
    """Where a pointer points."""

    directory: str
    export_id: str  # "" if the directory has no manifest.


def _object(path: str) -> str:
    return f"{path.rstrip('/')}.json"


def read(path: str) -> Target | None:
    """Where the pointer points; None if it does not exist.

    Raises:
      StageError: another file or directory is in its place.
    """
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
    directory = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
    manifest: Mapping[str, Any] = manifest_lib.manifest_of(directory) or {}
    return Target(directory, manifest.get("export_id", ""))


def resolve(path: str) -> str:
    """The directory to read for a path that may be a pointer."""
    if not files.is_url(path):
        return os.path.realpath(path) if os.path.islink(path) else path
    if files.exists(files.join(path, manifest_lib.MANIFEST)):
        return path
    target = read(path)
    return target.directory if target else path


def check(path: str, directory: str) -> None:
    """Raises a UsageError unless a pointer at `path` can name `directory`."""
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


def move(path: str, directory: str, *, seen: Target | None) -> bool:
    """Moves the pointer to a finished export, in one atomic step.

    Args:
      path: the pointer.
      directory: the export.
      seen: what `read` gave when the job began.

    Returns:
      Whether the pointer moved; False if it named the directory already.

    Raises:
      UsageError: see `check`.
      StageError: the export is unfinished or rejected, another job has moved the pointer, or
        moves it now.
    """
    check(path, directory)
    manifest = manifest_lib.read_manifest(directory, "export", "--to")
    if reasons := manifest.get("rejected"):
        raise StageError(
            f"{directory}: was rejected by --require ({', '.join(reasons)}), so --latest={path} "
            "stays where it is; name an export that was not rejected"
        )
    if not files.is_url(path):
        files.make_dirs(os.path.dirname(os.path.abspath(path)))
    with lock.hold_path(path):
        now = read(path)
        if now != seen:
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
        if now and os.path.realpath(now.directory) == os.path.realpath(directory):
            return False
        # Relative, so that a tree of exports can be moved as a whole.
        parent = os.path.dirname(os.path.abspath(path))
        files.swap_link(os.path.relpath(os.path.abspath(directory), parent), path)
        return True
