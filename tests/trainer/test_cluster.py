"""Several workers on this machine, as real processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, assert_same_run, run_command, smoke_config
from tests.engines.processes import free_ports
from tests.trainer.test_train import assert_same_path, lines_of
from trainer.runs import train


def launch(data_dir, workdir, *flags, num_workers=2) -> subprocess.Popen:
    """Starts a cluster over the data set, as a user does."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "trainer.launch", f"--num_workers={num_workers}", "--"),
            *("--config=configs/smoke.py", "--config.batch_size=27"),
            *(f"--config.data_dir={data_dir}", f"--workdir={workdir}", *flags),
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_cluster(*args, **kwargs) -> subprocess.CompletedProcess:
    process = launch(*args, **kwargs)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return subprocess.CompletedProcess(process.args, 0, stdout, stderr)


def worker_pids(launcher: subprocess.Popen) -> list[int]:
    """The process of each worker, by its number."""
    with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as file:
        pids = [int(pid) for pid in file.read().split()]

    def number(pid: int) -> int:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = dict(item.split(b"=", 1) for item in file.read().split(b"\0") if item)
        return json.loads(environment[b"TF_CONFIG"])["task"]["index"]

    return sorted(pids, key=number)


def wait_for_epoch(launcher: subprocess.Popen, epoch: int) -> None:
    for line in launcher.stderr:
        if re.match(rf"\[\d] epoch {epoch}/", line):
            return
    raise AssertionError("the launcher ended before")


@pytest.mark.parametrize("num_workers", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_cluster_walks_the_path_of_one_process_and_stops_at_one_step(
    data_dir, tmp_path, num_workers
):
    cluster = tmp_path / "cluster"
    launcher = launch(data_dir, cluster, "--config.num_epochs=3000", num_workers=num_workers)
    wait_for_epoch(launcher, 3)
    os.kill(worker_pids(launcher)[1], signal.SIGTERM)  # One of them; it tells the others.
    stderr = launcher.stderr.read()
    assert launcher.wait() == 75
    matches = re.findall(r"\[(\d)] train: stopped by a signal at step (\d+) of", stderr)
    assert sorted(int(number) for number, _ in matches) == list(range(num_workers))
    assert len({step for _, step in matches}) == 1
    assert (cluster / "checkpoints" / f"step-{int(matches[0][1]):010d}.npz").exists()
    # Only the chief writes.
    assert len(list((cluster / "tensorboard").glob("events.*"))) == 1

    num_epochs = len(lines_of(cluster, "train"))
    config = smoke_config(data_dir, num_virtual_devices=num_workers, num_epochs=num_epochs)
    train.train(config, workdir=str(tmp_path / "alone"))
    metrics = tmp_path / "alone" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()[:-1]
    metrics.write_text("".join(f"{line}\n" for line in lines))
    assert_same_path(cluster, tmp_path / "alone")


def kill_one(data_dir, workdir, killed: int) -> int:
    """Kills a worker of a cluster of 2, checks what the other says; returns the step saved."""
    launcher = launch(data_dir, workdir, "--config.num_epochs=3000")
    wait_for_epoch(launcher, 2)
    os.kill(worker_pids(launcher)[killed], signal.SIGKILL)
    stderr = launcher.stderr.read()
    assert launcher.wait() == 75
    assert f"launch: worker {killed} was killed by SIGKILL" in stderr
    assert f"[{1 - killed}] train: another worker of the cluster is gone or out of reach" in stderr
    assert "start the job again, and it resumes from" in stderr
    assert "killing it" not in stderr
    return max(int(path.name[5:15]) for path in (workdir / "checkpoints").glob("step-*"))


def test_a_killed_worker_ends_the_others(data_dir, tmp_path):
    assert kill_one(data_dir, tmp_path, 1) >= 11


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1], ids=["chief", "other"])
def test_a_cluster_that_lost_a_worker_resumes_to_the_last_bit(data_dir, tmp_path, killed):
    step = kill_one(data_dir, tmp_path / "cut", killed)
    flag = f"--config.num_epochs={step // 11 + 1}"
    resumed = run_cluster(data_dir, tmp_path / "cut", flag)
    assert f"train: from step {step:,} to" in resumed.stderr
    run_cluster(data_dir, tmp_path / "whole", flag)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_passes_signals_on(data_dir, tmp_path, number):
    launcher = launch(data_dir, tmp_path, "--config.num_epochs=3000")
    wait_for_epoch(launcher, 1)
    launcher.send_signal(number)
    stderr = launcher.stderr.read()
    assert launcher.wait() == 75
    assert len(re.findall(r"train: stopped by a signal at step", stderr)) == 2
    assert "launch: workers were interrupted; run the same command to resume" in stderr


# A cluster of one worker with two devices, which TensorFlow makes of GPUs alone.
TWO_DEVICES = """
import sys
import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy as strategy

devices = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
def two(self, cluster_resolver, worker_device):
    return tuple(f"{worker_device}/device:CPU:{number}" for number in range(2)), "CPU"
strategy.CollectiveAllReduceExtended._initialize_local_devices = two

from trainer import main
main.main()
"""


