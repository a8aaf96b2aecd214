"""The SLURM script on a real SLURM, of one machine and this test's own."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from pipeline.storage import lock
from tests.conftest import REPOSITORY, assert_same_run
from tests.trainer.test_cluster import run_cluster

SCRIPT = REPOSITORY / "configs" / "deploy" / "slurm" / "train.sbatch"
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol")
MISSING = [name for name in PROGRAMS if not shutil.which(name)]

OVER = ("COMPLETED", "FAILED", "CANCELLED")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        bool(MISSING) or os.getuid() != 0,
        reason="no SLURM, or not root: apt-get install slurmctld slurmd slurm-client",
    ),
]

# No accounts, no GPUs, nothing measured: a scheduler and two cores.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A SLURM whose only node is this machine."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
        # The script says python3, as of the environment that is active.
        self.environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        self.environment["SLURM_WAIT"] = "5"

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=REPOSITORY
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *flags: str) -> "Job":
        # What stands in the script for a cluster of GPUs, said otherwise for this machine.
        here = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0"]
        log = f"--output={self.directory}/log-%j"
        text = self.ask("sbatch", "--parsable", *here, log, str(SCRIPT), *flags)
        return Job(self, text.strip())


class Job:
    def __init__(self, slurm: Slurm, number: str):
        self._slurm, self.number = slurm, number

    def wait_for(self, is_reached) -> None:
        """Looks until it is so, or will never be; SLURM tells nobody."""
        while not is_reached():
            state = self.state()["JobState"]
            assert state not in OVER or state == "CANCELLED", self.log()
            time.sleep(0.2)

    def log(self) -> str:
        path = self._slurm.directory / f"log-{self.number}"
        return path.read_text() if path.exists() else ""

    def state(self) -> dict[str, str]:
        text = self._slurm.ask("scontrol", "show", "job", self.number)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def tell_workers(self, number: int) -> None:
        """What --signal does when the time is nearly up."""
        self._slurm.ask("scancel", f"--signal={signal.Signals(number).name}", self.number)

    def cancel(self) -> None:
        self._slurm.ask("scancel", self.number)

    def start_now(self) -> None:
        """A job that was requeued waits two minutes, for a node refuses it in the same second."""
        self.wait_for(lambda: self.state()["JobState"] == "PENDING")
        self._slurm.ask("scontrol", "update", f"JobId={self.number}", "StartTime=now+5")

    def end(self) -> str:
        """Waits for the end; returns its state, as SLURM calls it, and its exit status."""
        self.wait_for(lambda: self.state()["JobState"] in OVER)
        state = self.state()
        return f"{state['JobState']} {state['ExitCode']}"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (directory / name).mkdir()
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        controller, daemon = (each.getsockname()[1] for each in sockets)
    host = socket.gethostname().partition(".")[0]
    made = Slurm(directory)
    values = {"host": host, "controller": controller, "daemon": daemon, "directory": directory}
    (directory / "slurm.conf").write_text(_CONFIG.format(**values, cores=os.cpu_count()))
    daemons = []
    for command in (["slurmctld", "-D", "-i"], ["slurmd", "-D"]):
        with open(directory / f"{command[0]}.log", "wb") as log:
            environment = made.environment
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    made_idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    while not made.ask(*made_idle).strip():
        assert all(process.poll() is None for process in daemons)
        time.sleep(0.2)
    yield made
    for process in reversed(daemons):
        process.terminate()
        process.wait()


def flags_of(data_dir, workdir, num_epochs: int) -> list[str]:
    return [
        *("--config=configs/smoke.py", "--config.batch_size=27"),
        *(f"--config.data_dir={data_dir}", f"--workdir={workdir}"),
        f"--config.num_epochs={num_epochs}",
    ]


def test_a_job_whose_time_is_up_goes_back_to_the_queue_and_on_from_there(slurm, data_dir, tmp_path):
    job = slurm.submit(*flags_of(data_dir, tmp_path / "run", 100))
    job.wait_for(lambda: "epoch 3/" in job.log())
    job.tell_workers(signal.SIGTERM)
    job.wait_for(lambda: "goes back to the queue" in job.log())
    assert job.log().count("train: stopped by a signal at step") == 2
    job.start_now()
    assert job.end() == "COMPLETED 0:0"
    assert job.state()["Restarts"] == "1"
    assert "train: from step" in job.log()
    run_cluster(data_dir, tmp_path / "whole", "--config.num_epochs=100")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_job_that_a_person_cancels_saves_and_stays_away(slurm, data_dir, tmp_path):
    job = slurm.submit(*flags_of(data_dir, tmp_path / "run", 3000))
    job.wait_for(lambda: "epoch 3/" in job.log())
    job.cancel()
    assert job.end().startswith("CANCELLED")
    job.wait_for(lambda: job.log().count("train: stopped by a signal at step") == 2)
    assert job.state()["Restarts"] == "0"
    assert [*(tmp_path / "run" / "checkpoints").glob("step-*.npz")]


def test_a_worker_that_fails_ends_those_that_wait_for_it(slurm, data_dir, tmp_path):
    # Only the chief holds the directory, so only the chief fails; the other one has met it.
    with lock.hold(str(tmp_path)):
        job = slurm.submit(*flags_of(data_dir, tmp_path, 3000))
        assert job.end() == "FAILED 1:0", job.log()  # Not the other one's 75.
    assert "worker 0 at" in job.log()
    assert "ended before TensorFlow's cluster was up" in job.log()
    assert "another process is writing here" in job.log()
    assert "goes back to the queue" not in job.log()
    assert job.state()["Restarts"] == "0"
