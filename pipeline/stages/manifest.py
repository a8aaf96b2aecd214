"""What a finished stage hands to the next: a manifest, ids, and files with checksums.

A stage writes `manifest.json` last, so a directory with a manifest is finished. How a Beam stage
fills its directory is in output_directory.py.
"""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Literal, overload

import google_crc32c

from pipeline.cli.errors import StageError
from pipeline.stages import manifest_check
from pipeline.stages.contracts import (
    DatasetManifest,
    ExportManifest,
    FileEntry,
    Manifest,
    ModelManifest,
)
from pipeline.storage import files

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# The manifest before the last append to a data set.
PREVIOUS = "manifest.json.previous"

# Stage -> the command that makes its directory.
_MADE_BY = {
    "preprocess": "python -m pipeline.preprocess",
    "train": "python -m trainer.main",
    "export": "python -m pipeline.export",
}
_SEAL = "sha256_of_the_rest"


def canonical_json(value: Any) -> bytes:
    """The canonical JSON of `value`: sorted keys, no spaces. Ids are hashes of canonical JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def readable_json(value: Any) -> bytes:
    """JSON for files that people open; keys keep their order."""
    return (json.dumps(value, indent=1) + "\n").encode()


def through_json(value: Any) -> Any:
    """`value` as written to a JSON file and read back."""
    return json.loads(canonical_json(value))


def content_id(made_from: Any) -> str:
    """16 hex digits that identify `made_from`, a JSON value without times and places."""
    return hashlib.sha256(canonical_json(made_from)).hexdigest()[:16]


def differences(existing: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """The differences between the settings in a directory and those of this command.

    Returns:
      A readable line for each key that differs; "there" is the directory, "here" this command.
    """
    lines = []
    for key in sorted({*existing, *requested}):
        if existing.get(key) != requested.get(key):
            old, new = existing.get(key), requested.get(key)
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                lines += [f"{key}.{line}" for line in differences(old, new)]
            elif isinstance(old, Mapping):
                lines.append(f"{key} is there and not here")
            elif isinstance(new, Mapping):
                lines.append(f"{key} is here and not there")
            else:
                lines.append(f"{key} is {_short(old)} there and {_short(new)} here")
    return lines


def _short(value: Any) -> str:
    """A value for a message; long values are cut."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:12]}…"


def file_entry(name: str, data: bytes) -> FileEntry:
    """The entry of a file in markers and manifests: name, bytes, sha256, crc32c."""
    return _entry(name, len(data), hashlib.sha256(data), google_crc32c.value(data))


def _entry(name: str, num_bytes: int, sha256: Any, crc32c: int) -> FileEntry:
    return {
        "name": name,
        "bytes": num_bytes,
        "sha256": sha256.hexdigest(),
        "crc32c": base64.b64encode(crc32c.to_bytes(4, "big")).decode(),
    }


def write_file(directory: str, name: str, data: bytes) -> FileEntry:
    """Writes a file of the stage atomically and returns its entry."""
    files.write_bytes(files.join(directory, name), data)
    return file_entry(name, data)


class HashedFile:
    """A file to write that counts and hashes the written bytes."""

    def __init__(self, name: str, file: BinaryIO):
        """Wraps an open file; `name` goes to the entry."""
        self._name, self._file = name, file
        self._sha256, self._crc32c, self._num_bytes = hashlib.sha256(), 0, 0

    def write(self, data: bytes) -> int:
        """Writes all of `data`."""
        self._sha256.update(data)
        self._crc32c = google_crc32c.extend(self._crc32c, bytes(data))
        self._num_bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flushes the file."""
        self._file.flush()

    def entry(self) -> FileEntry:
        """The entry of the bytes written so far."""
        return _entry(self._name, self._num_bytes, self._sha256, self._crc32c)


@contextlib.contextmanager
def writing(directory: str, name: str) -> Iterator[HashedFile]:
    """As `write_file`, piece by piece: the file appears when the block succeeds."""
    with files.open_atomic(files.join(directory, name)) as file:
        yield HashedFile(name, file)


def write_lines(directory: str, name: str, lines: Iterable[bytes]) -> FileEntry:
    """As `write_file`, a line at a time."""
    with writing(directory, name) as file:
        for line in lines:
            file.write(line)
    return file.entry()


def sync_files(directory: str, entries: Iterable[FileEntry]) -> None:
    """Waits until the disk holds the names of a stage's files, so that a manifest may list them."""
    files.sync(*(files.join(directory, entry["name"].rpartition("/")[0]) for entry in entries))


def read_file(directory: str, entry: FileEntry) -> bytes:
    """Reads a file that a manifest names.

    Raises:
      StageError: the file is missing, or its bytes are not the manifest's.
    """
    path = files.join(directory, entry["name"])
    try:
        data = files.read_bytes(path)
    except FileNotFoundError as error:
        raise StageError(
            f"{path}: missing, though {MANIFEST} lists it; run the command that made the directory "
            "again, or mend a data set with python -m pipeline.verify --repair"
        ) from error
    actual = file_entry(entry["name"], data)
    if actual["sha256"] != entry["sha256"]:
        raise StageError(
            f"{path}: damaged: {actual['bytes']} bytes with sha256 {actual['sha256'][:12]}…, but "
            f"{MANIFEST} lists {entry['bytes']} bytes with {entry['sha256'][:12]}…; run the "
            "command that made the directory again, which makes this file anew, or mend a data set "
            "with python -m pipeline.verify --repair"
        )
    return data


