"""Damaged files of an export: named, made again, and never taken over."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from pipeline.cli.errors import StageError
from pipeline.embeddings import files as row_files
from pipeline.formats import tfrecord
from pipeline.reports import create as create_report
from pipeline.reports import verification
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import pointer
from tests.conftest import REPOSITORY, make_embeddings, make_shards, outputs_of
from tests.datasets.test_verify import reseal
from tests.forked import run_command

_PAGE = 4096  # Bytes.
ROWS = "embeddings/blobs-test-00000-of-00001.parquet"


def _with_other_page(data: bytes) -> bytes:
    first = len(data) // 2 // _PAGE * _PAGE
    page = bytes(byte ^ 0xFF for byte in data[first : first + _PAGE])
    return data[:first] + page + data[first + _PAGE :]


# What a disk may make of a file's bytes; None of the file's name, too.
DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "page": _with_other_page,
    "gone": lambda data: None,
}


def damage(path: pathlib.Path, kind: str) -> None:
    """Damages a file; other hard links to its bytes stay whole."""
    data = DAMAGES[kind](path.read_bytes())
    path.unlink()
    if data is not None:
        path.write_bytes(data)


def faults(directory) -> list[str]:
    return [str(fault) for fault in verification.verify(str(directory))[1]]


@pytest.fixture(scope="module")
def one_shard(idx_dir, tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("one") / "data"
    make_shards(f"idx:{idx_dir}", directory, num_shards=1)
    return directory


@pytest.fixture(scope="module")
def export(one_shard, trained):
    """A function that exports as the command does, with its report."""

    def make(directory, *, report=True, **settings) -> dict:
        manifest = make_embeddings(one_shard, trained / "export", directory, **settings)
        if report and not create_report.is_current(str(directory), manifest["export_id"]):
            create_report.make_report(str(directory), input_=None, model_dir=None, run_dir=None)
        return manifest

    return make


@pytest.fixture(scope="module")
def whole(export, tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("whole") / "export"
    export(directory)
    return directory


@pytest.fixture
def out(whole, tmp_path) -> pathlib.Path:
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def checked_files(directory: pathlib.Path) -> list[str]:
    """Names of the files whose bytes are known, without the manifest."""
    return [*outputs_of(directory).keys() - {"manifest.json"}, "changes.parquet"]


def test_a_whole_export_is_whole_wherever_it_lies(out):
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.verify", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    export_id = manifest_lib.manifest_of(str(out))["export_id"]
    assert done.stdout == f"verify: whole: 50 rows, 3 files, export_id {export_id}, {out}\n"
    assert "pyarrow" in done.stderr
    assert "tensorflow" not in done.stderr and "apache_beam" not in done.stderr


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damaged_file_is_named(out, whole, kind):
    names = checked_files(out)
    assert {"report.html", "report.json", "statistics.json", ROWS} < set(names) and len(names) > 8
    for name in names:
        damage(out / name, kind)
        found = faults(out)
        is_missed = (name, kind) == ("changes.parquet", "gone")  # Nothing needs that file.
        assert is_missed or any(line.startswith(f"{out / name}: ") for line in found), name
        shutil.copyfile(whole / name, out / name)
    assert faults(out) == []
    damage(out / "manifest.json", kind)
    done = run_command("pipeline.verify", out, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    expected = "has no manifest.json" if kind == "gone" else "/manifest.json: not as this program"
    assert str(out) in done.stderr and expected in done.stderr


def assert_made_again(export, whole, out, name, kind) -> None:
    """A next night takes no damage over, and the command restores the file in place."""
    undamaged, night = out.parent / "undamaged", out.parent / f"night-{name.replace('/', '-')}"
    if not undamaged.exists():
        export(undamaged, report=False, reuse_from=whole)
    damage(out / name, kind)
    manifest = export(night, report=False, reuse_from=out)
    assert outputs_of(night) == outputs_of(undamaged)
    num_computed = sum(counts["computed"] for counts in manifest["done"].values())
    # The pictures of a damaged sheet are those of all records here.
    assert num_computed == (50 if name.endswith((".parquet", ".png")) and "/blobs" in name else 0)
    assert export(out)["reused"] == (num_computed == 0 and name != "statistics.json")
    assert outputs_of(out) == outputs_of(whole) and faults(out) == []
    assert faults(night) == []


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("empty", "statistics.json"),
        ("half", "images/blobs-test-00000-of-00001.png"),
        ("zeros", ROWS),
        ("page", ROWS),
        ("gone", "report.html"),
    ],
)
def test_a_damaged_file_is_made_again(export, whole, out, name, kind):
    assert_made_again(export, whole, out, name, kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damaged_file_is_made_again(export, whole, out, kind):
    for name in set(checked_files(out)) - {"changes.parquet"}:
        assert_made_again(export, whole, out, name, kind)


def test_a_directory_without_its_manifest_is_made_again(export, whole, out):
    damage(out / "manifest.json", "zeros")
    with pytest.raises(StageError, match="damaged, changed by hand.*again, with --overwrite"):
        export(out)
    shutil.rmtree(out)
    export(out, report=False)
    assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_what_is_damaged_is_not_called_finished_and_no_pointer_names_it(export, tmp_path):
    first, latest = tmp_path / "01", tmp_path / "latest"
    export(first, report=False, latest=latest)
    damage(first / ROWS, "page")
    with pytest.raises(StageError, match="a file is missing or damaged, so --latest=.* stays"):
        pointer.move(str(latest), str(first), seen=pointer.read(str(latest)))
    manifest = export(tmp_path / "02", report=False, latest=latest)
    assert manifest["directory"] == str(tmp_path / "02") and faults(tmp_path / "02") == []
    assert export(tmp_path / "03", report=False, latest=latest)["reused"]


def test_the_export_that_latest_names_is_made_whole_in_place(export, tmp_path):
    first, latest = tmp_path / "01", tmp_path / "latest"
    export(first, report=False, latest=latest)
    before, changes = outputs_of(first), (first / "changes.parquet").read_bytes()
    for name in (ROWS, "statistics.json", "changes.parquet"):
        damage(first / name, "page")
        damage(first / "images/blobs-test-00000-of-00001.png", "half")
        export(first, report=False, latest=latest)
        assert outputs_of(first) == before and faults(first) == []
        # All rows are new, and not unchanged since the same export was damaged.
        assert (first / "changes.parquet").read_bytes() == changes
        assert pointer.resolve(str(latest)) == str(first)
    # The next night's file says that nothing is new, and keeps saying so.
    second = tmp_path / "02"
    export(second, report=False, reuse_from=first)
    changes = (second / "changes.parquet").read_bytes()
    damage(second / ROWS, "page")
    export(second, report=False, reuse_from=second)
    assert (second / "changes.parquet").read_bytes() == changes and faults(second) == []


def test_a_damaged_sheet_costs_the_rows_on_it_only(export, tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "SHEET_PAIRS", 4)
    first, night = tmp_path / "first", tmp_path / "night"
    export(first, report=False)
    damage(first / "images/blobs-test-00000-of-00001.png", "page")
    manifest = export(night, report=False, reuse_from=first)
    assert [counts["computed"] for counts in manifest["done"].values()] == [4]
    assert faults(night) == []


def test_a_directory_in_place_of_a_file_costs_the_file_only(export, whole, out, tmp_path):
    sheet = out / "images/blobs-test-00000-of-00001.png"
    sheet.unlink()
    sheet.mkdir()
    assert faults(out) == [f"{sheet}: missing"]
    export(tmp_path / "night", report=False, reuse_from=out)
    assert faults(tmp_path / "night") == []


@pytest.mark.parametrize("embedding_format", ["tfrecord", "npy"])
def test_other_formats(export, tmp_path, embedding_format):
    out = tmp_path / "out"
    export(out, report=False, embedding_format=embedding_format, images="all")
    assert faults(out) == []
    for path in sorted(out.rglob("*-test-*")):
        data = path.read_bytes()
        damage(path, "page")
        assert f"{path}: its sha256 differs from the manifest" in faults(out)
        path.write_bytes(data)


def test_rows_in_tfrecords_are_checked_to_the_byte(export, tmp_path):
    out = tmp_path / "out"
    export(out, report=False, embedding_format="tfrecord")
    path = out / ROWS.replace(".parquet", ".tfrecord")
    data = path.read_bytes()
    offsets = [offset for offset, _ in tfrecord.scan(data, path.name)]
    flipped = bytearray(data)
    flipped[offsets[7] + 30] ^= 1
    path.write_bytes(bytes(flipped))
    differs, fault, count = faults(out)
    assert differs == f"{path}: its sha256 differs from the manifest"
    assert fault.startswith(f"{path} byte {offsets[7]}: the checksum of a record of ")
    assert count == f"{path}: 49 intact rows, expected 50"
    # A program wrote other records, and a manifest that fits them.
    records = list(tfrecord.records(data, path.name))
    with manifest_lib.writing(str(out), f"embeddings/{path.name}") as file:
        tfrecord.write(file, path.name, [b"no example", *records[1:]])
    reseal(out, lambda manifest: manifest["files"][0].update(file.entry()))
    fault, count = faults(out)
    assert fault.startswith(f"{path} byte 0: 10 bytes that are no tf.Example")
    assert count == f"{path}: 49 intact rows, expected 50"


def test_counts_that_do_not_fit_are_named(out):
    task = "blobs-test.tfrecord-00000-of-00001"

    def change(manifest) -> None:
        manifest["files"][0]["num_examples"] = 51
        manifest["shards"][task]["read"] = 52
        manifest["shards"][task]["made_of"] = "other"
        manifest["records"]["written"] = 49

    reseal(out, change)
    manifest = f"{out}/manifest.json: "
    assert faults(out)[:-1] == [
        f"{out}/{ROWS}: 50 intact rows, expected 51",
        f"{manifest}{task}: 52 records read, expected 50 written + 0 quarantined",
        f"{manifest}{task}: 50 records written, {ROWS} has 51",
        f"{manifest}all shards: 50 records read, expected 49 written + 0 quarantined",
        f"{manifest}50 records read, the shards have 52",
        f"{manifest}49 records written, the shards have 50",
    ]
    assert f"{manifest}export_id is " in faults(out)[-1]


def test_what_the_manifest_does_not_list(out, whole):
    stray = out / "embeddings" / "old.parquet"
    shutil.copyfile(out / ROWS, stray)
    (out / "notes.txt").write_text("of no harm")
    expected = "is not in the manifest, but programs that read the folder read it: remove it"
    assert faults(out) == [f"{stray}: {expected}"]
    stray.unlink()
    (out / "timings.json").write_bytes(bytes(100))
    [fault] = faults(out)
    assert fault.startswith(f"{out}/timings.json: is not as this program wrote it: delete it")
    (out / "timings.json").unlink()
    assert faults(out) == []


def test_an_unfinished_report_is_named(out):
    state = manifest_lib.read_sealed(str(out / "report.json"))
    for path in (out / "plots").iterdir():
        path.unlink()
    (out / "report.json").write_bytes(manifest_lib.sealed_json({**state, "export_id": ""}))
    [fault] = faults(out)
    assert fault.startswith(f"{out}/report.json: is of an export whose report was not finished")


def test_the_last_line_says_what_to_do_or_that_the_export_was_rejected(export, out, tmp_path):
    damage(out / ROWS, "half")
    done = run_command("pipeline.verify", out, check=False)
    assert done.returncode == 1 and f"{out / ROWS}: " in done.stdout
    assert "1 fault in 50 rows, 3 files; expected none: run the export command" in done.stderr
    with pytest.raises(StageError, match="is rejected"):
        export(tmp_path / "rejected", report=False, require="elbo>0")
    done = run_command("pipeline.verify", tmp_path / "rejected")
    assert "verify: whole: 50 rows" in done.stdout
    assert ", rejected by --require (elbo>0 (it is -" in done.stdout


def test_an_export_of_an_earlier_version_is_read_and_its_entries_get_their_checksum(
    export, whole, out, tmp_path
):
    def drop(manifest) -> None:
        for entry in manifest["files"]:
            del entry["crc32c"]

    reseal(out, drop)
    night = tmp_path / "night"
    manifest = export(night, report=False, reuse_from=out)
    assert (night / ROWS).samefile(out / ROWS)
    export(tmp_path / "fresh", report=False)
    assert outputs_of(night) == outputs_of(tmp_path / "fresh")
    changes = json.loads((night / "timings.json").read_text())["changes"]
    assert (changes["added"], changes["changed"], changes["removed"]) == (0, 0, 0)
    damage(out / ROWS, "page")
    manifest = export(tmp_path / "later", report=False, reuse_from=out)
    assert sum(counts["computed"] for counts in manifest["done"].values()) == 50
    assert outputs_of(tmp_path / "later") == outputs_of(tmp_path / "fresh")
