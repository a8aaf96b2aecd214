"""The nightly job as cron runs it: real nights, a gate, a signal, and two nights at once."""

import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

from tests.conftest import REPOSITORY, blobs, make_shards, outputs_of, write_idx
from tests.forked import run_command

SCRIPT = REPOSITORY / "configs" / "deploy" / "nightly" / "nightly.sh"
# Stands in for python: the stage STOP_STAGE gets a signal when it writes STOP_FILE, by default its
# manifest, in its first STOP_TIMES starts.
_STOPPING = """#!/bin/sh
case $2 in
pipeline.$STOP_STAGE)
  mkdir "$STOPPED/$$"
  if [ "$(ls "$STOPPED" | wc -l)" -le "$STOP_TIMES" ]; then
    shift 2
    exec {python} -m tests.faults.stop_at_file \\
      "${{STOP_FILE:-manifest.json}}" pipeline.$STOP_STAGE "$@"
  fi
  ;;
esac
exec {python} "$@"
"""


class Nights:
    """A growing source, and the environment of the script."""

    def __init__(self, directory: pathlib.Path, model_dir: pathlib.Path):
        self.directory, self.out = directory, directory / "out"
        self.latest = self.out / "latest"
        for name in ("incoming", "tmp", "stopped"):
            (directory / name).mkdir()
        python = directory / "python"
        python.write_text(_STOPPING.format(python=sys.executable))
        python.chmod(0o755)
        self._environment = {
            "SOURCE": f"idx:{directory}/incoming",
            "DATA_DIR": str(directory / "shards"),
            "MODEL_DIR": str(model_dir),
            "EXPORTS_DIR": str(self.out),
            "DATE": "2026-11-25",
            "REQUIRE": "elbo>-1e9,written>0",
            "PREPROCESS_FLAGS": "--name=blobs --num_shards=2 --validation_fraction=0",
            "EXPORT_FLAGS": "--split=train --noreport",
            "PYTHON": str(python),
            "TMPDIR": str(directory / "tmp"),
            "STOPPED": str(directory / "stopped"),
        }

    def grow(self, num_train: int) -> None:
        """Makes the source hold the first num_train training records."""
        for split, (images, labels) in blobs().items():
            prefix = self.directory / "incoming" / {"train": "train", "test": "t10k"}[split]
            count = num_train if split == "train" else None
            write_idx(pathlib.Path(f"{prefix}-images-idx3-ubyte"), images[:count])
            write_idx(pathlib.Path(f"{prefix}-labels-idx1-ubyte"), labels[:count])

    def night(self, *stages: str, status: int = 0, **changes: str) -> str:
        """Runs the script to its end; returns its standard error."""
        done = subprocess.run(
            [SCRIPT, *stages],
            cwd=REPOSITORY,
            env={**os.environ, **self._environment, **changes},
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,  # Its own process group, which a test may signal.
        )
        assert done.returncode == status, done.stderr
        assert not [*(self.directory / "tmp").glob("tmp.*")]
        return done.stderr

    def published(self) -> tuple[str, dict[str, bytes]]:
        """The export that readers see, and its files."""
        directory = self.latest.resolve()
        return directory.name, outputs_of(directory)

    def check_same_as_one_export(self, num_records: int) -> None:
        """Checks that one export of the same set has the same bytes."""
        single = self.directory / "single"
        data, model = (self._environment[key] for key in ("DATA_DIR", "MODEL_DIR"))
        flags = [f"--data_dir={data}", f"--model_dir={model}", "--split=train", "--noreport"]
        run_command("pipeline.export", *flags, f"--output_dir={single}")
        assert self.published()[1] == outputs_of(single)
        manifest = json.loads((single / "manifest.json").read_text())
        assert manifest["records"]["written"] == num_records


@pytest.fixture
def nights(tmp_path, trained):
    return Nights(tmp_path, trained / "export")


