"""What a worker elsewhere gets by Beam's --setup_file: the package, and all that it needs."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile

import pytest

from tests.conftest import REPOSITORY

# On a worker: the functions of both jobs, the embedded digits, and the commands' own help.
CHECK = """
import pathlib, sys
from pipeline.cli import quiet
quiet.import_beam()
from pipeline.sources import conversion
from pipeline.datasets.profile import describe
from pipeline.embeddings import job
from pipeline.datasets.building import new_records, shard_writer
from pipeline import sources
from pipeline.reports import scatter
assert len(scatter.script()) > 5_000
assert pathlib.Path(shard_writer.__file__).is_relative_to(sys.argv[1]), shard_writer.__file__
assert sum(sources.open_source("sample").split_sizes.values()) == 10_000
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The archive that Beam makes of the repository, from a copy of what git knows."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("sdist")
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY).split(b"\0")
    for name in filter(None, names):
        target = copy / name.decode()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((REPOSITORY / name.decode()).read_bytes())
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(out)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (archive,) = out.glob("*.tar.gz")
    return archive


def test_the_archive_of_setup_file_installs_and_has_all_that_workers_import(sdist, tmp_path):
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), str(sdist)]
    subprocess.run(command, check=True, capture_output=True)
    elsewhere = {**os.environ, "PYTHONPATH": str(target), "TF_CPP_MIN_LOG_LEVEL": "3"}
    # The name of a config is one of the installed package: what is missing is the data set.
    train = ["-m", "trainer.main", "--config=mnist:latent_dim=2", "--workdir=x"]
    for arguments, status, message in (
        (["-c", CHECK, str(target)], 0, ""),
        (["-m", "pipeline.preprocess", "--help"], 0, ""),
        (["-m", "pipeline.export", "--help"], 0, ""),
        ([*train, "--config.data_dir=nothing"], 1, "--data_dir=nothing: no such directory"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=elsewhere,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status and message in done.stderr, done.stderr
    (found,) = importlib.metadata.distributions(name="vae-pipeline", path=[str(target)])
    required = {
        re.split(r"[<>=;\[ ]", line)[0] for line in found.requires if "extra ==" not in line
    }
    assert {"absl-py", "apache-beam", "tensorflow", "fsspec", "pyarrow"} <= required
    assert {entry.name for entry in found.entry_points} >= {"vae-preprocess", "vae-export"}


def test_the_archive_holds_the_digits_and_no_scratch(sdist):
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert any(name.endswith("pipeline/sources/sample/t10k-images-idx3-ubyte.gz") for name in names)
    assert any(name.endswith("trainer/py.typed") for name in names)
    assert not any(re.search(r"/(build|demo|\.venv)/", name) for name in names)


def test_flags_of_a_file_are_the_runners():
    """The file for Dataflow: every flag in it is one that Beam knows."""
    from apache_beam.options.pipeline_options import GoogleCloudOptions, StandardOptions

    from pipeline.runners import cluster
    from pipeline.runners import options as beam_options

    path = REPOSITORY / "configs" / "deploy" / "dataflow.flags"
    lines = [line for line in path.read_text().splitlines() if line.startswith("--")]
    options = beam_options.parse_options(lines)
    assert options.view_as(StandardOptions).runner == "DataflowRunner"
    assert options.view_as(GoogleCloudOptions).temp_location == "gs://BUCKET/beam"
    assert not cluster.is_portable(options)


@pytest.mark.long
def test_cuda_libraries_resolve_beside_the_pinned_set(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", f"--report={report}"]
    command += ["--constraint", "constraints.txt", ".[dev,cuda]"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    names = {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}
    assert {"nvidia-cudnn-cu12", "nvidia-cublas-cu12", "nvidia-nccl-cu12"} <= names
