import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import reader
from pipeline.datasets.building import finish as finish_set
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contents import TIMINGS
from tests.conftest import REPOSITORY, die_at_file, make_idx_set, make_shards, outputs_of, write_idx
from tests.forked import run_command


def die(idx_dir, out, file_number) -> None:
    """Runs what `make_shards` runs, to a kill at its n-th file."""
    flags = (f"--source=idx:{idx_dir}", f"--output_dir={out}", "--name=blobs", "--num_shards=4")
    die_at_file(file_number, "pipeline.preprocess", *flags)


@pytest.mark.parametrize(
    "beam_args",
    [
        ["--direct_num_workers=2", "--direct_running_mode=multi_threading"],
        ["--direct_num_workers=8", "--direct_running_mode=multi_threading"],
        ["--direct_num_workers=1", "--direct_running_mode=multi_processing"],
        ["--direct_num_workers=2"],
        ["--direct_num_workers=8"],
    ],
    ids=["2 threads", "8 threads", "1 process", "2 processes", "8 processes"],
)
def test_the_bytes_do_not_depend_on_the_workers(idx_dir, data_dir, tmp_path, beam_args):
    make_shards(f"idx:{idx_dir}", tmp_path / "out", beam_args=beam_args)
    assert outputs_of(tmp_path / "out") == outputs_of(data_dir)


def test_nor_on_the_block_size_nor_the_place_of_the_source(
    idx_dir, data_dir, tmp_path, monkeypatch
):
    from pipeline.datasets.building import shard_writer
    from pipeline.datasets.profile import duplicates
    from pipeline.sources import conversion

    monkeypatch.setattr(shard_writer, "BLOCK_SIZE", 7)
    monkeypatch.setattr(conversion, "_RECORDS_AT_A_TIME", 3)
    monkeypatch.setattr(duplicates, "_RECORDS_AT_ONCE", 50)
    elsewhere = make_idx_set(tmp_path / "elsewhere", suffix=".gz")
    make_shards(f"idx:{elsewhere}", tmp_path / "out")
    assert outputs_of(tmp_path / "out") == outputs_of(data_dir)


def test_nor_on_the_day(idx_dir, data_dir, tmp_path, monkeypatch):
    now = time.time
    for name in ("time", "monotonic"):
        monkeypatch.setattr(time, name, lambda: now() + 400 * 86_400)
    make_shards(f"idx:{idx_dir}", tmp_path / "out")
    assert outputs_of(tmp_path / "out") == outputs_of(data_dir)


def test_the_seed_changes_the_order_and_keeps_the_splits(idx_dir, data_dir, tmp_path):
    make_shards(f"idx:{idx_dir}", tmp_path / "out", seed=1)
    before, after = reader.Dataset(str(data_dir)), reader.Dataset(str(tmp_path / "out"))
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
        reader.Dataset(str(out))
    num_markers = len(list((out / ".progress").glob("blobs-*.json"))) if out.exists() else 0
    make_shards(f"idx:{idx_dir}", out)
    assert outputs_of(out) == outputs_of(data_dir)
    timings = json.loads((out / TIMINGS).read_text())
    assert timings["num_tasks_reused"] == num_markers
    assert timings["num_tasks"] == 12


FLAGS = ("--name=blobs", "--num_shards=4")