def test_nights_with_interruptions_and_a_gate_equal_one_export(nights):
    nights.grow(100)
    nights.night(METRICS_DIR=str(nights.directory))
    assert sorted(path.name for path in nights.directory.glob("*.prom")) == [
        *("night_export.prom", "night_latest.prom", "night_preprocess.prom")
    ]
    assert nights.published()[0] == "dt=2026-11-25"
    nights.night(DATE="2026-11-26")  # Nothing is new.
    assert nights.published()[0] == "dt=2026-11-25"
    nights.grow(150)
    stderr = nights.night(STOP_STAGE="preprocess", STOP_TIMES="1")
    assert "nightly: preprocess was interrupted; try 2 of 3" in stderr
    assert nights.published()[0] == "dt=2026-11-25.2"  # More on the same day.
    published = nights.published()
    nights.grow(220)
    stderr = nights.night(status=3, REQUIRE="elbo>0", DATE="2026-11-26")
    assert "export: --require: elbo>0 (it is -" in stderr
    assert f"nightly: the gate rejected the export; {nights.latest} stays where it is" in stderr
    assert nights.published() == published
    # The night ends as before, unless its bounds are other ones.
    nights.night("export", status=3, REQUIRE="elbo>0", DATE="2026-11-26")
    nights.night("export", DATE="2026-11-26")
    published = nights.published()
    assert published[0] == "dt=2026-11-26.2"
    nights.grow(230)
    nights.night("preprocess")
    for path in (nights.directory / "stopped").iterdir():
        path.rmdir()
    stops = {"STOP_STAGE": "export", "STOP_TIMES": "2", "TRIES": "2"}
    marker = "blobs-train.tfrecord-00005-of-00002.json"  # The marker of a new shard.
    stderr = nights.night("export", status=75, STOP_FILE=marker, DATE="2026-11-27", **stops)
    assert "nightly: export was interrupted in try 2 of 2; run the same command" in stderr
    assert nights.published() == published
    nights.night("export", DATE="2026-11-27", KEEP="1")
    assert nights.published()[0] == "dt=2026-11-27"
    nights.check_same_as_one_export(230)
    # The last finished one stays; older ones are gone, the rejected one too.
    assert sorted(path.name for path in nights.out.glob("[!.]*")) == ["dt=2026-11-27", "latest"]


def test_nights_whose_data_set_is_rejected(nights):
    data = nights.directory / "shards"
    settings = {"REFERENCE_DATA": str(data)}
    nights.grow(100)
    stderr = nights.night(status=3, REQUIRE_DATA="written>150", **settings)
    last = f"nightly: the gate rejected the data set: no command trains or exports from {data}, and"
    assert stderr.splitlines()[-1].startswith(last) and not nights.out.exists()
    nights.grow(150)  # Now it has enough records, and is no longer rejected.
    stderr = nights.night("preprocess", REQUIRE_DATA="written>150", **settings)
    assert "drifted" not in stderr
    before = outputs_of(data)
    nights.grow(220)
    stderr = nights.night("preprocess", status=3, REQUIRE_DATA="written<201", **settings)
    assert f"gate rejected the data set: nothing was added to {data}, and" in stderr
    assert "preprocess: --require: written<201 (it is 270) does not hold" in stderr
    assert outputs_of(data) == before


@pytest.mark.long
@pytest.mark.parametrize("num_before", [0, 100])
def test_a_night_that_never_ended_does_not_stop_the_next(nights, num_before):
    if num_before:
        nights.grow(num_before)
        nights.night("preprocess")
    nights.grow(150)
    nights.night("preprocess", status=75, STOP_STAGE="preprocess", STOP_TIMES="1", TRIES="1")
    nights.grow(220)
    stderr = nights.night()
    assert "has changed since a night that did not end" in stderr
    nights.check_same_as_one_export(220)


def test_a_signal_to_the_script_ends_its_stage_and_is_not_tried_again(nights, tmp_path):
    nights.grow(100)
    # Kubernetes signals only the script; Airflow, timeout and systemd signal its process group.
    for target in ("parent", "group"):
        stderr = nights.night(
            status=75, STOP_STAGE="preprocess", STOP_TIMES="9", STOP_SCRIPT=target
        )
        assert "preprocess: stopped by SIGTERM" in stderr
        assert "nightly: preprocess was interrupted in try 1 of 3" in stderr
    nights.night("preprocess")
    source, settings = f"idx:{tmp_path}/incoming", {"num_shards": 2, "validation_fraction": 0.0}
    make_shards(source, tmp_path / "single", **settings)
    assert outputs_of(tmp_path / "shards") == outputs_of(tmp_path / "single")


