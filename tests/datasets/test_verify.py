import shutil

import pytest

from pipeline.formats import tf_example, tfrecord
from pipeline.stages import manifest as manifest_lib
from tests.conftest import make_shards
from tests.datasets.test_reader import damage_one_record
from tests.forked import run_command

SHARD = "blobs-train.tfrecord-00001-of-00004"


@pytest.fixture
def out(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "out")
    return tmp_path / "out"


def faults(directory) -> list[str]:
    from pipeline.datasets import verification

    return [str(fault) for fault in verification.verify(str(directory))[1]]


def reseal(directory, change) -> None:
    """Changes a manifest as a program would that writes wrong ones."""
    path = directory / manifest_lib.MANIFEST
    manifest = manifest_lib.read_sealed(str(path))
    change(manifest)
    path.write_bytes(manifest_lib.sealed_json(manifest))


def rewrite(directory, name, change) -> None:
    """Writes a shard with other records, and a manifest that fits it."""
    records = change(list(tfrecord.records((directory / name).read_bytes(), name)))
    with manifest_lib.writing(str(directory), name) as file:
        num_examples = tfrecord.write(file, name, records)
    entry = {**file.entry(), "num_examples": num_examples}

    def replace(manifest):
        for listed in manifest["files"]:
            if listed["name"] == name:
                listed.update(entry)

    reseal(directory, replace)


def test_a_whole_set_is_whole(data_dir):
    done = run_command("pipeline.verify", data_dir)
    assert done.stdout.startswith("verify: whole: 350 records, ")
    assert done.stderr == ""


def test_every_fault_is_named_with_file_and_offset(out):
    offset = damage_one_record(out, SHARD)
    (out / "blobs-test.tfrecord-00000-of-00004").unlink()
    (out / "blobs-train.tfrecord-00009-of-00004").write_bytes(b"")
    done = run_command("pipeline.verify", out, check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any(line.startswith(f"{out}/{SHARD} byte {offset}: the checksum") for line in lines)
    assert f"{out}/{SHARD}: its sha256 differs from the manifest" in lines
    assert f"{out}/blobs-test.tfrecord-00000-of-00004: missing" in lines
    assert any("00009-of-00004: is not in the manifest" in line for line in lines)
    assert f"{len(lines)} faults in 350 records" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["stats.html", "croissant.json", "label.labels.txt"])
def test_files_beside_the_shards_are_checked_too(out, name):
    data = bytearray((out / name).read_bytes())
    data[9] ^= 1
    (out / name).write_bytes(bytes(data))
    assert faults(out) == [f"{out}/{name}: its sha256 differs from the manifest"]


def test_records_that_do_not_belong_though_every_checksum_fits(out):
    stray = tf_example.encode(b"stray", bytes(96), 3)
    rewrite(out, SHARD, lambda records: [*records, stray])
    assert any("split" in f or "records were read" in f or "are intact" in f for f in faults(out))

    rewrite(out, SHARD, lambda records: [*records[:-2], tf_example.encode(b"x", bytes(95), 3)])
    assert any("an image of 95 bytes, expected 96" in f for f in faults(out))

    rewrite(out, SHARD, lambda records: [*records[:-1], b"no example"])
    assert any("that are no tf.Example" in f for f in faults(out))


def test_an_id_that_stands_twice_is_named_at_both_places(out):
    rewrite(out, SHARD, lambda records: [*records[:-1], records[0]])
    of_index, fault = faults(out)
    assert of_index == f"{out}/index/blobs-train-00001-of-00004.npy: is not the index of {SHARD}"
    assert fault.startswith(f"{out}/{SHARD} byte ")
    assert f"its id appears twice, also in the same split at {out}/{SHARD} byte 0" in fault


def test_a_record_in_two_splits_is_named(out):
    test = "blobs-test.tfrecord-00002-of-00004"
    [leaked, *_] = tfrecord.records((out / test).read_bytes(), test)
    rewrite(out, SHARD, lambda records: [leaked, *records[1:]])
    _, fault = faults(out)
    assert "in another split" in fault
    assert test in fault and SHARD in fault


def test_quarantined_records_are_counted(tmp_path):
    from tests.conftest import make_folder_set

    source = make_folder_set(tmp_path / "set", num_train=20, num_test=5)
    next(source.rglob("*.png")).write_bytes(b"no image")
    out = tmp_path / "out"
    make_shards(f"folder:{source}", out, num_shards=1, max_quarantined="1")
    assert faults(out) == []
    [name] = [path for path in out.glob("quarantine/*.jsonl")]
    name.write_text("")
    assert any("0 lines, expected 1" in fault for fault in faults(out))


def test_what_is_no_finished_stage(tmp_path, trained):
    for directory, message in (
        (tmp_path / "no", "no such directory"),
        (tmp_path, "has no manifest.json"),
        (trained, f"did you mean {trained / 'export'}?"),
    ):
        done = run_command("pipeline.verify", directory, check=False)
        assert done.returncode == 1
        assert message in done.stderr
    assert run_command("pipeline.verify", check=False).returncode == 2
