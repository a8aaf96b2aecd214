"""Places as containers and clusters have them: no home, no name, no locale, nothing writable."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPOSITORY, make_shards, outputs_of

UID = 12345  # A user that /etc/passwd does not name.
# As that user, who may read what the interpreter needs, and write only what is his own.
AS_USER = [
    *("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]
# A tree without any place to write but SCRATCH, if that is given.
READ_ONLY = """
set -e
mount --make-rprivate /
mount --rbind / "$ROOT"
[ -z "$SCRATCH" ] || mount --bind "$SCRATCH" "$ROOT$SCRATCH"
for mount in $(awk '{print $5}' /proc/self/mountinfo | grep "^$ROOT"); do
  case "$mount" in
    "$ROOT${SCRATCH:-/proc}" | "$ROOT"/proc* | "$ROOT"/sys* | "$ROOT"/dev | "$ROOT"/dev/pts) ;;
    *) mount -o remount,bind,ro "$mount" ;;
  esac
done
cd /
exec chroot "$ROOT" "$@"
"""
# Python reads the file system as ASCII, and prints ASCII.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def can_change_user() -> bool:
    try:
        done = subprocess.run(["unshare", "-m", *AS_USER, "true"], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not can_change_user(), reason="needs root and util-linux")


def run(module, *flags, wrapper=(), check=True, **environment) -> subprocess.CompletedProcess:
    """Runs a command as a user without a name and a home, with umask 077."""
    command = ["sh", "-c", 'umask 077; exec "$@"', "sh", sys.executable, "-m", module]
    done = subprocess.run(
        [*wrapper, *AS_USER, *command, *map(str, flags)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **environment},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or not check, done.stderr
    return done


@pytest.fixture
def scratch(tmp_path) -> pathlib.Path:
    """A directory that the user owns."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    os.chown(directory, UID, UID)
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == os.getuid() and parent != pathlib.Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return directory


@pytest.fixture
def accented(tmp_path) -> pathlib.Path:
    """A folder whose names are no ASCII, and some no UTF-8."""
    directory = tmp_path / "sét"
    for number in range(12):
        path = directory / ("chât" if number % 2 else "chien") / f"{number}é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number * 20, np.uint8)).save(path)
    (directory / "chien" / os.fsdecode(b"\xff.png")).write_bytes((path).read_bytes())
    return directory


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, ASCII], ids=["C", "ascii"])
def test_names_are_the_same_in_any_locale(scratch, accented, tmp_path, locale):
    flags = [f"--source=folder:{accented}", f"--output_dir={scratch}/out", "--num_shards=1"]
    run("pipeline.preprocess", *flags, **locale)
    make_shards(f"folder:{accented}", tmp_path / "expected", num_shards=1, name="sét")
    assert outputs_of(scratch / "out") == outputs_of(tmp_path / "expected")
    assert all(path.stat().st_mode & 0o077 == 0 for path in (scratch / "out").rglob("*"))


def read_only(tmp_path, scratch="") -> list[str]:
    root = tmp_path / "root"
    root.mkdir()
    variables = [f"ROOT={root}", f"SCRATCH={scratch}"]
    return ["env", *variables, "unshare", "-m", "bash", "-c", READ_ONLY, "bash"]


@pytest.mark.long
@pytest.mark.parametrize("home", [{}, {"HOME": "/nonexistent"}], ids=["unset", "unwritable"])
def test_all_stages_run_on_a_read_only_root(scratch, tmp_path, home):
    where = {"wrapper": read_only(tmp_path, scratch), "TMPDIR": str(scratch), "LC_ALL": "C", **home}
    shards, workdir, out = scratch / "shards", scratch / "run", scratch / "out"
    source = ["--source=sample", "--image_size=8x8", "--num_shards=2"]
    run("pipeline.preprocess", *source, f"--output_dir={shards}", **where)
    config = [f"--config={REPOSITORY}/configs/smoke.py", f"--config.data_dir={shards}"]
    run("trainer.main", *config, f"--workdir={workdir}", "--config.num_epochs=1", **where)
    model = f"--model_dir={workdir}/export"
    flags = [f"--data_dir={shards}", model, f"--output_dir={out}", "--split=test"]
    done = run("pipeline.export", *flags, **where)
    assert "matplotlib" not in done.stderr.lower()
    run("pipeline.verify", shards, **where)
    assert (out / "report.html").exists()


def test_without_a_place_for_temporary_files_a_stage_says_so(scratch, tmp_path):
    wrapper = read_only(tmp_path)
    flags = ["--source=sample", "--output_dir=/tmp/out"]
    done = run("pipeline.preprocess", *flags, wrapper=wrapper, check=False)
    assert done.returncode == 1 and "set TMPDIR" in done.stderr, done.stderr