@pytest.fixture(scope="module")
def num_calls(idx_dir, tmp_path_factory) -> int:
    """How many calls of our functions a job over `idx_dir` takes."""
    out = tmp_path_factory.mktemp("calls") / "out"
    flags = (f"--source=idx:{idx_dir}", f"--output_dir={out}", *FLAGS)
    return int(
        run_command("tests.faults.die_at_call", 0, "pipeline.preprocess", *flags).stderr.split()[-1]
    )


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(n, marks=pytest.mark.long) for n in range(8, 20))]
)
def test_killed_at_a_random_moment_the_rerun_gives_the_same_bytes_and_keeps_whole_shards(
    idx_dir, data_dir, tmp_path, num_calls, seed
):
    out = tmp_path / "out"
    number = random.Random(seed).randrange(1, num_calls)
    flags = (f"--source=idx:{idx_dir}", f"--output_dir={out}", *FLAGS)
    done = run_command(
        "tests.faults.die_at_call", number, "pipeline.preprocess", *flags, check=False
    )
    assert done.returncode == -signal.SIGKILL, (number, num_calls, done.stderr)
    finished = (out / manifest_lib.MANIFEST).exists()
    num_markers = len(list((out / ".progress").glob("blobs-*.json"))) if out.exists() else 0
    written = {path: path.stat().st_ino for path in out.glob("blobs-*")}
    make_shards(f"idx:{idx_dir}", out)
    assert outputs_of(out) == outputs_of(data_dir)
    timings = json.loads((out / TIMINGS).read_text())
    assert finished or timings["num_tasks_reused"] == num_markers
    kept = sum(path.stat().st_ino == number for path, number in written.items())
    assert kept >= num_markers  # No whole shard was written again.


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

    page = out / "stats.html"
    for damage in (
        (out / "blobs-test.tfrecord-00000-of-00004").unlink,
        lambda: page.write_bytes(page.read_bytes()[:-1] + b"x"),
    ):
        damage()
        assert make_shards(f"idx:{idx_dir}", out)["reused"]
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
        with pytest.raises(StageError, match=f"holds '{name}' and neither"):
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
        reader.Dataset(str(out))
    with pytest.raises(StageError, match="not as this program wrote it"):
        make_shards(f"idx:{idx_dir}", out, seed=1)
    assert outputs_of(tmp_path) == before
    make_shards(f"idx:{idx_dir}", out, seed=1, overwrite=True)
    make_shards(f"idx:{idx_dir}", tmp_path / "fresh", seed=1)
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "3", '"x"'])
def test_a_manifest_that_is_no_object(idx_dir, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    for overwrite, message in ((False, "not as this program wrote it"), (True, "holds 'manifest")):
        with pytest.raises(StageError, match=message):
            make_shards(f"idx:{idx_dir}", tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the worker by /proc")
def test_a_worker_that_is_killed_ends_the_job_and_the_rerun_completes(tmp_path):
    flags = ["--source=sample", "--num_shards=400", "--direct_num_workers=2"]
    command = [sys.executable, "-m", "pipeline.preprocess", *flags, f"--output_dir={tmp_path}/out"]
    job = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/mnist-*")):  # Until the workers write.
        assert job.poll() is None
    ours = f"-m pipeline.runners.worker {job.pid}"
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
    from pipeline.storage import files

    out = tmp_path / "out"
    make_shards(f"idx:{idx_dir}", out)
    removed, remove = [], files.remove

    def die_at_third(path):
        removed.append(path)
        if len(removed) == 3:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(files, "remove", die_at_third)
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
    # A shard and its index, and for each split the sums.
    assert len(manifest["files"]) == 3 * (8 * 2 + 1) + len(finish_set.NAMES)
    assert sum(entry.get("num_examples", 0) for entry in manifest["files"]) == 8
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(out))
    for split, count in manifest["splits"].items():
        if count:
            assert len(list(builder.as_dataset(split=split))) == count
            assert len(reader.Dataset(str(out)).read_images(split)) == count


def test_it_works_on_a_url(idx_dir, data_dir, tmp_path):
    import fsspec

    url = f"memory://{tmp_path.name}/out"
    make_shards(f"idx:{idx_dir}", url)
    fs = fsspec.filesystem("memory")
    fs.get(url, str(tmp_path / "copy"), recursive=True)
    assert outputs_of(tmp_path / "copy") == outputs_of(data_dir)
    np.testing.assert_array_equal(
        reader.Dataset(url).read_images("test"), reader.Dataset(str(data_dir)).read_images("test")
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 KiB, and a function that remounts it with other options."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "x", small]).returncode:
        pytest.skip("this machine does not let tests mount a file system")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", small], check=True)

    yield small, remount
    subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [("size=24k", "No space left on device"), ("ro,size=4m", "Read-only file system")],
)
def test_a_disk_that_takes_nothing_is_a_clear_error_and_the_rerun_completes(
    idx_dir, data_dir, small_disk, options, message
):
    small, remount = small_disk
    remount(options)
    flags = (f"--source=idx:{idx_dir}", f"--output_dir={small}", *FLAGS)
    failed = run_command("pipeline.preprocess", *flags, check=False)
    assert failed.returncode == 1
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (small / manifest_lib.MANIFEST).exists()
    remount("rw,size=4m")
    run_command("pipeline.preprocess", *flags)
    assert outputs_of(small) == outputs_of(data_dir)


def test_a_disk_without_room_for_one_file_or_another_is_named_and_the_rerun_completes(
    idx_dir, data_dir, small_disk
):
    small, remount = small_disk
    # No room for a shard; for what is known of a split; for the page about the set.
    for size, args in (("24k", ["--direct_num_workers=2"]), ("140k", []), ("200k", [])):
        remount(f"size={size}")
        with pytest.raises(StageError) as error:
            make_shards(f"idx:{idx_dir}", small, beam_args=args)
        line = rf"{small}/\S+: No space left on device; free some space on that disk(;? .*)?"
        assert re.fullmatch(line, str(error.value))
        assert not list(small.rglob(".writing-*"))
        assert not (small / manifest_lib.MANIFEST).exists()
    remount("size=4m")
    make_shards(f"idx:{idx_dir}", small)
    assert outputs_of(small) == outputs_of(data_dir)


def test_of_two_jobs_on_one_directory_the_second_stops_and_a_dead_one_blocks_nobody(tmp_path):
    flags = ("--source=sample", "--num_shards=400", f"--output_dir={tmp_path}/out")
    command = [sys.executable, "-m", "pipeline.preprocess", *flags]
    first = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/mnist-*")):  # Until it writes.
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)
    second = run_command("pipeline.preprocess", *flags, check=False)
    assert second.returncode == 1
    assert "another process is writing here; wait for it to end" in second.stderr
    first.kill()
    first.wait()
    run_command("pipeline.preprocess", *flags)
    assert run_command("pipeline.verify", tmp_path / "out").returncode == 0


