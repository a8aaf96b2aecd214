"""configs/deploy/slurm/train.sbatch on a real SLURM, of this machine alone."""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import threading

import pytest

from tests.conftest import REPOSITORY, assert_same_run
from tests.flink.cluster import free_ports
from tests.test_cluster import run_cluster

SCRIPT = REPOSITORY / "configs" / "deploy" / "slurm" / "train.sbatch"
_PROGRAMS = ("munged", "slurmctld", "slurmd")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        os.getuid() != 0 or not all(map(shutil.which, _PROGRAMS)),
        reason="takes root, and Debian's packages munge, slurmctld, slurmd and slurm-client",
    ),
]

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthInfo=socket={place}/munge/socket
SlurmUser=root
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=60
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A scheduler, and the one machine that it has."""

    def __init__(self, place: pathlib.Path):
        self._place, self._processes = place, []
        for name in ("munge", "state", "spool"):
            (place / name).mkdir(mode=0o700)
        (place / "munge" / "key").write_bytes(os.urandom(1024))
        (place / "munge" / "key").chmod(0o600)
        host = platform.node().partition(".")[0]
        text = _CONFIGURATION.format(host=host, place=place, ports=free_ports(2))
        (place / "slurm.conf").write_text(text)
        self._environment = {
            **os.environ,
            "SLURM_CONF": str(place / "slurm.conf"),
            # As of an active environment; the script starts python3.
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def start(self) -> None:
        munge = [f"--{n}-file={self._place}/munge/{n}" for n in ("key", "pid", "log", "seed")]
        socket = f"--socket={self._place}/munge/socket"
        self._start("munged", "--force", "--foreground", *munge, socket)
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D")
        self.wait_until(lambda: "idle" in self.run("sinfo", "--noheader", check=False))

    def _start(self, *command: str) -> None:
        with open(self._place / f"{command[0]}.log", "wb") as log:
            self._processes.append(
                subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
            )

    def stop(self) -> None:
        self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        for process in reversed(self._processes):
            process.kill()
            process.wait()

    def run(self, *command: str, check: bool = True) -> str:
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env=self._environment,
            check=check,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ).stdout

    def wait_until(self, happens) -> None:
        pause = threading.Event()
        for _ in range(3000):
            assert all(process.poll() is None for process in self._processes), self._place
            if happens():
                return
            pause.wait(0.1)
        raise AssertionError(f"waited for 5 minutes; see {self._place}")

    def submit(self, log: pathlib.Path, *flags: str) -> str:
        """Submits the script for two workers on this machine; returns the job's number."""
        options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={log}"]
        return re.search(r"\d+", self.run("sbatch", *options, str(SCRIPT), *flags))[0]

    def state(self, job: str) -> str:
        """State, exit status and restarts of a job, as the scheduler says."""
        shown = self.run("scontrol", "show", "job", job)
        return " ".join(re.findall(r"(?:JobState|ExitCode|Restarts)=\S+", shown))


@pytest.fixture
def slurm(tmp_path):
    made = Slurm(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_a_job_that_is_stopped_goes_back_to_the_queue_and_on(slurm, data_dir, tmp_path):
    log, workdir = tmp_path / "job.log", tmp_path / "run"
    flags = ["--config=configs/smoke.py", "--config.batch_size=27", "--config.num_epochs=60"]
    job = slurm.submit(log, *flags, f"--config.data_dir={data_dir}", f"--workdir={workdir}")
    slurm.wait_until(lambda: log.exists() and "epoch 3/" in log.read_text())
    slurm.run("scancel", "--signal=TERM", "--batch", job)  # As the scheduler does before the end.
    slurm.wait_until(lambda: "Restarts=1" in slurm.state(job))
    assert f"interrupted, state saved: job {job} goes back to the queue" in log.read_text()
    # Two minutes later it would by itself.
    slurm.wait_until(
        lambda: (
            "RUNNING" in slurm.state(job)
            or slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        )
    )
    slurm.wait_until(lambda: "COMPLETED" in slurm.state(job))
    assert len(re.findall(r"train: from step \d+ to step 660, 2 replica", log.read_text())) == 2
    run_cluster(data_dir, tmp_path / "whole", "--config.num_epochs=60")
    assert_same_run(workdir, tmp_path / "whole")


def test_bad_usage_is_not_tried_again(slurm, tmp_path):
    log = tmp_path / "job.log"
    job = slurm.submit(log, "--config=configs/smoke.py", "--wrkdir=x")
    slurm.wait_until(lambda: "FAILED" in slurm.state(job))
    assert slurm.state(job) == "JobState=FAILED Restarts=0 ExitCode=2:0"
    assert "Unknown command line flag 'wrkdir'" in log.read_text()