def test_two_nights_at_once(nights):
    nights.grow(100)
    nights.night("preprocess")
    (lock,) = (nights.directory / "tmp").glob("*.lock")
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another night is still under way" in nights.night(status=75)


def test_nights_of_two_users_share_a_directory_for_scratch_files():
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:  # pytest's directories are private.
        os.chmod(shared, 0o1777)
        settings = {"SOURCE": "sample", "DATA_DIR": "/d", "MODEL_DIR": "/m", "EXPORTS_DIR": "/o"}
        # The stages do nothing here.
        environment = {**os.environ, **settings, "PYTHON": shutil.which("true"), "TMPDIR": shared}

        def night(**user) -> subprocess.CompletedProcess:
            return subprocess.run(
                ["sh", "-s"],
                input=SCRIPT.read_text(),
                cwd="/",
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                **user,
            )

        for user in (nobody, {}, nobody):
            assert night(**user).returncode == 0
        (lock,) = pathlib.Path(shared).glob("vae-nightly-65534-*.lock")
        os.chown(lock, 0, 0)
        done = night(**nobody)
        assert done.returncode == 1
        assert f"nightly: {lock}: cannot be opened; expected a file of user 65534" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"SOURCE": ""}, 2, "SOURCE='': expected a value, such as idx:"),
        ({"TRIES": "many"}, 2, "TRIES=many: expected a number from 1"),
        ({"KEEP": "0"}, 2, "KEEP=0: expected a number from 1"),
        ({"DATE": "yesterday"}, 2, "DATE=yesterday: expected a date such as 2026-11-25"),
        ({"PYTHON": "/nonesuch"}, 2, "PYTHON=/nonesuch: no such program; expected the Python of"),
        ({"TMPDIR": "/nonesuch"}, 2, "TMPDIR=/nonesuch: expected a directory to write to"),
        ({"PREPROCESS_FLAGS": "--num_shrads=2"}, 2, "preprocess failed with status 2"),
        ({"SOURCE": "idx:/nonesuch"}, 1, "preprocess failed with status 1"),
        ({"DATA_DIR": "nonesuch://x"}, 1, "nonesuch://x: cannot tell whether"),
    ],
)
def test_a_failure_that_would_repeat_is_not_tried_again(nights, changes, status, message):
    nights.grow(100)
    stderr = nights.night(status=status, **changes)
    assert f"nightly: {message}" in stderr
    assert "try 2" not in stderr
    assert "no such stage" in nights.night("exprt", status=2)
    assert not nights.out.exists()


def test_nights_with_a_changed_a_vanished_and_a_removed_image(nights, tmp_path):
    """The images of a folder: new ones get in each night, whatever has become of the others."""
    from tests.conftest import make_folder_set

    folder = make_folder_set(tmp_path / "folder", num_train=60, num_test=0)
    paths = sorted(folder.rglob("*.png"))
    settings = {"SOURCE": f"folder:{folder}", "REQUIRE": ""}

    def add(name: str) -> None:
        shutil.copy(paths[9], paths[9].with_name(name))

    data = nights.directory / "shards"

    def num_records(directory: pathlib.Path = data) -> int:
        return json.loads((directory / "manifest.json").read_text())["records"]["written"]

    nights.night(DATE="2026-11-21", **settings)
    add("new1.png")
    paths[0].write_bytes(paths[1].read_bytes())
    text = nights.night("preprocess", **settings)
    assert "1 records have another image or label" in text and num_records() == 61
    add("new2.png")
    paths[2].unlink()
    text = nights.night(DATE="2026-11-23", **settings)
    assert "the source has lost 1 record that the data set holds" in text
    assert num_records() == num_records(nights.latest) == 62
    [gone] = (data / "index").glob("source-*.gone.txt")
    run_command("pipeline.remove", f"--data_dir={data}", f"--ids={gone}")
    add("new3.png")
    text = nights.night(DATE="2026-11-24", **settings)
    assert "has lost" not in text and num_records(nights.latest) == 62
    before = nights.published()
    text = nights.night(DATE="2026-11-25", **settings)
    assert "1 records have another image or label" in text  # Each night, until it is replaced.
    assert nights.published() == before
    nights.check_same_as_one_export(62)
