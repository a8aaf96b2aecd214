"""The records that a file names, for every kind of file that names records.

A reader yields (id, sha256 of the record); either is "" where the file does not hold it. A reader
of hashes, of paths or of escaped texts yields the wanted ids only. A reader raises one of
UNREADABLE when it meets damage, after the records that it could read.
"""

import hashlib
import html
import io
import itertools
import json
import os
import re
import struct
import tarfile
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.datasets import index
from pipeline.embeddings import summary
from pipeline.embeddings.absence.wanted import SHA, Wanted
from pipeline.formats import tf_example, tfrecord
from pipeline.sources import memory
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import tasks
from pipeline.storage import files

UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, RecursionError),
    *(NotImplementedError, struct.error, tarfile.TarError, StageError),
)
_GZIP = b"\x1f\x8b\x08"
# Warnings of a data set name pairs of records, see datasets/profile/warnings.py.
_PAIRS = re.compile(r": (.*?)(?:, …)?; all of them are in duplicates\.jsonl", re.DOTALL)
# The data of the scatter, see reports/scatter.py.
_SCATTER = re.compile(r'<script [^>]*id="scatter-data">(.*?)</script>', re.DOTALL)
# Titles of pictures, see reports/sections.py and datasets/profile/page.py.
_TITLE = re.compile(r' title="([^"]*)"')
_AFTER_ID = re.compile(r" above its reconstruction$|: |, |$")
_ID_TABLE = re.compile(r"<tr><th>id</th>(.*?)</table>", re.DOTALL)
_ROW = re.compile(r"<tr><td>(.*?)</td>(?:<td>(.*?)</td>)?", re.DOTALL)


class Hashing(NamedTuple):
    """What a data set's hashes and paths of its sources depend on."""

    seeds: Collection[int]
    id_prefixes: Collection[str]


class File(NamedTuple):
    """A file to look into."""

    path: str  # Local path or URL.
    name: str  # Without directories; of a half-written file, the name that it was to get.
    folder: str  # The name of its directory.
    hashing: Callable[[], Hashing]
    wanted: Wanted


Records = Iterator[tuple[str, str]]
Reader = Callable[[File], Records]


def reader_of(file: File) -> Reader | None:
    """The reader of a file; None for a kind that names no records."""
    name, folder = file.name, file.folder
    if ".tfrecord" in name or SHA.fullmatch(name):  # The names in a cache are hashes.
        return _read_tfrecord
    if name in (manifest_lib.MANIFEST, manifest_lib.PREVIOUS):
        return _read_manifest
    is_marker = folder == tasks.DIRECTORY and name.endswith(".json") and name != tasks.JOB
    if is_marker or name == summary.FILE:
        return _read_json
    if index.is_barred(f"{folder}/{name}") or name == "metrics.jsonl":
        return None
    return next((reader for suffix, reader in _BY_SUFFIX.items() if name.endswith(suffix)), None)


def _read_tfrecord(file: File) -> Records:
    """A shard, or rows."""
    from google.protobuf.message import DecodeError

    data, faults = files.read_bytes(file.path), []
    is_packed = data.startswith(_GZIP) and isinstance(next(tfrecord.scan(data, "")), tfrecord.Fault)
    for item in tfrecord.scan(data, ".gz" if is_packed else ""):
        if isinstance(item, tfrecord.Fault):
            faults.append(item)
            continue
        offset, serialized = item
        sha = hashlib.sha256(serialized).hexdigest()
        try:
            record_id = tf_example.parse(serialized).id
        except ValueError:
            try:
                features = tf_example.parse_features(serialized)
                record_id, sha = features["id"], features["record_sha"].decode()
            except (DecodeError, ValueError, KeyError, AttributeError) as error:
                yield "", sha
                faults.append(tfrecord.Fault(offset, f"no record ({error})"))
                continue
        yield record_id.decode(errors="backslashreplace"), sha
    if faults:
        raise ValueError(f"at byte {faults[0].offset} {faults[0].reason}")


def _read_npy(file: File) -> Records:
    """An index, hashes of ids, or a column of rows."""
    array = np.load(io.BytesIO(files.read_bytes(file.path)), allow_pickle=False)
    if "id" in (array.dtype.names or ()):
        array = array["id"]
    if array.dtype == np.uint64 and array.ndim == 2 and array.shape[1] == 2:
        seeds = file.hashing().seeds
        if not seeds and file.wanted.ids:
            raise ValueError("no manifest tells the seed of these hashes")
        for seed in seeds:
            yield from ((record_id, "") for record_id in file.wanted.by_hash(seed, array))
    elif file.name.endswith(".id.npy"):
        yield from ((record_id, "") for record_id in array.tolist())
    elif file.name.endswith(".record_sha.npy"):
        yield from (("", sha.decode()) for sha in array.tolist())


