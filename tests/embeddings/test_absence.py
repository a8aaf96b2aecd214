"""Each kind of file that names or shows records, written as the program writes it."""

import functools
import hashlib
import io
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import index, placement, reader
from pipeline.datasets.profile import duplicates, statistics, warnings
from pipeline.datasets.profile import page as stats_page
from pipeline.embeddings import absence, summary
from pipeline.embeddings import files as row_files
from pipeline.embeddings import rows as rows_lib
from pipeline.formats import projector, tf_example, tfrecord, webdataset
from pipeline.reports import page as report_page
from pipeline.reports import scatter
from pipeline.sources import memory
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.storage import files
from tests.forked import run_command
from tests.storage.object_stores import BUCKET

SEED = 0  # Of the fixture's data set.
IDS = [
    *("1", "train/class 0/a b.png", 'it\'s "5" & <b>6</b>.png', "日本/é.png", "tab\there"),
    *("a, b = c: d, near e", "x" * 300, "-", "a above its reconstruction"),
]
# Ids that only a part of, or that are a part of.
OTHERS = sorted({new for i in IDS for new in (f"{i}1", f"1{i}", f"x/{i}", i[:-1] or "0")} - {*IDS})
IMAGE = np.arange(96, dtype=np.uint8).reshape(12, 8, 1)
CACHED = hashlib.sha256(b"a shard").hexdigest()
TASK = "blobs-test.tfrecord-00000-of-00004"
ROWS, SHEET = "blobs-test-00000-of-00004", "images/blobs-test-00000-of-00004.png"


def record(record_id: str) -> bytes:
    return tf_example.encode(record_id.encode(), IMAGE.tobytes(), 3)


def sha(record_id: str) -> str:
    return hashlib.sha256(record(record_id)).hexdigest()


def rows_of(ids) -> rows_lib.Rows:
    values = np.arange(len(ids), dtype=np.float32)[::-1]  # The first ids have the largest losses.
    columns = {"mean": np.stack([values, -values], axis=1), "reconstruction_loss": values}
    return rows_lib.Rows(list(ids), np.full(len(ids), 3), [sha(i) for i in ids], columns)


def shard(ids, name: str) -> bytes:
    buffer = io.BytesIO()
    tfrecord.write(buffer, name, map(record, ids))
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def hashes(ids) -> np.ndarray:
    return placement.id_hashes(SEED, [i.encode() for i in ids])


def index_of(ids) -> bytes:
    builder = index.Builder()
    images = [IMAGE.tobytes()] * len(ids)
    builder.add(hashes(ids), images, np.zeros(len(ids), np.int64), [1] * len(ids))
    return builder.index().to_bytes()


def memory_of(ids) -> bytes:
    paths = pa.array(map(os.fsencode, ids), pa.binary())
    return memory.to_bytes(pa.table({"path": paths}), {})


def write_quarantine(directory, ids) -> None:
    faults = [{"id": i, "where": f"/data/{i}", "reason": "is damaged"} for i in ids]
    quarantine.write(str(directory), "task", faults, num_quarantined=len(ids))


def duplicates_of(ids) -> bytes:
    return duplicates._Group("0" * 32, {"train": [*ids]}, [1]).line()


def warnings_of(ids) -> list[str]:
    """Those of a set in which each id is in train and another one in test."""
    blank = statistics.Statistics((12, 8, 1))
    found = []
    for record_id in ids:
        counts = warnings.Duplicates()
        counts.add({"ids": {"train": [record_id], "test": [f"y{record_id}"]}})
        found += warnings.find({"train": blank, "test": blank}, counts, ["1", "2"])
    return [text for text in found if "stands both" in text]


def write_manifest(directory, ids) -> None:
    path = directory / "manifest.json"
    manifest = {**manifest_lib.read_sealed(str(path)), "warnings": warnings_of(ids)}
    path.write_bytes(manifest_lib.sealed_json(manifest))


def description_of(ids) -> bytes:
    sums = {TASK: rows_lib.sums(rows_of(ids))}
    return manifest_lib.readable_json({"summary": summary.summary(sums), "shards": sums})


def marker_of(ids) -> bytes:
    return manifest_lib.sealed_json({"entries": [], "sums": rows_lib.sums(rows_of(ids))})


def write_rows(directory, ids, embedding_format: str) -> None:
    row_files.write(
        str(directory),
        TASK,
        rows_of(ids),
        class_names=["0", "0", "0", "1"],  # Labels 3 are the class 1, which is no id.
        split="test",
        embedding_format=embedding_format,
        model_id="m",
    )


