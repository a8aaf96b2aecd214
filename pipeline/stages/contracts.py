"""The types of what stages hand to each other as JSON: file entries, manifests, markers, jobs.

The keys are those on disk, so a value needs no translation. manifest_check.py checks the values of
a file when the file is read.
"""

from typing import Any, TypedDict

from typing_extensions import TypeIs


class _File(TypedDict):
    name: str  # path below the stage's directory, with slashes
    bytes: int
    sha256: str  # 64 hex digits


class FileEntry(_File, total=False):
    """One file of a stage."""

    crc32c: str  # as GCS writes it: base64 of 4 bytes; absent in entries of earlier versions
    num_examples: int  # of a shard, and of a file of rows
    split: str  # of a shard
    instead_of: list[str]  # of a shard that was written again: its names before
    of_split: str  # of a file that describes one split
    num_quarantined: int  # of a list of quarantined records


class Counts(TypedDict):
    """The account of a stage: read = written + quarantined."""

    read: int
    written: int
    quarantined: int


class Manifest(TypedDict):
    """The keys of every stage's manifest."""

    stage: str  # "preprocess", "train" or "export"
    format_version: int
    made_from: dict[str, Any]  # inputs and settings; the stage's id is a hash over them
    files: list[FileEntry]


class _DatasetManifest(Manifest):
    dataset_id: str  # 16 hex digits
    name: str
    image_shape: list[int]  # [H, W, C]
    class_names: list[str]
    num_shards: dict[str, int]  # split -> number of shards
    splits: dict[str, int]  # split -> number of records
    records: Counts
    warnings: list[str]


class DatasetManifest(_DatasetManifest, total=False):
    """The manifest of preprocess."""

    drift: dict[str, Any]  # of the records that the last create or append has written
    rejected: list[str]  # bounds of --require that do not hold


class _ModelManifest(Manifest):
    model_id: str  # 16 hex digits
    image_shape: list[int]
    config: dict[str, Any]
    step: int  # the published weights are of this step
    trained_steps: int
    metrics: dict[str, dict[str, float | str]]  # split -> metric -> value


class ModelManifest(_ModelManifest, total=False):
    """The manifest of train."""

    class_names: list[str]  # Of the data set; absent in models of earlier versions.


class _ShardAccount(Counts):
    made_of: str  # identifies the records of the shard
    files: list[str]


class ShardAccount(_ShardAccount, total=False):
    """What an export's manifest says of one shard."""

    outside_classes: int  # rows whose label has no class; 0 in an export of an earlier version


class _ExportManifest(Manifest):
    export_id: str  # 16 hex digits
    dataset_id: str | None  # None for an export straight from an image set
    model_id: str
    records: Counts
    metrics: dict[str, float]
    shards: dict[str, ShardAccount]  # task -> account


class ExportManifest(_ExportManifest, total=False):
    """The manifest of export."""

    class_names: list[str]  # class_names[i] is the name of label i
    drift: dict[str, Any]
    rejected: list[str]  # bounds of --require that do not hold


class _Job(TypedDict):
    stage: str
    made_from: dict[str, Any]
    names: list[str]  # all files that the job makes


class Job(_Job, total=False):
    """job.json of an unfinished directory."""

    reuses: str  # the export whose rows the job takes over
    drops: list[str]  # files of a data set that go when the job is finished


class FailedMarker(TypedDict):
    """The marker of a task that failed."""

    failed: str  # the error's text


class _Marker(TypedDict):
    entries: list[FileEntry]
    secs: dict[str, float]  # kind of work -> seconds


class Marker(_Marker, total=False):
    """The marker of a finished task; a stage adds keys of its own."""

    made_of: str | None
    reused: bool  # whether an earlier try did the task


def is_failed(marker: Marker | FailedMarker) -> TypeIs[FailedMarker]:
    """Whether a marker is that of a failed task."""
    return "failed" in marker


def is_shard(entry: FileEntry) -> bool:
    """Whether a data set's file holds records."""
    return "split" in entry
