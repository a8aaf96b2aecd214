"""configs/deploy/nightly/nightly.sh over several nights, as cron runs it."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, make_folder_set, outputs_of

SCRIPT = REPOSITORY / "configs" / "deploy" / "nightly" / "nightly.sh"


class Nights:
    """A source that grows, and the chain over it."""

    def __init__(self, images: pathlib.Path, model_dir: pathlib.Path, directory: pathlib.Path):
        self._left = sorted(p for p in images.rglob("*.png"))
        self._images, self._source = images, directory / "images"
        self.data_dir, self.output_dir = directory / "shards", directory / "embeddings"
        self.environment = {
            **os.environ,
            "PYTHON": sys.executable,
            "SOURCE": f"folder:{self._source}",
            "DATA_DIR": str(self.data_dir),
            "MODEL_DIR": str(model_dir),
            "OUTPUT_DIR": str(self.output_dir),
            "PREPROCESS_FLAGS": "--name=blobs --validation_fraction=0",
            "EXPORT_FLAGS": "--split=train,test --images=none --noreport",
        }

    def grow(self, part: int) -> None:
        """Adds every third image, from one of them on, to the source."""
        for path in self._left[part::3]:
            target = self._source / path.relative_to(self._images)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def start(self, *stages: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [SCRIPT, *stages],
            cwd=REPOSITORY,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *stages: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*stages, **environment)
        stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr


@pytest.fixture
def nights(trained, tmp_path):
    images = make_folder_set(tmp_path / "all", num_train=60, num_test=30)
    return lambda name: Nights(images, trained / "export", tmp_path / name)


def test_three_nights_one_of_them_stopped_and_one_turned_down(nights):
    chain, other = nights("cron"), nights("undisturbed")
    chain.grow(0)
    status, stdout, stderr = chain.run(REQUIRE="elbo>-1000")
    assert status == 0, stderr
    assert "preprocess: finished: 30 read" in stdout
    assert "export: finished: 30 read = 30 written + 0 quarantined (30 computed" in stdout

    # Stopped in the second night: the rest waits for the next start, whatever has come since.
    chain.grow(1)
    process = chain.start()
    assert any("30 new records" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 75
    assert stderr.splitlines()[-1] == "nightly: preprocess ended with status 75"
    chain.grow(2)
    status, stdout, _ = chain.run()
    assert status == 0
    assert "(60 computed, 30 reused)" in stdout

    # The gate turns a night down, and the last export stays.
    before = outputs_of(chain.output_dir)
    status, _, stderr = chain.run(REQUIRE="elbo>0", EXPORT_FLAGS="--split=train,test --overwrite")
    assert status == 1
    assert "elbo" in stderr
    assert stderr.splitlines()[-1] == "nightly: export ended with status 1"
    after = outputs_of(chain.output_dir)
    assert {name: after[name] for name in before} == before

    for parts in ((0,), (1, 2)):
        for part in parts:
            other.grow(part)
        assert other.run()[0] == 0
    assert outputs_of(chain.data_dir) == outputs_of(other.data_dir)
    assert before == outputs_of(other.output_dir)


def test_bad_use(nights):
    chain = nights("bad")
    status, _, stderr = chain.run("exprot")
    assert status == 2
    assert "nightly: exprot: no such stage; expected preprocess or export" in stderr
    chain.grow(0)
    status, _, stderr = chain.run(PREPROCESS_FLAGS="--nmae=x")
    assert status == 2
    assert stderr.splitlines()[-1] == "nightly: preprocess ended with status 2"
    del chain.environment["MODEL_DIR"]
    status, _, stderr = chain.run()
    assert status not in (0, 75)
    assert "MODEL_DIR: expected a published model" in stderr