def changes_of(ids) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"id": [*ids], "split": ["1"] * len(ids)})
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


def archive_of(ids) -> bytes:
    buffer = io.BytesIO()
    archive = webdataset.Archive(buffer)
    for record_id in ids:
        about = {"id": record_id, "label": 1, "record_sha": sha(record_id)}
        archive.add(IMAGE, IMAGE, about)
    archive.close()
    return buffer.getvalue()


def metadata_of(ids) -> bytes:
    rows = rows_of(ids)
    contents = projector.files(
        rows.ids, rows.labels, rows.columns["mean"], class_names={3: "1"}, sprite=None
    )
    return contents["metadata.tsv"]


def page_of(*bodies: str) -> bytes:
    sections = [report_page.Section("name", "Title", body) for body in bodies]
    return report_page.page(title="1: -", lead="1 = 1", warnings=["1, -"], sections=sections)


def tiles_of(alts) -> bytes:
    return page_of(report_page.tiles([report_page.Tile((IMAGE,), "1", alt) for alt in alts]))


def stats_of(ids, *, texts=()) -> bytes:
    part = statistics.Statistics((12, 8, 1))
    part.add(np.stack([IMAGE]), np.array([1]))
    about = {**part.summary(["-", "1"]), "num_duplicates": 1, "num_quarantined": 1}
    return stats_page.render(
        name="1",
        description={"splits": {"1": about}, "quarantined": {"1": 1}, "warnings": texts},
        statistics={"1": part},
        class_names=["-", "1"],
        samples={"1": [tf_example.Record(i.encode(), IMAGE.tobytes(), 1) for i in ids]},
        comparison=None,
    )


# Path of a file -> what writes the file's bytes, for some ids.
WRITERS = {
    f"set/{TASK}": functools.partial(shard, name=""),
    f"set/{TASK}.gz": functools.partial(shard, name=".gz"),
    f"set/.writing-{TASK}-{'0' * 32}": functools.partial(shard, name=""),
    "set/.progress/blobs-test.tfrecord-left": functools.partial(shard, name=""),
    f"cache/{CACHED}": functools.partial(shard, name=".gz"),
    f"cache/{CACHED[::-1]}": functools.partial(shard, name=""),
    f"set/index/{ROWS}.npy": index_of,
    f"set/.progress/{ROWS}.npy": index_of,
    f"set/index/.writing-{ROWS}.npy-{'0' * 32}": index_of,
    f"cache/.writing-{CACHED}-{'0' * 32}": functools.partial(shard, name=""),
    "set/index/source-0.ids.npy": lambda ids: npy(hashes(ids)),
    "set/index/source-0.memory": memory_of,
    "set/index/source-0.gone.txt": lambda ids: "".join(f"{i}\n" for i in ids).encode(),
    "set/quarantine/task.jsonl": write_quarantine,
    "set/duplicates.jsonl": duplicates_of,
    "set/manifest.json": write_manifest,
    "set/statistics.json": lambda ids: json.dumps({"warnings": warnings_of(ids)}).encode(),
    "set/stats.html": stats_of,
    "set/old/stats.html": lambda ids: stats_of([], texts=warnings_of(ids)),
    "exports/dt=1/statistics.json": description_of,
    "exports/dt=1/.progress/task.json": marker_of,
    f"exports/dt=1/embeddings/{ROWS}.parquet": functools.partial(
        write_rows, embedding_format="parquet"
    ),
    f"exports/dt=2/embeddings/{ROWS}.tfrecord": functools.partial(
        write_rows, embedding_format="tfrecord"
    ),
    f"exports/dt=3/embeddings/{ROWS}.id.npy": functools.partial(write_rows, embedding_format="npy"),
    "exports/dt=1/changes.parquet": changes_of,
    "exports/dt=2/images/all.tar": archive_of,
    "exports/dt=1/projector/metadata.tsv": metadata_of,
    "run/tensorboard/projector/metadata.tsv": metadata_of,
    "exports/dt=1/report.html": lambda ids: tiles_of(f"{i} above its reconstruction" for i in ids),
    "exports/dt=2/report.html": lambda ids: tiles_of(
        f"{i}, labelled 1, reconstruction_loss 2.0 nats" for i in ids
    ),
    "exports/dt=3/report.html": lambda ids: tiles_of(f"{i}, 1" for i in ids),
    "exports/dt=4/report.html": lambda ids: tiles_of(f"y, near {i}" for i in ids),
    "exports/dt=5/report.html": lambda ids: page_of(
        report_page.table(("id", "label", "loss"), [[i, "1", 1.0] for i in ids])
    ),
    "exports/dt=6/report.html": lambda ids: page_of(
        report_page.table(("id", "nearest"), [["y", f"y1, {i}, y2"] for i in ids])
    ),
    "exports/dt=7/report.html": lambda ids: page_of(
        scatter.data([], rows_of(ids), class_name=lambda _: "1", sprite=None)
    ),
}
# What is found beside a file, since it shows the file's records or names them, too.
SHOWN = {
    f"exports/dt=1/embeddings/{ROWS}.parquet": [f"exports/dt=1/{SHEET}"],
    f"exports/dt=2/embeddings/{ROWS}.tfrecord": [f"exports/dt=2/{SHEET}"],
    f"exports/dt=3/embeddings/{ROWS}.id.npy": [
        f"exports/dt=3/embeddings/{ROWS}.record_sha.npy",
        f"exports/dt=3/{SHEET}",
    ],
    "exports/dt=1/projector/metadata.tsv": ["exports/dt=1/projector/sprite.png"],
    "run/tensorboard/projector/metadata.tsv": ["run/tensorboard/projector/sprite.png"],
    "exports/dt=1/report.html": ["exports/dt=1/plots/reconstructions.png"],
    "exports/dt=2/report.html": ["exports/dt=2/plots/largest_losses.png"],
}


