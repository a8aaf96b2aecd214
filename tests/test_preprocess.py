import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from pipeline import finish_set, shards, stage
from pipeline.errors import StageError, UsageError
from pipeline.output_directory import TIMINGS
from tests.conftest import REPOSITORY, die_at_file, make_idx_set, make_shards, outputs_of


def die(idx_dir, out, file_number) -> None:
    """Runs what `make_shards` runs, to a kill at its n-th file."""
    flags = (f"--source=idx:{idx_dir}", f"--output_dir={out}", "--name=blobs", "--num_shards=4")
    die_at_file(file_number, "pipeline.preprocess", *flags)


@pytest.mark.parametrize(
    "beam_args",
    [
        ["--direct_num_workers=3", "--direct_running_mode=multi_threading"],
        ["--direct_num_workers=3"],
    ],
    ids=["3 threads", "3 processes"],
)
def test_the_bytes_do_not_depend_on_the_workers(idx_dir, data_dir, tmp_path, beam_args):
    make_shards(f"idx:{idx_dir}", tmp_path / "out", beam_args=beam_args)
    assert outputs_of(tmp_path / "out") == outputs_of(data_dir)


def test_nor_on_the_block_size_nor_the_place_of_the_source(
    idx_dir, data_dir, tmp_path, monkeypatch
):
    from pipeline import convert, describe_shards, write_shards

    monkeypatch.setattr(write_shards, "BLOCK_SIZE", 7)
    monkeypatch.setattr(convert, "_RECORDS_AT_A_TIME", 3)
    monkeypatch.setattr(describe_shards, "_RECORDS_A_BUCKET", 50)
    elsewhere = make_idx_set(tmp_path / "elsewhere", suffix=".gz")
    make_shards(f"idx:{elsewhere}", tmp_path / "out")
    assert outputs_of(tmp_path / "out") == outputs_of(data_dir)


def test_the_seed_changes_the_order_and_keeps_the_splits(idx_dir, data_dir, tmp_path):
    make_shards(f"idx:{idx_dir}", tmp_path / "out", seed=1)
    before, after = shards.Dataset(str(data_dir)), shards.Dataset(str(tmp_path / "out"))
    assert before.dataset_id != after.dataset_id
    for split in before.splits:
        ids = [
            [i for entry in dataset.shards(split) for i in dataset.read_shard(entry).ids]
            for dataset in (before, after)
        ]
        assert ids[0] != ids[1]
        assert sorted(ids[0]) == sorted(ids[1])


@pytest.mark.parametrize("file_number", [1, 2, 3, 8, 14, 25, 26, 29])
def test_killed_at_any_file_the_rerun_gives_the_same_bytes(
    idx_dir, data_dir, tmp_path, file_number
):
    out = tmp_path / "out"
    die(idx_dir, out, file_number)
    with pytest.raises(StageError, match=r"has no manifest\.json, so it is unfinished"):
        shards.Dataset(str(out))
    num_markers = len(list((out / ".progress").glob("blobs-*.json"))) if out.exists() else 0
    make_shards(f"idx:{idx_dir}", out)
    assert outputs_of(out) == outputs_of(data_dir)
    timings = json.loads((out / TIMINGS).read_text())
    assert timings["num_tasks_reused"] == num_markers
    assert timings["num_tasks"] == 12


def test_a_shard_damaged_before_the_rerun_is_made_again(idx_dir, data_dir, tmp_path):
    out = tmp_path / "out"
    die(idx_dir, out, 26)
    shard = sorted(out.glob("blobs-*"))[0]
    shard.write_bytes(bytes(len(shard.read_bytes())))
    make_shards(f"idx:{idx_dir}", out)
    assert outputs_of(out) == outputs_of(data_dir)


def test_a_finished_directory_is_left_alone_and_remade_where_files_are_missing(
    idx_dir, data_dir, tmp_path
):
    out = tmp_path / "out"
    first = make_shards(f"idx:{idx_dir}", out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    second = make_shards(f"idx:{idx_dir}", out)
    assert second.pop("reused") is True
    assert first == second
    assert times == {path: path.stat().st_mtime_ns for path in times}

    (out / "blobs-test.tfrecord-00000-of-00004").unlink()
    assert "reused" not in make_shards(f"idx:{idx_dir}", out)
    assert outputs_of(out) == outputs_of(data_dir)


def test_other_inputs_need_overwrite_which_leaves_nothing_stale(idx_dir, tmp_path):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    make_shards(f"idx:{idx_dir}", out)
    before = outputs_of(out)
    with pytest.raises(StageError, match="num_shards.test is 4 there and 3 here.*--overwrite"):
        make_shards(f"idx:{idx_dir}", out, num_shards=3)
    assert outputs_of(out) == before
    make_shards(f"idx:{idx_dir}", out, num_shards=3, overwrite=True)
    make_shards(f"idx:{idx_dir}", fresh, num_shards=3)
    assert outputs_of(out) == outputs_of(fresh)


def test_a_directory_of_somebody_else_is_refused_even_with_overwrite(idx_dir, tmp_path):
    (tmp_path / ".progress").mkdir()
    for name in ("precious.txt", ".progress/precious.txt"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(StageError, match="holds 'precious.txt' and neither"):
            make_shards(f"idx:{idx_dir}", tmp_path, overwrite=True)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert [path.name for path in tmp_path.iterdir()] == [".progress"]


def test_a_directory_of_another_stage_is_refused_even_with_overwrite(idx_dir, trained):
    before = outputs_of(trained / "export")
    with pytest.raises(StageError, match="is the output of another stage"):
        make_shards(f"idx:{idx_dir}", trained / "export", overwrite=True)
    assert outputs_of(trained / "export") == before


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].append({"name": "../precious.txt", "bytes": 4}),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.update(image_shape=[4, 24, 1]),
        lambda manifest: manifest.update(made_from=None),
        lambda manifest: manifest.clear(),
        lambda manifest: manifest.update(name="another program's"),
    ],
)
def test_a_manifest_that_was_changed_is_trusted_by_nobody(idx_dir, tmp_path, change):
    out = tmp_path / "out"
    make_shards(f"idx:{idx_dir}", out)
    (tmp_path / "precious.txt").write_text("mine")
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))
    before = outputs_of(tmp_path)
    with pytest.raises(StageError, match=r"manifest\.json: not as this program wrote it"):
        shards.Dataset(str(out))
    for overwrite in (False, True):
        with pytest.raises(StageError, match="not as this program wrote it"):
            make_shards(f"idx:{idx_dir}", out, seed=1, overwrite=overwrite)
    assert outputs_of(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "3", '"x"'])
