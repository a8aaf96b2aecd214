"""A worker as a scheduler starts it: on a host of its own, and again after each status 75."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.errors import UsageError
from tests.conftest import REPOSITORY, run_command
from tests.trainer.test_cluster import run_cluster
from trainer import join

MANIFEST = REPOSITORY / "configs" / "deploy" / "kubernetes" / "train.yaml"
_NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)


@given(st.lists(_NAMES, min_size=1, max_size=8), st.integers(1, 65_000))
def test_each_worker_has_an_address_of_its_own(names, port):
    addresses = join.addresses(",".join(names), None, port)
    assert len({*addresses}) == len(names)
    assert [address.rpartition(":")[0] for address in addresses] == names
    assert addresses[0] == f"{names[0]}:{port}"


@given(st.integers(1, 20), _NAMES, st.integers(0, 25))
def test_every_worker_sees_the_same_cluster(num_workers, name, index):
    hosts = f"{name}-{{index}}.{name}"
    addresses = join.addresses(hosts, num_workers, 2222)
    assert addresses == [f"{name}-{number}.{name}:2222" for number in range(num_workers)]
    environment = {"JOB_COMPLETION_INDEX": str(index)}
    if index < num_workers:
        assert join.worker_index(None, num_workers, environment) == index
        assert join.worker_index(0, num_workers, environment) == 0
    else:
        with pytest.raises(UsageError, match=f"JOB_COMPLETION_INDEX={index}: expected 0 to"):
            join.worker_index(None, num_workers, environment)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hosts=a,b"], "no flags for the trainer"),
        (["--hosts=a-{index}", "--", "x"], "expected --num_workers too"),
        (
            ["--hosts=a,b", "--num_workers=3", "--", "x"],
            "names 2 host(s); leave --num_workers out, or name as many",
        ),
        (["--hosts=a:1,b", "--", "x"], "'a:1' is not a host name"),
        (["--hosts=a,b", "--", "x"], "the number of this worker is unknown"),
        (["--hosts=a,b", "--index=2", "--", "x"], "--index=2: expected 0 to 1"),
        (["--hosts=a,b", "--index=0", "--", "--wrkdir=x"], "train: Unknown command line flag"),
    ],
)
def test_bad_use(flags, message):
    done = run_command("trainer.join", *flags, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def trainer_of(manifest: pathlib.Path) -> dict:
    """The trainer's container in a manifest."""
    documents = yaml.safe_load_all(manifest.read_text())
    (job,) = (document for document in documents if document["kind"] == "Job")
    return job["spec"]["template"]["spec"]["containers"][0]


@contextlib.contextmanager
def network_of(hosts: list[str]):
    """A network namespace for each of two hosts, who know each other by name."""
    spaces = [f"vae{os.getpid()}-{number}" for number in range(len(hosts))]
    table = "127.0.0.1 localhost\n" + "".join(
        f"10.99.0.{number + 1} {host}\n" for number, host in enumerate(hosts)
    )

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for space in spaces:
            ip("netns", "add", space)
            directory = pathlib.Path("/etc/netns") / space
            directory.mkdir(parents=True)
            (directory / "hosts").write_text(table)
        first_end, second_end = (("eth0", "netns", space) for space in spaces)
        ip("link", "add", *first_end, "type", "veth", "peer", *second_end)
        for number, space in enumerate(spaces):
            ip("-n", space, "addr", "add", f"10.99.0.{number + 1}/30", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield spaces
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
            shutil.rmtree(pathlib.Path("/etc/netns") / space, ignore_errors=True)


class Pod(threading.Thread):
    """A worker in its namespace, started again as the manifest's Job would."""

    def __init__(self, space: str, index: int, command: list[str]):
        super().__init__()
        self._command = ["ip", "netns", "exec", space, *command]
        self._environment = {**os.environ, "JOB_COMPLETION_INDEX": str(index)}
        self.process: subprocess.Popen | None = None
        self.statuses: list[int] = []
        self.lines: list[str] = []
        self.has_line = threading.Condition()
        self.start()

    def run(self) -> None:
        while True:
            self.process = subprocess.Popen(
                self._command,
                cwd=REPOSITORY,
                env=self._environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for line in self.process.stderr:
                with self.has_line:
                    self.lines.append(line)
                    self.has_line.notify_all()
            self.statuses.append(self.process.wait())
            if self.statuses[-1] not in (75, -signal.SIGKILL):
                with self.has_line:
                    self.has_line.notify_all()
                return

    def wait_for(self, beginning: str) -> None:
        with self.has_line:
            self.has_line.wait_for(
                lambda: not self.is_alive() or any(x.startswith(beginning) for x in self.lines)
            )
        assert self.is_alive(), "".join(self.lines)


@pytest.mark.long
@pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2"
)
@pytest.mark.parametrize(
    "interruptions",
    [
        [(2, 1, signal.SIGTERM)],
        [(2, 1, signal.SIGTERM), (12, 0, signal.SIGKILL)],
    ],
    ids=["preempted", "preempted and killed"],
)
def test_pods_that_are_interrupted_end_as_others_do(data_dir, tmp_path, interruptions):
    container, workdir = trainer_of(MANIFEST), tmp_path / "run"
    changes = {
        "--num_workers": "2",
        "--config": "configs/smoke.py",
        "--config.data_dir": str(data_dir),
        "--workdir": str(workdir),
        "--cache_dir": str(tmp_path / "cache"),
        "--config.batch_size": "27",
        "--config.checkpoint_every_steps": "50",
    }
    arguments = []
    for argument in container["args"]:
        name, _, value = argument.partition("=")
        arguments.append(f"{name}={changes.pop(name, value)}" if value else argument)
    assert not changes  # The manifest has them all.
    arguments.append("--config.num_epochs=60")
    command = [sys.executable, *container["command"][1:], *arguments]
    with network_of(["vae-train-0.vae-train", "vae-train-1.vae-train"]) as spaces:
        pods = [Pod(space, index, command) for index, space in enumerate(spaces)]
        for epoch, index, number in interruptions:
            pods[1].wait_for(f"epoch {epoch}/")
            pods[index].process.send_signal(number)
        for pod in pods:
            pod.join()
    expected = {0: [75, -signal.SIGKILL, 0], 1: [75, 75, 0]}
    num_tries = len(interruptions)
    assert {i: pod.statuses for i, pod in enumerate(pods)} == {
        i: [*statuses[:num_tries], 0] for i, statuses in expected.items()
    }
    uninterrupted = tmp_path / "whole"
    run_cluster(data_dir, uninterrupted, "--config.num_epochs=60")
    metrics = [(d / "metrics.jsonl").read_text().splitlines() for d in (workdir, uninterrupted)]
    assert len(metrics[0]) == len(metrics[1]) == 121
    manifests = [(d / "export" / "manifest.json").read_text() for d in (workdir, uninterrupted)]
    assert len({json.loads(manifest)["model_id"] for manifest in manifests}) == 1
