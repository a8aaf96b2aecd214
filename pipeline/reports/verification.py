"""Verifies an export: every file against the manifest, rows against counts, and its report."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.embeddings import files as row_files
from pipeline.embeddings.absence.contents import UNREADABLE
from pipeline.embeddings.comparison import changes
from pipeline.formats import tf_example, tfrecord
from pipeline.reports import state as report_state
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import verification
from pipeline.stages.contents import TIMINGS
from pipeline.stages.contracts import ExportManifest
from pipeline.stages.verification import Problem, ReadFile
from pipeline.storage import files as files_lib

# Of files that tell how the export was made.
_DELETE = "delete it, since no command makes it again and no row depends on it"


def verify(directory: str) -> tuple[ExportManifest, Iterator[Problem]]:
    """Verifies an export.

    Args:
      directory: output directory of export; local path or fsspec URL.

    Returns:
      The manifest, and an iterator that reads the export and yields its problems.

    Raises:
      StageError: not a finished export.
    """
    manifest = manifest_lib.read_manifest(directory, "export", "DIR")
    return manifest, _find(directory, manifest)


def _find(directory: str, manifest: ExportManifest) -> Iterator[Problem]:
    report, faults = _report_of(directory, manifest["export_id"])
    for file in verification.read_all(directory, [*manifest["files"], *report["files"]]):
        if file.fault:
            yield Problem(file.path, None, file.fault)
        if file.data is not None:
            yield from _find_in_file(file)
    yield from faults
    yield from _find_in_manifest(directory, manifest)
    yield from _find_unlisted(directory, manifest)
    yield from _find_in_timings(directory)


def _find_in_file(file: ReadFile) -> Iterator[Problem]:
    """Checks the records in a file that is there."""
    entry, data = file.entry, file.data or b""
    count = None
    if entry["name"].endswith(".tfrecord"):
        count = 0
        for item in tfrecord.scan(data, entry["name"]):
            if isinstance(item, tfrecord.Fault):
                yield Problem(file.path, item.offset, item.reason)
                continue
            offset, record = item
            if reason := _fault_of_row(record):
                yield Problem(file.path, offset, reason)
            else:
                count += 1
    elif not file.fault:
        try:
            count = _count(entry["name"], data)
        except UNREADABLE as error:
            yield Problem(file.path, None, f"cannot be read, though its sha256 fits ({error})")
    if count is not None and count != entry.get("num_examples"):
        reason = f"{count} intact rows, expected {entry.get('num_examples')}"
        yield Problem(file.path, None, reason)


def _fault_of_row(record: bytes) -> str:
    """The fault of a row in a TFRecord file, or ""."""
    from google.protobuf.message import DecodeError

    try:
        missing = {"id", "label", "record_sha"} - tf_example.parse_features(record).keys()
    except (DecodeError, ValueError) as error:
        return f"{len(record)} bytes that are no tf.Example ({error})"
    return f"a row without {', '.join(sorted(missing))}" if missing else ""


def _count(name: str, data: bytes) -> int | None:
    """The number of rows in an intact file; None for a file of another kind."""
    if name.endswith(".parquet"):
        import pyarrow.parquet as pq

        return pq.ParquetFile(io.BytesIO(data)).metadata.num_rows
    if name.endswith(".npy"):
        return len(np.load(io.BytesIO(data), allow_pickle=False))
    if name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            return sum(member.endswith(".json") for member in archive.getnames())
    return None


def _find_in_manifest(directory: str, manifest: ExportManifest) -> Iterator[Problem]:
    """Compares the counts of the manifest with each other, and its id with its inputs."""
    path = files_lib.join(directory, manifest_lib.MANIFEST)
    records, accounts = manifest["records"], manifest["shards"]
    listed = {entry["name"]: entry for entry in manifest["files"]}
    for task, account in accounts.items():
        yield from _find_in_account(path, task, account)
        entries = [listed[name] for name in account["files"]]
        for key, count in (("written", "num_examples"), ("quarantined", "num_quarantined")):
            for entry in entries:
                if entry.get(count, account[key]) != account[key]:
                    reason = f"{task}: {account[key]} records {key}, {entry['name']} has "
                    yield Problem(path, None, f"{reason}{entry[count]}")
    yield from _find_in_account(path, "all shards", records)
    for key in ("read", "written", "quarantined"):
        total = sum(account[key] for account in accounts.values())
        if records[key] != total:
            yield Problem(path, None, f"{records[key]} records {key}, the shards have {total}")
    identity = {
        **{key: manifest[key] for key in ("format_version", "made_from")},
        "shards": {task: account["made_of"] for task, account in accounts.items()},
    }
    yield from verification.check_id(directory, "export_id", manifest["export_id"], identity)


def _find_in_account(path: str, what: str, counts: Mapping[str, Any]) -> Iterator[Problem]:
    read, written, quarantined = (counts[key] for key in ("read", "written", "quarantined"))
    if read != written + quarantined:
        reason = f"{what}: {read} records read, expected {written} written + {quarantined} "
        yield Problem(path, None, f"{reason}quarantined")


def _find_unlisted(directory: str, manifest: ExportManifest) -> Iterator[Problem]:
    rows = files_lib.join(directory, row_files.ROWS_DIRECTORY)
    listed = {entry["name"] for entry in manifest["files"]}
    for name in files_lib.list_finished_names(rows):
        if f"{row_files.ROWS_DIRECTORY}/{name}" not in listed:
            reason = "is not in the manifest, but programs that read the folder read it: remove it"
            yield Problem(files_lib.join(rows, name), None, reason)


def _find_in_timings(directory: str) -> Iterator[Problem]:
    """Checks timings.json, and changes.parquet, whose entry is there.

    Both tell how the export was made, so the manifest lists neither, and either may be missing.
    """
    path = files_lib.join(directory, TIMINGS)
    try:
        timings = json.loads(files_lib.read_bytes(path))
        file = verification.read(directory, {**timings["changes"]["entry"], "name": changes.FILE})
    except (FileNotFoundError, KeyError):
        return  # Missing, or of an earlier version.
    except (OSError, ValueError, TypeError, RecursionError):
        yield Problem(path, None, f"is not as this program wrote it: {_DELETE}")
        return
    if file.fault and file.data is not None:
        yield Problem(file.path, None, f"does not fit its entry in {TIMINGS}: {_DELETE}")


def _report_of(directory: str, export_id: str) -> tuple[Mapping[str, Any], list[Problem]]:
    """The content of report.json, without files if they cannot be checked; and its problems."""
    nothing = {"files": []}
    path = files_lib.join(directory, report_state.FILE)
    try:
        state = report_state.read(directory)
    except StageError:
        return nothing, [Problem(path, None, "not as this program wrote it: damaged or changed")]
    if state is None:
        has_page = files_lib.exists(files_lib.join(directory, report_state.PAGE))
        return nothing, [Problem(path, None, "missing")] if has_page else []
    if state["export_id"] != export_id:
        whose = state["export_id"] or "an export whose report was not finished"
        return nothing, [Problem(path, None, f"is of {whose}, expected {export_id}")]
    return state, []