# In a small process of its own, since a child's peak begins with that of its parent.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_resident_mb(*flags: str) -> float:
    """Peak resident memory of a preprocess command, in MB."""
    command = [sys.executable, "-m", "pipeline.preprocess", *flags]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], cwd=REPOSITORY, check=True, capture_output=True
    )
    return int(done.stdout) / (1024 if sys.platform == "linux" else 1024**2)


@pytest.mark.parametrize("suffix", ["", pytest.param(".gz", marks=pytest.mark.long)])
def test_ten_times_the_records_take_no_more_memory(tmp_path, suffix):
    peaks = []
    for number in (60_000, 600_000):
        source = tmp_path / str(number)
        source.mkdir()
        pixels = np.random.default_rng(number).integers(0, 256, (number, 28, 28), np.uint8)
        if suffix:  # Packed, a set of that size must be unpacked to somewhere; zeros pack fast.
            pixels[:, :27] = 0
        write_idx(source / f"train-images-idx3-ubyte{suffix}", pixels)
        write_idx(source / f"train-labels-idx1-ubyte{suffix}", pixels[:, 27, 0] % 10)
        del pixels
        peaks.append(peak_resident_mb(f"--source=idx:{source}", f"--output_dir={source}/out"))
    assert peaks[1] - peaks[0] < 150, peaks


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"train": 60_000, "test": 10_000}, {"train": 1, "validation": 1, "test": 1}),
        ({"train": 6_000_000}, {"train": 35, "validation": 4}),
        ({"unsplit": 1_000_000}, {"train": 5, "validation": 1, "test": 1}),
    ],
)
def test_shards_are_as_large_as_they_should_be(sizes, expected):
    from pipeline.datasets import placement
    from pipeline.datasets.building import create as create_set

    settings = create_set.Settings("x", None, 0.1, 0, "none")
    expected_sizes = placement.expected_sizes(sizes, 0.1)
    num_shards = create_set.num_shards(settings, expected_sizes, (28, 28, 1))
    assert num_shards == expected
    for split, number in num_shards.items():
        mib = expected_sizes[split] * 864 / number / 2**20
        assert mib <= 256
        assert mib >= 64 or number == 1


def test_auto_is_the_default_and_says_how_many(tmp_path, idx_dir):
    manifest = make_shards(f"idx:{idx_dir}", tmp_path / "out", num_shards=None)
    assert manifest["num_shards"] == {"train": 1, "validation": 1, "test": 1}


def test_packed_shards_hold_the_same_records(idx_dir, data_dir, tmp_path):
    import gzip

    import tensorflow as tf

    manifest = make_shards(f"idx:{idx_dir}", tmp_path / "out", compression="gzip")
    make_shards(f"idx:{idx_dir}", tmp_path / "again", compression="gzip")
    assert outputs_of(tmp_path / "out") == outputs_of(tmp_path / "again")
    packed, plain = reader.Dataset(str(tmp_path / "out")), reader.Dataset(str(data_dir))
    for split in plain.splits:
        np.testing.assert_array_equal(packed.read_images(split), plain.read_images(split))
        for entry in plain.shards(split):
            data = (tmp_path / "out" / f"{entry['name']}.gz").read_bytes()
            assert gzip.decompress(data) == (data_dir / entry["name"]).read_bytes()
    assert not (tmp_path / "out" / "dataset_info.json").exists()
    names = [str(p) for p in sorted((tmp_path / "out").glob("*-train.*.gz"))]
    read = sum(1 for _ in tf.data.TFRecordDataset(names, compression_type="GZIP"))
    assert read == manifest["splits"]["train"]
    assert run_command("pipeline.verify", tmp_path / "out").returncode == 0


def test_a_source_that_changes_between_command_and_worker_is_an_error(tmp_path, monkeypatch):
    from pipeline.datasets.building import shard_writer
    from pipeline.sources import conversion

    source = make_idx_set(tmp_path / "set")
    real = shard_writer.write_shards

    def change_first(**settings):
        make_idx_set(source, num_train=301)
        conversion.open_source_once.cache_clear()
        real(**settings)

    monkeypatch.setattr(shard_writer, "write_shards", change_first)
    with pytest.raises(Exception, match="holds 351 records now, and held 350 when the job began"):
        make_shards(f"idx:{source}", tmp_path / "out")
    assert not (tmp_path / "out" / manifest_lib.MANIFEST).exists()