def put(top, name: str, ids) -> None:
    path = top / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write = WRITERS[name]
    if name.endswith(".jsonl") and "quarantine" in name or name.endswith("manifest.json"):
        write(top / "set", ids)
    elif "/embeddings/" in name:
        write(path.parents[1], ids)
    else:
        path.write_bytes(write(ids))


@pytest.fixture(scope="module")
def others(data_dir, tmp_path_factory):
    """A tree with each kind of file, which names OTHERS."""
    top = tmp_path_factory.mktemp("absence")
    (top / "set").mkdir()
    shutil.copy(data_dir / "manifest.json", top / "set")
    for name in WRITERS:
        put(top, name, OTHERS)
    for pictures in SHOWN.values():
        for picture in pictures:
            (top / picture).parent.mkdir(parents=True, exist_ok=True)
            if picture.endswith(".png"):
                (top / picture).write_bytes(b"pixels")
    (top / "set" / index.barred_name(1)).write_bytes(npy(np.sort(hashes(IDS), axis=0)))
    # The report names no record with a large loss.
    (top / "exports" / "dt=1" / "plots" / "largest_losses.png").write_bytes(b"pixels")
    (top / "exports" / "latest").symlink_to("dt=1")
    return top


@pytest.fixture
def tree(others, tmp_path):
    shutil.copytree(others, tmp_path / "tree", symlinks=True)
    return tmp_path / "tree"


def wanted(ids=(), shas=()) -> absence.Wanted:
    return absence.Wanted(frozenset(ids), frozenset(shas))


def found(top, what: absence.Wanted) -> dict[str, int]:
    findings = list(absence.find(str(top), what))
    assert len({finding.path for finding in findings}) == len(findings), findings
    return {f.path.removeprefix(f"{top}/"): f.num_records for f in findings}


def test_nothing_is_found_of_ids_that_only_resemble_others(others):
    search = absence.Search(str(others), wanted(IDS, map(sha, IDS)))
    assert list(search.findings()) == []
    # All but barred-*.npy, and the columns of rows that name no records.
    assert search.num_files >= len(WRITERS) + len(SHOWN) + 1
    assert found(others, wanted(OTHERS)).keys() >= {*WRITERS, *sum(SHOWN.values(), [])} - {
        f"exports/dt=3/embeddings/{ROWS}.record_sha.npy"
    }


@pytest.mark.parametrize("name", WRITERS)
def test_exactly_the_file_that_names_records_is_found(tree, name):
    put(tree, name, [*IDS, *OTHERS])
    expected = {name, *SHOWN.get(name, ())}
    by_id = found(tree, wanted(IDS))
    assert by_id.keys() == {n for n in expected if "record_sha" not in n}
    assert {*by_id.values()} == {len(IDS)}
    for record_id in IDS[:3]:
        assert found(tree, wanted([record_id])) == dict.fromkeys(by_id, 1)
    if "tfrecord" in name or "cache" in name or "embeddings" in name or name.endswith(".tar"):
        by_hash = found(tree, wanted((), map(sha, IDS)))
        assert by_hash.keys() == {n for n in expected if ".id.npy" not in n}
        assert {*by_hash.values()} == {len(IDS)}