def test_a_cluster_whose_workers_have_two_devices_resumes(data_dir, tmp_path):
    for num_epochs in (1, 2):
        addresses = [f"localhost:{port}" for port in free_ports(1)]
        flags = [f"--config.num_epochs={num_epochs}"]
        worker = start(["-c", TWO_DEVICES], 0, addresses, *flags_of(data_dir, tmp_path), *flags)
        stderr = worker.communicate()[1]
        assert worker.returncode == 0, stderr
        assert "2 replica(s)" in stderr
    assert "train: from step 11 to step 22" in stderr


def test_bad_use(data_dir, tmp_path):
    done = run_command("trainer.launch", "--num_workers=2", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no flags for the trainer" in done.stderr
    flags = ["--config=configs/smoke.py", f"--config.data_dir={data_dir}", f"--workdir={tmp_path}"]
    done = run_command("trainer.main", *flags, "--config.strategy=multi_worker", check=False)
    assert done.returncode == 2
    assert "TF_CONFIG='': expected" in done.stderr
    # The workers' own errors, and their exit status.
    launched = launch(data_dir, tmp_path, "--config.latent_dim=0", num_workers=1)
    _, stderr = launched.communicate()
    assert launched.returncode == 2
    assert "[0] train: --config.latent_dim=0: expected at least 1" in stderr


def start(module: list[str], index: int, addresses: list[str], *flags: str) -> subprocess.Popen:
    """Starts one worker of a cluster, as a scheduler does."""
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    run = module if module[0] == "-c" else ["-m", *module]
    return subprocess.Popen(
        [sys.executable, *run, *flags],
        cwd=REPOSITORY,
        env={**os.environ, "TF_CONFIG": json.dumps(config)},
        stderr=subprocess.PIPE,
        text=True,
    )


def flags_of(data_dir, workdir) -> list[str]:
    flags = ["--config=configs/smoke.py", "--config.batch_size=27", f"--workdir={workdir}"]
    return [*flags, f"--config.data_dir={data_dir}", "--config.strategy=multi_worker"]


@pytest.mark.long
def test_a_worker_that_fails_before_the_cluster_is_up_ends_the_others(data_dir, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(data_dir, damaged)
    shard = next(damaged.glob("*-train.tfrecord-00001-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    addresses = [f"localhost:{port}" for port in free_ports(3)]
    flags = ["--on_corrupt=quarantine", "--max_quarantined=0"]  # So that the data are read first.
    workers = [
        start(["trainer.main"], index, addresses, *flags_of(worker_data_dir, tmp_path), *flags)
        for index, worker_data_dir in enumerate((data_dir, damaged, data_dir))
    ]
    outputs = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [75, 1, 75], outputs
    for output in (outputs[0], outputs[2]):
        message = f"train: worker 1 at {addresses[1]} ended before TensorFlow's cluster was up;"
        assert output.startswith(message)


@pytest.mark.long
def test_a_signal_after_the_cluster_is_up_and_before_the_first_step_is_heard(data_dir, tmp_path):
    # TensorFlow's server takes SIGTERM for itself, and does nothing with it.
    module = ["tests.faults.stop_at_file", "config.json", "trainer.main"]
    addresses = [f"localhost:{port}" for port in free_ports(1)]
    worker = start(module, 0, addresses, *flags_of(data_dir, tmp_path))
    stderr = worker.communicate(timeout=120)[1]
    assert (worker.returncode, "train: stopped by SIGTERM" in stderr) == (75, True)


@pytest.mark.long
def test_no_worker_is_done_before_the_model_is_published(data_dir, tmp_path):
    # A scheduler starts what ended badly, and a chief alone would wait for ever.
    die = ["tests.faults.die_at_file", "export/manifest.json", "trainer.main"]
    addresses = [f"localhost:{port}" for port in free_ports(2)]
    workers = [
        start(module, index, addresses, *flags_of(data_dir, tmp_path))
        for index, module in enumerate((die, ["trainer.main"]))
    ]
    outputs = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 75], outputs
    assert "another worker of the cluster is gone" in outputs[1]
    done = run_cluster(data_dir, tmp_path)
    assert "model_id" in done.stdout


@pytest.mark.long
def test_workers_of_other_addresses_are_reached_without_the_proxy(data_dir, tmp_path):
    addresses = [f"127.0.0.{n}:{port}" for n, port in enumerate(free_ports(2), 2)]
    config = ["--config=configs/smoke.py", "--config.strategy=multi_worker"]
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # Takes connections, never answers.
        proxy.setblocking(False)
        workers = []
        for index in range(2):
            task = {"type": "worker", "index": index}
            environment = {
                **os.environ,
                "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task}),
                "http_proxy": f"http://127.0.0.1:{proxy.getsockname()[1]}",
            }
            flags = [*config, f"--config.data_dir={data_dir}", f"--workdir={tmp_path}/run"]
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "trainer.main", *flags],
                    cwd=REPOSITORY,
                    env=environment,
                )
            )
        assert [worker.wait() for worker in workers] == [0, 0]
        with pytest.raises(BlockingIOError):
            proxy.accept()  # Nobody came.
