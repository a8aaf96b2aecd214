"""The programs as the user of the image, on the file system of a restricted pod."""

import re
import shutil

import pytest

from tests.conftest import REPOSITORY, make_folder_set, make_idx_set
from tests.deploy import manifests, sandbox
from tests.deploy.sandbox import Sandbox, values_of

needs_sandbox = pytest.mark.skipif(not sandbox.is_possible(), reason="needs bubblewrap, and root")
BOOT, PRISM = (REPOSITORY / "build" / name for name in ("boot/container", "prism/prism"))
# Starts a pool of workers as a container of Flink's pods does, and runs preprocess in it.
IN_POOL = """
exec 3< <(exec "$1" "$2" 2>&1)
grep --quiet --max-count=1 "Started worker pool" <&3 || exit 1
cat <&3 >&2 &
exec python -m pipeline.preprocess --source=idx:/data/mnist --output_dir=/data/shards \
  --runner=PrismRunner --prism_location=/data/prism \
  --environment_type=EXTERNAL --environment_config=localhost:50000
"""


def succeed(done) -> None:
    assert done.returncode == 0, done.stderr
    for refusal in ("Read-only file system", "Permission denied", "No writable"):
        assert refusal not in done.stdout + done.stderr, done.stderr


def test_the_user_of_the_image_is_that_of_its_pods():
    users = {
        "{runAsUser}:{runAsGroup}".format_map(
            pod["spec"]["securityContext"] | container["securityContext"]
        )
        for pod in manifests.pods().values()
        for container in pod["spec"]["containers"]
        if "vae-pipeline" in container["image"]
    }
    assert users == {*values_of("USER")}


@needs_sandbox
@pytest.mark.parametrize("name", ["vae-train", "vae-nightly", "vae-preprocess"])
def test_a_container_has_no_rights_and_writes_to_its_volumes_alone(tmp_path, name):
    container = Sandbox(name, tmp_path)
    done = container.run(["cat", "/proc/self/status", "/proc/self/mounts"])
    assert f"\nUid:\t{container.context['runAsUser']}\t" in done.stdout
    assert "\nCapBnd:\t0000000000000000\n" in done.stdout
    mounts = re.findall(r"^\S+ (/\S*) \w+ rw,", done.stdout, re.M)
    volumes = [mount["mountPath"] for mount in container.container["volumeMounts"]]
    writable, expected = (
        {path for path in paths if not path.startswith(("/dev", "/proc"))}
        for paths in (mounts, ["/data", *volumes])
    )
    assert writable == expected


@needs_sandbox
def test_preprocess_runs_as_a_user_without_a_name(tmp_path):
    container = Sandbox("vae-preprocess", tmp_path)
    make_idx_set(container.data / "mnist")
    command = container.command()
    succeed(container.run(command[: command.index("--runner=PortableRunner")]))  # No cluster here.
    assert (container.data / "shards" / "manifest.json").exists()


@needs_sandbox
@pytest.mark.long
def test_training_and_a_night_run_as_a_user_without_a_name(tmp_path):
    trainer, night = (Sandbox(name, tmp_path) for name in ("vae-train", "vae-nightly"))
    make_folder_set(night.data / "images")
    succeed(night.run(["vae-nightly", "preprocess"]))

    command = [word for word in trainer.command() if not word.startswith("--num_workers=")]
    (hosts,) = (word for word in command if word.startswith("--hosts="))
    command[command.index(hosts)] = "--hosts=127.0.0.1"
    succeed(trainer.run([*command, "--config.num_epochs=1"], JOB_COMPLETION_INDEX="0"))

    succeed(night.run(night.command(), JOB_NAME="vae-nightly-29933417", REQUIRE="elbo>-1e9"))
    exports = night.data / "embeddings"
    assert (exports / "latest").readlink().name == "dt=2026-11-30"
    assert (exports / "dt=2026-11-30" / "report.html").exists()


@needs_sandbox
@pytest.mark.long
@pytest.mark.skipif(not (BOOT.exists() and PRISM.exists()), reason="needs Go and make test-long")
def test_a_worker_pool_runs_as_the_user_of_the_image(tmp_path):
    container = Sandbox("vae-flink-taskmanager", tmp_path, boot=BOOT)
    make_idx_set(container.data / "mnist")
    shutil.copy(PRISM, container.data)  # Beam changes its mode.
    (user,) = re.findall(r"^RUN echo '(.*)' >> /etc/passwd$", sandbox.DOCKERFILE, re.M)
    command = ["bash", "-c", IN_POOL, "bash", *container.command()]
    succeed(container.run(command, users=user))
    assert (container.data / "shards" / "manifest.json").exists()