def test_a_sheet_shows_the_first_rows_of_its_shard(tmp_path):
    ids = [f"{number:03d}" for number in range(row_files.SHEET_PAIRS + 1)]
    sheet, rows = tmp_path / SHEET, f"embeddings/{ROWS}.parquet"
    write_rows(tmp_path, ids, "parquet")
    sheet.parent.mkdir()
    sheet.write_bytes(b"pixels")
    assert found(tmp_path, wanted([ids[-1]])) == {rows: 1}
    assert found(tmp_path, wanted([ids[-2]])) == {rows: 1, SHEET: 1}
    (tmp_path / rows).unlink()
    [finding] = absence.find(str(tmp_path), wanted(["none"]))
    assert str(finding) == (
        f"{sheet}: cannot be read, so it may hold them (no file names the records of this picture)"
    )


def test_damaged_files_may_hold_them(tree):
    names = {n for n in WRITERS if not n.endswith((".html", ".txt", ".tsv", "manifest.json"))}
    for name in names:
        data = (tree / name).read_bytes()
        # Arrays have no checksums.
        end = b"" if ".npy" in name else b"\xff{" + data[42:]
        (tree / name).write_bytes(data[:40] + end)
    findings = list(absence.find(str(tree), wanted(["none"])))
    assert all("cannot be read, so it may hold them (" in str(finding) for finding in findings)
    sheets = {f"exports/dt={number}/{SHEET}" for number in (1, 2, 3)}
    assert {f.path.removeprefix(f"{tree}/") for f in findings} == names | sheets


def test_a_damaged_page_of_rows_may_hold_them(tmp_path):
    path = tmp_path / "changes.parquet"
    table = pa.table({"id": ["one", "two"]})
    pq.write_table(table, path, compression="none", write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"one", b"won"))
    [finding] = absence.find(str(tmp_path), wanted(["one"]))
    assert "cannot be read, so it may hold them (" in str(finding)


