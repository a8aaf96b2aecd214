"""Worker processes that do not come: the command says so, and ends."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

# A job of two workers with the command line and the patience that are given in place of theirs.
JOB = """
import sys
import apache_beam as beam
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.options.pipeline_options import PipelineOptions
from pipeline.runners import worker_processes

worker_processes.SILENCE_SECS = float(sys.argv[2])
worker_processes.environment(2)
worker_processes.gpus.DEVICES = sys.argv[3]
environment = worker_processes.environments.SubprocessSDKEnvironment(sys.argv[1])
options = PipelineOptions(["--direct_num_workers=2"])
with beam.Pipeline(runner=FnApiRunner(environment), options=options) as pipeline:
    pipeline | beam.Create([1, 2])
"""


def run_job(command: str, *, silence_secs: float, devices: str = "/dev", **environment: str):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JOB, command, str(silence_secs), devices],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("sleep 1000", "has been silent for 0.2 s: 0 of the "),
        pytest.param("false", "ended with status 1: 0 of the ", marks=pytest.mark.long),
        pytest.param("sh -c 'kill -9 $$'", "was killed by SIGKILL: ", marks=pytest.mark.long),
    ],
)
def test_a_worker_that_does_not_connect_ends_the_command(command, what):
    done = run_job(command, silence_secs=0.2)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"a Beam worker process {what}")
    assert "expected all of them, over localhost" in line
    assert "Traceback" not in done.stderr


def test_workers_have_gpus_of_their_own(tmp_path):
    note = tmp_path / "gpus"
    for number in range(8):
        (tmp_path / f"nvidia{number}").touch()
    wait_for_both = f"until [ $(wc -l < {note}) = 2 ]; do :; done"
    command = f"sh -c 'echo $CUDA_VISIBLE_DEVICES >> {note}; {wait_for_both}'"
    names = {"CUDA_VISIBLE_DEVICES": "5,7,GPU-9,3"}
    done = run_job(command, silence_secs=60, devices=str(tmp_path), **names)
    assert sorted(note.read_text().split()) == ["5,7", "GPU-9,3"], done.stderr
