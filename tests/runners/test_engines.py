"""The Beam stages as their users run them on a Flink or Spark cluster, and on Prism."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from tests.conftest import (
    REPOSITORY,
    make_embeddings,
    make_folder_set,
    make_shards,
    outputs_of,
    run_command,
)
from tests.engines import cluster
from tests.engines.flink import FlinkCluster
from tests.engines.processes import ClusterError, distribution
from tests.engines.spark import SparkCluster

PRISM = shutil.which("prism") or str(REPOSITORY / "build" / "prism" / "prism")
FLINK = pytest.param("flink", marks=pytest.mark.flink)
SPARK = pytest.param("spark", marks=pytest.mark.spark)


def a_cluster(engine, cluster_class, tmp_path_factory):
    try:
        distribution(engine)
    except ClusterError as error:
        pytest.skip(str(error))
    with cluster.running(cluster_class, tmp_path_factory.mktemp(engine)) as running:
        yield running


@pytest.fixture(scope="module")
def flink(tmp_path_factory):
    yield from a_cluster("flink", FlinkCluster, tmp_path_factory)


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    yield from a_cluster("spark", SparkCluster, tmp_path_factory)


@pytest.fixture(params=[FLINK, SPARK])
def engine(request) -> cluster.Cluster:
    """Each cluster that is there."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[FLINK, SPARK, pytest.param("prism", marks=pytest.mark.flink)])
def runner_flags(request) -> list[str]:
    """Flags of each runner that is there."""
    if request.param != "prism":
        return request.getfixturevalue(request.param).flags()
    if not os.path.exists(PRISM):
        pytest.skip(f"{PRISM}: no Prism there; `make test-flink` fetches it")
    return ["--runner=PrismRunner", f"--prism_location={PRISM}"]


def preprocess(source, out, *flags, check=True):
    flags = (f"--source={source}", f"--output_dir={out}", "--name=blobs", *flags)
    return run_command("pipeline.preprocess", *flags, check=check)


def lines_of(done: subprocess.CompletedProcess) -> list[str]:
    """What stands on the terminal but for the progress line."""
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if not re.match(r"(preprocess|export) [\d,]+/[\d,]+ ", line)]


def test_shards_have_the_bytes_of_the_in_process_runner(idx_dir, data_dir, tmp_path, runner_flags):
    done = preprocess(f"idx:{idx_dir}", tmp_path / "out", "--num_shards=4", *runner_flags)
    assert outputs_of(tmp_path / "out") == outputs_of(data_dir)
    assert len(lines_of(done)) == 1, done.stderr
    assert done.stdout.startswith("preprocess: finished: 350 read = 350 written")


def test_so_have_more_shards_than_slots_and_quarantined_records(tmp_path, runner_flags):
    images = make_folder_set(tmp_path / "set")
    damaged = sorted(images.rglob("*.png"))[::40]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:50])
    settings = {"num_shards": 23, "max_quarantined": str(len(damaged))}
    make_shards(f"folder:{images}", tmp_path / "here", **settings)
    flags = [f"--{key}={value}" for key, value in settings.items()]
    preprocess(f"folder:{images}", tmp_path / "there", *flags, *runner_flags)
    assert outputs_of(tmp_path / "there") == outputs_of(tmp_path / "here")
    manifest = json.loads((tmp_path / "there" / "manifest.json").read_text())
    assert manifest["records"]["quarantined"] == len(damaged) > 0


def test_an_export_has_the_bytes_of_the_in_process_runner(
    data_dir, trained, tmp_path, runner_flags
):
    make_embeddings(data_dir, trained / "export", tmp_path / "here", split="train,test")
    flags = (f"--data_dir={data_dir}", f"--model_dir={trained / 'export'}", "--split=train,test")
    out = f"--output_dir={tmp_path / 'there'}"
    done = run_command("pipeline.export", *flags, out, "--noreport", *runner_flags)
    assert outputs_of(tmp_path / "there") == outputs_of(tmp_path / "here")
    assert [line for line in lines_of(done) if not line.startswith(("blobs-", "export: "))] == []