def test_an_archive_that_was_not_finished(tmp_path):
    path, data = tmp_path / "images.tar", archive_of(IDS)
    # Each record has three members of two blocks, and a long name takes more.
    path.write_bytes(data[: 4 * 512])
    assert found(tmp_path, wanted(IDS[:1])) == {"images.tar": 1}
    damaged = bytearray(data)
    damaged[4 * 512 + 20] ^= 1
    path.write_bytes(damaged)
    [finding] = absence.find(str(tmp_path), wanted(IDS[-1:]))
    assert "so it may hold them (what follows byte 2048 is no archive)" in str(finding)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_shard_is_searched_past_its_damage(tmp_path, suffix):
    data = bytearray(shard(IDS, suffix))
    if suffix:
        del data[-5:]
    else:
        data[len(record(IDS[0])) // 2] ^= 1
    (tmp_path / f"{TASK}{suffix}").write_bytes(data)
    named, damaged = absence.find(str(tmp_path), wanted(IDS[-1:]))
    assert str(named).endswith(f"{TASK}{suffix}: names 1 of the records, such as {IDS[-1]!r}")
    assert "cannot be read, so it may hold them (at byte" in str(damaged)


def test_hashes_need_the_seed_of_a_manifest_or_a_job(tree):
    job = {"stage": "preprocess", "made_from": {"seed": SEED}, "names": []}
    put(tree, f"set/index/{ROWS}.npy", IDS)
    (tree / "set" / "manifest.json").unlink()
    findings = list(absence.find(str(tree), wanted(IDS)))
    assert len(findings) == 4 and all("tells the seed" in f.what for f in findings)
    (tree / "set" / ".progress" / "job.json").write_bytes(manifest_lib.sealed_json(job))
    assert found(tree, wanted(IDS)) == {f"set/index/{ROWS}.npy": len(IDS)}


def test_the_ids_of_a_folder_have_the_prefix_of_their_source(tree):
    path = tree / "set" / "manifest.json"
    manifest = manifest_lib.read_sealed(str(path))
    manifest["made_from"]["appended-0001"] = {"id_prefix": "day2-"}
    path.write_bytes(manifest_lib.sealed_json(manifest))
    (tree / "set/index/source-0.memory").write_bytes(memory_of(["cat/1.png", "cat/\udcff.png"]))
    assert found(tree, wanted(["day2-cat/1.png"])) == {"set/index/source-0.memory": 1}
    assert found(tree, wanted(["day3-cat/1.png", "2-cat/1.png"])) == {}


def test_links_are_followed_once(others, tmp_path):
    top = tmp_path / "links"
    top.mkdir()
    for name in ("a", "b"):
        (top / name).symlink_to(others / "exports" / "dt=1")
    by_path = found(top, wanted(OTHERS))
    assert by_path and all(path.startswith("a/") for path in by_path)
    assert found(others / "exports" / "latest", wanted(OTHERS)).keys() == {
        path.removeprefix("a/") for path in by_path
    }


def assert_no_file_is_missed(directory, record_id: str, serialized: bytes) -> set[str]:
    """All files of which the bytes hold the id, its hash or the record's hash are found.

    Returns:
      The files that are found.
    """
    digest = hashlib.sha256(serialized).hexdigest()
    texts = [record_id.encode(), digest.encode(), hashes([record_id]).tobytes()]
    holding = {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and any(text in path.read_bytes() for text in texts)
    }
    by_path = found(directory, wanted([record_id], [digest]))
    assert holding and by_path.keys() >= holding
    assert {*by_path.values()} == {1}
    assert found(directory, wanted([record_id[:-1], record_id[1:], "test", "train"])) == {}
    return {*by_path}


def records_of(data_dir) -> list[tuple[str, bytes]]:
    """The id and the bytes of each test record."""
    dataset = reader.Dataset(str(data_dir))
    shards = [dataset.read_shard(entry) for entry in dataset.shards("test")]
    return [record for shard in shards for record in zip(shard.ids, shard.records, strict=True)]


def test_no_file_of_a_real_set_is_missed(data_dir):
    for record_id, serialized in records_of(data_dir)[::20]:
        names = assert_no_file_is_missed(data_dir, record_id, serialized)
        assert {*(name.partition("/")[0] for name in names)} >= {"index", "stats.html"}


def test_a_model_is_noted(trained):
    search = absence.Search(str(trained), wanted(["none"]))
    assert list(search.findings()) == [] and search.models == [str(trained / "export")]


def test_a_url(object_store, others):
    url = f"gs://{BUCKET}/absence/set"
    names = ["manifest.json", TASK, f"index/{ROWS}.npy", f".progress/{ROWS}.npy"]
    for name in names:
        files.write_bytes(f"{url}/{name}", (others / "set" / name).read_bytes())
    pointer = json.dumps({"path": url, "export_id": ""}).encode()
    files.write_bytes(f"gs://{BUCKET}/absence/latest.json", pointer)
    assert found(url, wanted(IDS)) == {}
    search = absence.Search(f"gs://{BUCKET}/absence/latest", wanted(OTHERS))
    by_name = {f.path.removeprefix(f"{url}/"): f.num_records for f in search.findings()}
    assert by_name == dict.fromkeys(names, len(OTHERS))
    with pytest.raises(StageError, match="no such directory"):
        next(absence.find(f"gs://{BUCKET}/absence/no", wanted(["1"])))


def test_the_list_of_records(tmp_path):
    path, digest = tmp_path / "ids.txt", "0a" * 32
    lines = ["", "it's", "a b ", "  ", digest.upper(), "日本\r"]
    path.write_bytes(("\ufeff" + "\n".join(lines)).encode())
    expected = wanted(["it's", "a b ", digest.upper(), "日本"], [digest])
    assert absence.read(str(path)) == expected
    assert str(expected) == "3 ids and 1 hashes"
    for data, message in ((b"\n \n", "is empty"), (b"\xff\xfe", "cannot be read")):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=f"--ids={path}: {message}"):
            absence.read(str(path), "--ids")
    path.unlink()
    with pytest.raises(UsageError, match="cannot be read .*; expected a text file"):
        absence.read(str(path))


def test_the_command(data_dir, tmp_path):
    listed = tmp_path / "ids.txt"
    listed.write_text("none\n")
    done = run_command("pipeline.verify", f"--absent={listed}", data_dir, tmp_path)
    num_files = absence.Search(str(data_dir), wanted(["none"]))
    assert list(num_files.findings()) == []
    start = "verify: absent: none of 1 ids and 0 hashes in"
    assert done.stdout.splitlines() == [
        f"{start} {num_files.num_files} files of {data_dir}",
        f"{start} 0 files of {tmp_path}",
    ]
    listed.write_text("none\ntest-0000007\n")
    done = run_command("pipeline.verify", f"--absent={listed}", data_dir, tmp_path, check=False)
    assert done.returncode == 1
    *findings, last = done.stdout.splitlines()
    assert all(
        line.endswith(": names 1 of the records, such as 'test-0000007'") for line in findings
    )
    assert last.startswith("verify: absent: none of 2 ids") and last.endswith(str(tmp_path))
    assert f"{len(findings)} findings in" in done.stderr and "pipeline.remove" in done.stderr
    assert done.stderr.count("\n") == 1
    assert run_command("pipeline.verify", f"--absent={listed}", check=False).returncode == 2
