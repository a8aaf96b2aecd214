"""A container of a pod under configs/deploy/, without a cluster or an image.

Bubblewrap gives a command a root of its own, with this machine's system and Python and, for what
the image installs, this checkout. User, mounts and environment are those of the manifest and of
the Dockerfile.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from tests.conftest import REPOSITORY
from tests.deploy import manifests

DOCKERFILE = (manifests.DEPLOY / "Dockerfile").read_text()
_ISOLATED = ["--die-with-parent", "--unshare-pid", "--unshare-net"]
for _right in ("SETUID", "SETGID", "SETPCAP"):  # For setpriv.
    _ISOLATED += ["--cap-add", f"CAP_{_right}"]
_VENV = "/opt/venv"
_UNITS = {"Mi": 2**20, "Gi": 2**30}


def is_possible() -> bool:
    """Whether this process can make a sandbox: it may make namespaces and become any user."""
    probe = ["bwrap", *_ISOLATED, *_read("/", "/"), *_become(65_532, 65_532), "true"]
    return bool(shutil.which("bwrap")) and _run(probe).returncode == 0


def values_of(instruction: str) -> list[str]:
    """The values of an instruction of the Dockerfile."""
    return re.findall(rf"^{instruction} (.*)$", DOCKERFILE, re.M)


class Sandbox:
    """The last container of a pod.

    Attributes:
      container: what the manifest says of it.
      context: its security context, with that of the pod.
      data: directory of this machine that the container sees as its claim, or in place of
        gs://BUCKET.
    """

    def __init__(self, pod: str, scratch: pathlib.Path, *, boot: pathlib.Path | None = None):
        """Makes a container of a pod.

        Args:
          pod: its name.
          scratch: an existing directory to write to.
          boot: Beam's program to start workers, if the container has it.
        """
        self._spec = manifests.pods()[pod]["spec"]
        self.container = self._spec["containers"][-1]
        self._scratch, self._boot = scratch, boot
        self.context = self._spec["securityContext"] | self.container["securityContext"]
        self.data = scratch / "data"
        self.data.mkdir(exist_ok=True)

    def command(self) -> list[str]:
        """What the manifest has the container run."""
        words = [*self.container["command"], *self.container.get("args", ())]
        return [word.replace("gs://BUCKET", "/data") for word in words]

    def run(self, command: list[str], users: str = "", **variables: str):
        """Runs a command to its end.

        Args:
          command: its words.
          users: lines of /etc/passwd beside root's. Without one the user has no name.
          **variables: environment, beside the image's and the manifest's.

        Returns:
          subprocess.CompletedProcess, with texts.
        """
        user, group = self.context["runAsUser"], self.context["runAsGroup"]
        for path in (self.data, *self.data.rglob("*")):
            os.chown(path, user, group)
        passwd = self._scratch / "passwd"
        passwd.write_text(f"root:x:0:0:root:/root:/bin/sh\n{users}\n")
        words = [*self._system(), *_read(passwd, "/etc/passwd"), *self._volumes()]
        for pair in (self._environment() | variables).items():
            words += ["--setenv", *pair]
        return _run(["bwrap", *words, *_become(user, group), *command])

    def _environment(self) -> dict[str, str]:
        image = dict(pair.split("=", 1) for text in values_of("ENV") for pair in shlex.split(text))
        manifest = {v["name"]: v.get("value", "") for v in self.container.get("env", ())}
        return {
            "PATH": f"/opt/bin:{_VENV}/bin:/usr/bin:/bin",
            "PYTHONPATH": "/app",
            "VAE_NOSYNC": "1",
            **image,
            **{name: value.replace("gs://BUCKET", "/data") for name, value in manifest.items()},
        }

    def _system(self) -> list[str]:
        """The words that make the root."""
        words = [*_ISOLATED, "--clearenv", "--proc", "/proc", "--dev", "/dev"]
        words += _memory("/dev/shm", 64 * 2**20)  # As a container has, unless its pod mounts more.
        for path in ("/bin", "/sbin", "/lib", "/lib64", "/usr", "/etc", "/sys"):
            if os.path.islink(path):
                words += ["--symlink", os.readlink(path), path]
            elif os.path.exists(path):
                words += _read(path, path)
        base = pathlib.Path(sys.base_prefix)
        for path in sorted({base, base.resolve()}):
            if not path.is_relative_to("/usr"):
                words += [*_directories(path.parent), *_read(path.resolve(), path)]
        # Not where it is: a volume such as /tmp may lie above it.
        words += [*_directories(_VENV), *_read(pathlib.Path(sys.prefix).resolve(), _VENV)]
        words += [*_directories("/opt/bin"), *_directories("/opt/apache/beam")]
        words += _read(manifests.DEPLOY / "nightly" / "nightly.sh", "/opt/bin/vae-nightly")
        if self._boot:
            words += _read(self._boot, "/opt/apache/beam/boot")
        return [*words, *_read(REPOSITORY, "/app")]

    def _volumes(self) -> list[str]:
        """The words that mount what the manifest mounts, and then close the root."""
        words, claim = [], "/data"
        volumes = {volume["name"]: volume for volume in self._spec["volumes"]}
        for mount in self.container["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "emptyDir" in volume:
                amount, unit = re.fullmatch(r"(\d+)(..)", volume["emptyDir"]["sizeLimit"]).groups()
                words += _memory(mount["mountPath"], int(amount) * _UNITS[unit])
            else:
                claim = mount["mountPath"]
        words += ["--bind", str(self.data), claim]
        if self.context.get("readOnlyRootFilesystem"):
            words += ["--remount-ro", "/"]
        return [*words, "--chdir", self.container.get("workingDir", values_of("WORKDIR")[-1])]


def _become(user: int, group: int) -> list[str]:
    """Words that run those after them as a user without rights."""
    words = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    return [*words, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def _run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _read(source: object, target: object) -> list[str]:
    return ["--ro-bind", str(source), str(target)]


def _memory(path: str, size: int) -> list[str]:
    return ["--perms", "0777", "--size", str(size), "--tmpfs", path]


def _directories(path: object) -> list[str]:
    """Words that make a directory and those above it for every user to enter."""
    parents = [*reversed(pathlib.Path(str(path)).parents), path][1:]
    return [word for parent in parents for word in ("--perms", "0755", "--dir", str(parent))]