def intact_entry(directory: str, entry: FileEntry, *, may_fetch: bool = True) -> FileEntry | None:
    """The entry of a file that has the bytes that a manifest lists; None if it has others.

    A local file is read, and its sha256 compared. Of an object the store tells a CRC32C.

    Args:
      directory: the stage's; local path or fsspec URL.
      entry: the file's, of the manifest.
      may_fetch: whether to read an object if the store or the entry has no CRC32C. If not, its
        size decides.

    Returns:
      The entry; if the file was read, with the key crc32c, which earlier versions did not write.

    Raises:
      StageError: the store fails, or a pipe or device is in the file's place.
    """
    path = files.join(directory, entry["name"])
    try:
        if files.is_url(path):
            num_bytes, crc32c = files.size_and_crc32c(path)
            if num_bytes != entry["bytes"]:
                return None
            if crc32c and "crc32c" in entry:
                return entry if crc32c == entry["crc32c"] else None
            if not may_fetch:
                return entry
        actual = file_entry(entry["name"], files.read_bytes(path))
    except OSError:  # Missing, a directory, or on a part of the disk that cannot be read.
        return None
    return {**actual, **entry} if actual["sha256"] == entry["sha256"] else None


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """JSON with a checksum of itself, for files that this program reads back."""
    return readable_json({**value, _SEAL: hashlib.sha256(canonical_json(value)).hexdigest()})


def read_sealed(path: str) -> dict[str, Any] | None:
    """Reads a file written with `sealed_json`; None if no such file exists.

    Raises:
      StageError: the checksum does not fit: the file was damaged or changed.
    """
    try:
        value: dict[str, Any] = json.loads(files.read_bytes(path))
        if value.pop(_SEAL) == hashlib.sha256(canonical_json(value)).hexdigest():
            return value
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (
        *(ValueError, AttributeError, TypeError, KeyError, IsADirectoryError),
        RecursionError,  # Deeply nested brackets.
    ):
        pass  # Not JSON, not an object, or without a checksum.
    raise StageError(
        f"{path}: not as this program wrote it: damaged, changed by hand, or made by another "
        "program; mend a data set with python -m pipeline.verify --repair; else run the command "
        "that made the directory again, with --overwrite, or name another directory"
    )


def manifest_of(directory: str) -> Manifest | None:
    """The manifest of a directory of any stage; None if the directory has no manifest.

    Raises:
      StageError: the manifest is damaged, or has values that this program never writes.
    """
    return _read_manifest(files.join(directory, MANIFEST))


def previous_of(directory: str) -> Manifest | None:
    """The manifest before the last append; None if there is none, or if the file is damaged."""
    try:
        return _read_manifest(files.join(directory, PREVIOUS))
    except StageError:
        return None


def _read_manifest(path: str) -> Manifest | None:
    value = read_sealed(path)
    if value is None:
        return None
    if value.get("format_version") != FORMAT_VERSION:
        raise StageError(
            f"{path}: has format version {value.get('format_version')!r}, this program reads "
            f"{FORMAT_VERSION}; make the directory again with --overwrite, or name another one"
        )
    return manifest_check.manifest(path, value)


@overload
def read_manifest(directory: str, stage: Literal["preprocess"], flag: str) -> DatasetManifest: ...


@overload
def read_manifest(directory: str, stage: Literal["train"], flag: str) -> ModelManifest: ...


@overload
def read_manifest(directory: str, stage: Literal["export"], flag: str) -> ExportManifest: ...


@overload
def read_manifest(directory: str, stage: None, flag: str) -> Manifest: ...


def read_manifest(directory: str, stage: str | None, flag: str) -> Manifest:
    """The manifest of a finished directory of the given stage.

    Args:
      directory: the stage's output directory.
      stage: "preprocess", "train" or "export"; None for any of them.
      flag: the flag that named the directory, such as "--data_dir", for the error message.

    Raises:
      StageError: the directory does not exist, is unfinished, or belongs to another stage.
    """
    made_by = _MADE_BY[stage] if stage else " or ".join(_MADE_BY.values())
    if not files.is_dir(directory):
        raise StageError(f"{flag}={directory}: no such directory; expected the output of {made_by}")
    manifest = manifest_of(directory)
    if manifest is None:
        hint = f"make it with {made_by}"
        if stage in ("train", None) and files.exists(files.join(directory, "export", MANIFEST)):
            hint = f"did you mean {files.join(directory, 'export')}?"
        if previous_of(directory):
            hint = "mend it with python -m pipeline.verify --repair"
        raise StageError(
            f"{flag}={directory}: has no {MANIFEST}, so it is unfinished or no output directory; "
            f"{hint}"
        )
    if stage and manifest["stage"] != stage:
        raise StageError(
            f"{flag}={directory}: {MANIFEST} is of stage {manifest['stage']!r}, "
            f"expected {stage!r}; name a directory made by {made_by}"
        )
    return manifest
