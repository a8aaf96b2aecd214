"""Worker processes that do not come: the command says so, and ends."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

# A job of two workers with the command line that is given in place of theirs, and little patience.
JOB = """
import sys
import apache_beam as beam
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.options.pipeline_options import PipelineOptions
from pipeline import worker_processes

worker_processes.SILENCE_SECS = 0.2
environment = worker_processes.environments.SubprocessSDKEnvironment(sys.argv[1])
options = PipelineOptions(["--direct_num_workers=2"])
with beam.Pipeline(runner=FnApiRunner(environment), options=options) as pipeline:
    pipeline | beam.Create([1, 2])
"""


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("sleep 1000", "has been silent for 0.2 s: 0 of the "),
        pytest.param("false", "ended with status 1: 0 of the ", marks=pytest.mark.long),
        pytest.param("sh -c 'kill -9 $$'", "was killed by SIGKILL: ", marks=pytest.mark.long),
    ],
)
def test_a_worker_that_does_not_connect_ends_the_command(command, what):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JOB, command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"a Beam worker process {what}")
    assert "expected all of them, over localhost" in line
    assert "Traceback" not in done.stderr
