"""Removes records from a finished data set, and bars their ids from later appends."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.cli.errors import StageError
from pipeline.cli.progress import Progress
from pipeline.datasets import index, placement
from pipeline.datasets.building import create, finish, restore, rewriting, taken
from pipeline.runners import run as runner
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.stages.contracts import FileEntry
from pipeline.stages.output_directory import OutputDirectory

# Start of the keys of `made_from` for removals.
_REMOVED = "removed-"
# In the name of a quarantine list that an earlier removal has written.
_REMOVED_LIST = re.compile(r"\.removed-\d+$")


def remove_records(
    directory: str, ids: Sequence[str], *, overwrite: bool, options: PipelineOptions
) -> dict[str, Any]:
    """Removes records, and bars their ids.

    Args:
      directory: the data set's; local path or fsspec URL.
      ids: the records' ids. Ids that the set does not hold are barred, too.
      overwrite: whether to undo an unfinished append or removal of other inputs.
      options: Beam's.

    Returns:
      The manifest with three more keys: "reused", whether there was nothing to do; "num_removed";
      and "unknown", the ids of neither a record nor a quarantined or removed one.

    Raises:
      StageError: the data set cannot be used.
    """
    base = manifest_lib.read_manifest(directory, "preprocess", "--data_dir")
    output = create.output_directory(directory, base["made_from"])
    with output.locked():
        if manifest_lib.read_manifest(directory, "preprocess", "--data_dir") != base:
            raise StageError(
                f"--data_dir={directory}: another process has just changed the data set; run the "
                "same command again"
            )
        output.complete_finished(base)
        if overwrite:
            output.undo_append(base)
        ids = sorted(set(ids))
        hashes = placement.id_hashes(base["made_from"]["seed"], [i.encode() for i in ids])
        barred = index.read_barred(directory, base["files"])
        base, places = restore.with_indexes(
            output, base, options, lambda base: index.Indexes(directory, base["files"]).find(hashes)
        )
        indexes = index.Indexes(directory, base["files"])
        is_here = places.shards >= 0
        in_quarantine = {
            fault["id"] for fault in quarantine.read_all(directory, base["files"])
        } & set(ids)
        is_barred = index.are_among(hashes, barred)
        if not is_here.any() and not in_quarantine and is_barred.all():
            taken.forget_files(directory, hashes)
            return {**base, "reused": True, "num_removed": 0, "unknown": []}
        unknown = [
            record_id
            for record_id, is_known in zip(ids, is_here | is_barred, strict=True)
            if not is_known and record_id not in in_quarantine
        ]
        places = index.Places(places.shards[is_here], places.positions[is_here])
        manifest = _remove(output, base, indexes, places, hashes, set(ids), options)
        return {**manifest, "unknown": unknown}


def _remove(
    output: OutputDirectory,
    base: Mapping[str, Any],
    indexes: index.Indexes,
    places: index.Places,
    hashes: np.ndarray,
    ids: set[str],
    options: PipelineOptions,
) -> dict[str, Any]:
    directory, shape = output.directory, tuple(base["image_shape"])
    number = 1 + sum(key.startswith(_REMOVED) for key in base["made_from"])
    removal = {"ids": manifest_lib.content_id(hashes.tolist())}
    made_from = {**base["made_from"], f"{_REMOVED}{number:04d}": removal}
    rewrites = rewriting.plan(base, indexes, places, rewriting.next_numbers(indexes.shards))
    output = create.output_directory(directory, made_from)
    lists = _lists_to_write(directory, base["files"], ids, number)
    barred = [e["name"] for e in base["files"] if index.is_barred(e["name"])]
    dropped = [
        *rewriting.dropped_names(rewrite.shard["name"] for rewrite in rewrites),
        *lists,
        *barred,
    ]
    output.begin_append(
        [
            *rewriting.file_names(rewrites),
            *(new_list.name for new_list in lists.values()),
            *finish.descriptions(base["splits"]),
            index.barred_name(number),
        ],
        dropped,
    )
    removed = rewriting.removed(directory, indexes, rewrites, shape)

    def build(pipeline: beam.Pipeline) -> None:
        seed = base["made_from"]["seed"]
        rewriting.rewrite_shards(pipeline, rewrites, shape, seed, output.tasks)

    if rewrites:
        progress = Progress("remove", total=len(rewrites), unit="shards")
        runner.run(build, options, progress=progress, count_done=output.tasks.num_done)
    names = [rewrite.new_name for rewrite in rewrites]
    markers = dict(zip(names, output.tasks.markers(names), strict=True))
    all_barred = np.concatenate([index.read_barred(directory, base["files"]), hashes])
    buffer = io.BytesIO()
    np.save(buffer, np.unique(all_barred, axis=0))
    files = [manifest_lib.write_file(directory, index.barred_name(number), buffer.getvalue())]
    num_lost = 0
    for new_list in lists.values():
        num_lost += new_list.num_lost
        if new_list.data:
            entry = manifest_lib.write_file(directory, new_list.name, new_list.data)
            files.append({**entry, **new_list.keys})
    records = dict(base["records"])
    records["read"] -= removed.num_records + num_lost
    records["written"] -= removed.num_records
    records["quarantined"] -= num_lost
    taken.forget_files(directory, hashes)
    manifest = finish.publish(
        output,
        name=base["name"],
        image_shape=shape,
        class_names=list(base["class_names"]),
        num_in_names=base["num_shards"],
        markers=markers,
        base=base,
        removed=removed,
        records=records,
        further={"rejected": base["rejected"]} if "rejected" in base else {},
        files=files,
        dropped=dropped,
    )
    return {**manifest, "reused": False, "num_removed": removed.num_records + num_lost}


class _List(NamedTuple):
    """A quarantine list without some records."""

    name: str
    data: bytes  # Empty if no record is left.
    keys: dict[str, Any]  # Of the file's entry.
    num_lost: int


def _lists_to_write(
    directory: str, files: Sequence[FileEntry], ids: set[str], number: int
) -> dict[str, _List]:
    """Old name -> new list, of the quarantine lists that name a removed record."""
    lists = {}
    for entry in files:
        if "num_quarantined" not in entry:
            continue
        lines = manifest_lib.read_file(directory, entry).splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["id"] not in ids]
        if num_lost := len(lines) - len(kept):
            keys = {"num_quarantined": len(kept), "of_split": entry["of_split"]}
            stem = _REMOVED_LIST.sub("", entry["name"].removesuffix(".jsonl"))
            name = f"{stem}.removed-{number:04d}.jsonl"
            lists[entry["name"]] = _List(name, b"".join(kept), keys, num_lost)
    return lists