def test_a_manifest_that_is_no_object(idx_dir, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StageError, match="not as this program wrote it"):
        make_shards(f"idx:{idx_dir}", tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the worker by /proc")
def test_a_worker_that_is_killed_ends_the_job_and_the_rerun_completes(tmp_path):
    flags = ["--source=sample", "--num_shards=400", "--direct_num_workers=2"]
    command = [sys.executable, "-m", "pipeline.preprocess", *flags, f"--output_dir={tmp_path}/out"]
    job = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/mnist-*")):  # Until the workers write.
        assert job.poll() is None
    ours = f"-m pipeline.beam_worker {job.pid}"
    workers = [
        int(path.parent.name)
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")
        if path.read_bytes().replace(b"\0", b" ").decode().strip().endswith(ours)
    ]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = job.communicate()
    assert job.returncode == 1
    assert "a Beam worker process was killed" in errors
    assert "Traceback" not in errors.splitlines()[-1]


def test_killed_while_it_overwrites_it_can_be_told_to_again(idx_dir, tmp_path, monkeypatch):
    from pipeline import storage

    out = tmp_path / "out"
    make_shards(f"idx:{idx_dir}", out)
    removed, remove = [], storage.remove

    def die_at_third(path):
        removed.append(path)
        if len(removed) == 3:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(storage, "remove", die_at_third)
    with pytest.raises(KeyboardInterrupt):
        make_shards(f"idx:{idx_dir}", out, num_shards=3, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(StageError, match="holds unfinished output of other inputs"):
        make_shards(f"idx:{idx_dir}", out, num_shards=3)
    make_shards(f"idx:{idx_dir}", out, num_shards=3, overwrite=True)
    make_shards(f"idx:{idx_dir}", tmp_path / "fresh", num_shards=3)
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


def test_an_unfinished_directory_of_other_inputs_is_refused(idx_dir, tmp_path):
    die(idx_dir, tmp_path / "out", 5)
    with pytest.raises(StageError, match="holds unfinished output of other inputs"):
        make_shards(f"idx:{idx_dir}", tmp_path / "out", seed=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_shards": 351}, "more shards than the 350 records"),
        ({"validation_fraction": 1.0}, "expected 0 ≤ fraction < 1"),
        ({"validation_fraction": -0.1}, "expected 0 ≤ fraction < 1"),
        ({"validation_fraction": float("nan")}, "expected 0 ≤ fraction < 1"),
    ],
)
def test_settings_out_of_range(idx_dir, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        make_shards(f"idx:{idx_dir}", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_shards_that_no_record_falls_into(tmp_path):
    source = make_idx_set(tmp_path / "set", num_train=5, num_test=3)
    out = tmp_path / "out"
    manifest = make_shards(f"idx:{source}", out, num_shards=8)
    assert len(manifest["files"]) == 3 * 8 + len(finish_set.NAMES)
    assert sum(entry.get("num_examples", 0) for entry in manifest["files"]) == 8
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(out))
    for split, count in manifest["splits"].items():
        if count:
            assert len(list(builder.as_dataset(split=split))) == count
            assert len(shards.Dataset(str(out)).read_images(split)) == count


def test_it_works_on_a_url(idx_dir, data_dir, tmp_path):
    import fsspec

    url = f"memory://{tmp_path.name}/out"
    make_shards(f"idx:{idx_dir}", url)
    fs = fsspec.filesystem("memory")
    fs.get(url, str(tmp_path / "copy"), recursive=True)
    assert outputs_of(tmp_path / "copy") == outputs_of(data_dir)
    np.testing.assert_array_equal(
        shards.Dataset(url).read_images("test"), shards.Dataset(str(data_dir)).read_images("test")
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_a_clear_error_and_the_rerun_completes(idx_dir, data_dir, tmp_path):
    from tests.conftest import run_command

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "x", small]).returncode:
        pytest.skip("this machine does not let tests mount a file system")
    try:
        args = (f"--source=idx:{idx_dir}", "--name=blobs", "--num_shards=4")
        failed = run_command("pipeline.preprocess", *args, f"--output_dir={small}", check=False)
        assert failed.returncode == 1
        assert "No space left on device" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not (small / stage.MANIFEST).exists()
        subprocess.run(["mount", "-o", "remount,size=4m", small], check=True)
        run_command("pipeline.preprocess", *args, f"--output_dir={small}")
        assert outputs_of(small) == outputs_of(data_dir)
    finally:
        subprocess.run(["umount", small], check=True)
