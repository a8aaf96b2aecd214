"""What is said of a cluster before a job goes there; no cluster is needed for that."""

import pytest

from tests.conftest import run_command
from tests.engines.processes import free_ports


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (
            ["--runner=PortableRunner", "--job_endpoint=127.0.0.1:PORT"],
            1,
            "--job_endpoint=127.0.0.1:PORT: no answer",
        ),
        (
            ["--runner=FlinkRunner", "--flink_master=http://127.0.0.1:PORT"],
            1,
            "--flink_master=http://127.0.0.1:PORT: no answer",
        ),
        (["--runner=PortableRunner", "--environment_type=LOOPBACK"], 2, "has no --job_endpoint"),
        (["--runner=FlinkRunner", "--flink_master=here:there"], 2, "not an address"),
        (["--runner=PrismRunner", "--prism_location=/nonesuch"], 1, "refused the job: ValueError"),
    ],
)
def test_a_cluster_that_cannot_be_had_is_said_at_once(tmp_path, flags, status, message):
    (port,) = free_ports(1)
    flags = [flag.replace("PORT", str(port)) for flag in flags]
    out = f"--output_dir={tmp_path / 'out'}"
    done = run_command("pipeline.preprocess", "--source=sample", out, *flags, check=False)
    assert done.returncode == status, done.stderr
    *lines, last = done.stderr.splitlines()
    assert len(lines) in (0, 4)  # What is read, if the job has begun.
    assert message.replace("PORT", str(port)) in last
    assert "expected" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source=sample", "--output_dir=out"], "--output_dir=out: is a relative path"),
        (["--source=idx:digits", "--output_dir=/out"], "--source=idx:digits: is a relative path"),
    ],
)
def test_relative_paths_are_refused_where_workers_stand_elsewhere(flags, message):
    elsewhere = ["--runner=PortableRunner", "--job_endpoint=127.0.0.1:1"]
    done = run_command("pipeline.preprocess", *flags, *elsewhere, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "expected a URL, or the absolute path" in done.stderr
