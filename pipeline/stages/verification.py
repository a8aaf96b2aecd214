"""Verifies the files of any finished stage against its manifest, and a model directory as a whole.

Data sets are verified by datasets/verification.py, and exports by reports/verification.py.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.cli.errors import StageError
from pipeline.cli.progress import Progress
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import FileEntry, ModelManifest
from pipeline.storage import files, trees

# What TensorFlow's loader looks for in the directory of a SavedModel: the program in three forms,
# its fingerprint, and four directories.
_OF_SAVED_MODEL = re.compile(
    r"saved_model[^/]*|fingerprint\.pb|(variables|assets|assets\.extra|debug)/.*", re.DOTALL
)


class Problem(NamedTuple):
    """A problem of a directory."""

    path: str
    offset: int | None  # Bytes from the beginning of the file; None for the whole file.
    reason: str
    is_unfinished_append: bool = False

    def __str__(self) -> str:
        return f"{self.path}{'' if self.offset is None else f' byte {self.offset}'}: {self.reason}"


class ReadFile(NamedTuple):
    """A file that a manifest lists, as it is now."""

    entry: FileEntry
    path: str
    data: bytes | None  # None if the file is missing or cannot be read.
    fault: str  # "" if the bytes are those of the entry.


def read(directory: str, entry: FileEntry) -> ReadFile:
    """Reads a file that a manifest lists, and compares its bytes with the entry."""
    path, data = files.join(directory, entry["name"]), None
    try:
        data = files.read_bytes(path)
        fault = fault_of(data, entry)
    except (FileNotFoundError, IsADirectoryError):
        fault = fault_of(None, entry)
    except OSError as error:  # Such as a part of the disk that cannot be read.
        fault = f"cannot be read ({error.strerror})"
    except StageError:
        fault = "is no regular file"
    return ReadFile(entry, path, data, fault)


def read_all(directory: str, entries: Sequence[FileEntry]) -> Iterator[ReadFile]:
    """As `read`, for each entry in turn; shows the progress."""
    progress = Progress("verify", total=len(entries), unit="files")
    for number, entry in enumerate(entries):
        yield read(directory, entry)
        progress.update(number + 1)
    progress.close()


def fault_of(data: bytes | None, entry: FileEntry) -> str:
    """The fault of a file as a whole, or ""; `data` is None if the file is missing."""
    if data is None:
        return "missing"
    if len(data) != entry["bytes"]:
        return f"{len(data)} bytes, expected {entry['bytes']}"
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        return "its sha256 differs from the manifest"
    return ""


def verify_model(directory: str) -> tuple[ModelManifest, Iterator[Problem]]:
    """Verifies a model directory.

    Args:
      directory: local path or fsspec URL.

    Returns:
      The manifest, and an iterator that reads the files and yields the problems.

    Raises:
      StageError: not a published model.
    """
    manifest = manifest_lib.read_manifest(directory, "train", "DIR")
    return manifest, _find_in_model(directory, manifest)


def unlisted_in_model(directory: str, entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The paths of files that belong to a SavedModel, and that its manifest does not list.

    Args:
      directory: a published model; local path or fsspec URL.
      entries: the files of its manifest.

    Raises:
      StageError: an object has a name that leads out of the directory.
    """
    listed = {entry["name"] for entry in entries}
    return [
        files.join(directory, name)
        for name in trees.read_tree(directory).stamps
        if _OF_SAVED_MODEL.fullmatch(name) and name not in listed
    ]


def _find_in_model(directory: str, manifest: ModelManifest) -> Iterator[Problem]:
    for file in read_all(directory, manifest["files"]):
        if file.fault:
            yield Problem(file.path, None, file.fault)
    for path in unlisted_in_model(directory, manifest["files"]):
        reason = "is not in the manifest, but TensorFlow looks for files of that name: remove it"
        yield Problem(path, None, reason)
    identity = {key: manifest[key] for key in ("format_version", "made_from")}
    yield from check_id(directory, "model_id", manifest["model_id"], identity)


def check_id(directory: str, key: str, stage_id: str, identity: object) -> Iterator[Problem]:
    """Yields a problem if an id of a manifest is no hash over `identity`."""
    expected = manifest_lib.content_id(identity)
    if stage_id != expected:
        path = files.join(directory, manifest_lib.MANIFEST)
        yield Problem(path, None, f"{key} is {stage_id}, expected {expected}, the hash of the rest")