def _read_memory(file: File) -> Records:
    """Paths of a source's files. The id of an image in a folder is a prefix and the path."""
    remembered = memory.parse(files.read_bytes(file.path))
    if remembered is None:
        raise ValueError("its checksum is wrong")
    paths = {
        os.fsdecode(path).encode(errors="backslashreplace").decode()
        for path in remembered.table["path"].to_pylist()
    }
    for prefix in {"", *file.hashing().id_prefixes}:
        for record_id in file.wanted.ids:
            if record_id.startswith(prefix) and record_id[len(prefix) :] in paths:
                yield record_id, ""


def _read_ids(file: File) -> Records:
    """An id in each line."""
    for line in files.read_bytes(file.path).decode().split("\n"):
        yield line, ""


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


def _read_json(file: File) -> Records:
    for text in _texts_in(json.loads(files.read_bytes(file.path))):
        yield from _of_text(text)


def _read_json_lines(file: File) -> Records:
    for line in files.read_bytes(file.path).split(b"\n"):
        if line:
            for text in _texts_in(json.loads(line)):
                yield text, ""


def _of_text(text: str) -> Records:
    yield text, ""
    for pairs in _PAIRS.findall(text):
        yield from ((part, "") for part in _parts(pairs))


def _read_manifest(file: File) -> Records:
    """The warnings; other texts are names of classes, splits and files."""
    for warning in json.loads(files.read_bytes(file.path)).get("warnings", ()):
        yield from _of_text(warning)


def _parts(text: str) -> Iterator[str]:
    """Every text between two separators of a list of ids; ids may hold separators, too."""
    pieces = re.split("(, | = )", text)
    for first, last in itertools.combinations(range(len(pieces) + 1), 2):
        yield "".join(pieces[first:last])


def _read_parquet(file: File) -> Records:
    """Rows, or changes."""
    import pyarrow.parquet as pq

    with files.open_read(file.path) as opened:
        parquet = pq.ParquetFile(opened, page_checksum_verification=True)
        names = [name for name in ("id", "record_sha") if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(columns=names):
            columns = batch.to_pydict()
            unknown = [""] * batch.num_rows
            yield from zip(
                columns.get("id", unknown), columns.get("record_sha", unknown), strict=True
            )


def _read_tar(file: File) -> Records:
    """A WebDataset."""
    with files.open_read(file.path) as opened:
        with tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                if key in file.wanted.by_key:
                    yield file.wanted.by_key[key], ""
                if suffix == "json":
                    about = json.load(archive.extractfile(member))
                    yield about["id"], about["record_sha"]
            end = archive.offset
        opened.seek(end)
        while block := opened.read(1 << 20):
            if block.strip(b"\0"):
                raise ValueError(f"what follows byte {end} is no archive")


def _read_tsv(file: File) -> Records:
    """Metadata of TensorBoard's projector; tensors.tsv has no column of ids."""
    head, *lines = files.read_bytes(file.path).decode().split("\n")
    names = head.split("\t")
    if "id" in names:
        for line in filter(None, lines):
            field = line.split("\t")[names.index("id")]
            if field in file.wanted.by_field:
                yield file.wanted.by_field[field], ""


def titles(page: str) -> list[str]:
    """The titles of the pictures on a page."""
    return list(map(html.unescape, _TITLE.findall(page)))


def of_title(title: str) -> Iterator[str]:
    """Every text in the title of a picture that may be an id."""
    yield from (title[: match.start()] for match in _AFTER_ID.finditer(title))
    yield from (title[match.end() :] for match in re.finditer(", near ", title))


def _read_html(file: File) -> Records:
    """report.html or stats.html."""
    page = files.read_bytes(file.path).decode()
    for title in titles(page):
        yield from ((text, "") for text in of_title(title))
    for data in _SCATTER.findall(page):
        yield from ((record_id, "") for record_id in json.loads(data)["ids"])
    for table in _ID_TABLE.findall(page):
        for cell, nearest in _ROW.findall(table):
            yield html.unescape(cell), ""
            if table.startswith("<th>nearest</th>"):
                yield from ((text, "") for text in _parts(html.unescape(nearest)))
    for warning in re.findall("<li>(.*?)</li>", page, re.DOTALL):
        yield from _of_text(html.unescape(warning))


_BY_SUFFIX: dict[str, Reader] = {
    ".jsonl": _read_json_lines,  # Quarantine lists and duplicates.
    ".npy": _read_npy,
    ".memory": _read_memory,
    ".gone.txt": _read_ids,
    ".parquet": _read_parquet,
    ".tar": _read_tar,
    ".tsv": _read_tsv,
    ".html": _read_html,
}