@pytest.mark.flink
def test_the_page_of_flink_has_the_counters(flink, idx_dir, tmp_path):
    preprocess(f"idx:{idx_dir}", tmp_path / "out", *flink.flags())
    jobs = [job["id"] for job in flink.page("/jobs")["jobs"]]
    accumulators = [
        accumulator["value"]
        for job in jobs
        for accumulator in flink.page(f"/jobs/{job}/accumulators")["user-task-accumulators"]
    ]
    # 350 as a varint of protobuf.
    counter = r'"payload": "3gI=",\s+"labels": {[^}]*"NAME": "records_written"'
    assert any(re.search(counter, value) for value in accumulators)


# Enough shards for a job to be caught in the midst of.
MANY = ("--source=sample", "--num_shards=600")


def start(out: pathlib.Path, *flags: str) -> subprocess.Popen:
    """Starts a job and returns once it has written some shards, and not nearly all."""
    command = [sys.executable, "-m", "pipeline.preprocess", *MANY, f"--output_dir={out}", *flags]
    job = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while num_markers(out) < 20:
        assert job.poll() is None, job.communicate()
        threading.Event().wait(0.01)
    return job


def num_markers(out: pathlib.Path) -> int:
    return sum(1 for _ in (out / ".progress").glob("mnist-*.json"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    run_command("pipeline.preprocess", *MANY, f"--output_dir={out}")
    return outputs_of(out)


@pytest.mark.parametrize("what", ["a worker of the engine", "one of ours", "all of ours"])
def test_what_is_killed_half_way_leaves_the_same_bytes(engine, expected, tmp_path, what):
    job = start(tmp_path / "out", *engine.flags())
    if what == "a worker of the engine":
        engine.kill("worker-0")
    elif what == "one of ours":
        os.kill(engine.children("worker-pool")[0], signal.SIGKILL)
    else:
        engine.kill("worker-pool")
        engine.start_pool()
    try:
        _, errors = job.communicate()
        assert job.returncode == 0, errors
        assert outputs_of(tmp_path / "out") == expected
    finally:
        if what == "a worker of the engine":
            engine.start_worker(0)
            engine.wait_whole()


def test_a_command_that_is_stopped_takes_its_job_along(engine, expected, tmp_path):
    out = tmp_path / "out"
    job = start(out, *engine.flags())
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate()
    assert job.returncode == 75
    assert "stopped by SIGTERM; run the same command again" in errors
    assert set(engine.jobs()) <= {"FINISHED", "CANCELED", "FAILED", "KILLED"}
    assert 0 < num_markers(out) < 1800
    if isinstance(engine, FlinkCluster):
        assert "CANCELED" in engine.jobs()
    run_command("pipeline.preprocess", *MANY, f"--output_dir={out}", *engine.flags())
    assert outputs_of(out) == expected
    assert json.loads((out / "timings.json").read_text())["num_tasks_reused"] > 0


def test_what_fails_in_a_worker_is_said_in_a_line(engine, tmp_path):
    module = tmp_path / "absent_elsewhere.py"
    module.write_text("from pipeline.sources.readers.idx import open_sample as open_it\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.preprocess", "--source=absent_elsewhere.open_it:"]
        + [f"--output_dir={tmp_path / 'out'}", *engine.flags()],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert len(lines_of(done)) == 1, done.stderr
    assert "--source=absent_elsewhere.open_it:" in lines_of(done)[0]


def test_a_source_that_workers_do_not_see_is_said_in_a_line(engine, tmp_path, idx_dir):
    # A directory that means something to the command alone.
    source = f"idx:/proc/self/cwd/{os.path.relpath(idx_dir, REPOSITORY)}"
    done = preprocess(source, tmp_path / "out", *engine.flags(), check=False)
    assert done.returncode == 1
    assert len(lines_of(done)) == 1, done.stderr
    assert lines_of(done)[0].startswith(f"preprocess: --source={source}: no such directory")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("name", [FLINK, SPARK])
def test_nothing_of_a_cluster_outlives_it(tmp_path, name):
    command = [sys.executable, "-m", f"tests.engines.{name}", str(tmp_path)]
    person = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert "is up" in person.stdout.readline()
    person.kill()
    person.wait()
    for _ in range(1200):
        if not (alive := mentioning(str(tmp_path))):
            return
        threading.Event().wait(0.05)
    raise AssertionError(alive)


def mentioning(text: str) -> list[str]:
    """Command lines of processes that name `text`."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found
