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
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib64", "/usr", "/etc")
_UNITS = {"Mi": 2**20, "Gi": 2**30}


def is_possible() -> bool:
    """Whether this process can make a sandbox: it is root, and may make namespaces."""
    probe = ["bwrap", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "true"]
    return (
        os.geteuid() == 0
        and bool(shutil.which("bwrap"))
        and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    )


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
        mounts = [*self._system(), f"--ro-bind {passwd} /etc/passwd", *self._volumes()]
        words = [word for text in mounts for word in text.split()]
        for pair in (self._environment() | variables).items():
            words += ["--setenv", *pair]
        become = f"setpriv --reuid={user} --regid={group} --clear-groups --bounding-set=-all"
        become += " --inh-caps=-all --no-new-privs"
        return subprocess.run(
            ["bwrap", *words, *become.split(), *command],
            capture_output=True,
            text=True,
            check=False,
        )

    def _environment(self) -> dict[str, str]:
        image = dict(pair.split("=", 1) for text in values_of("ENV") for pair in shlex.split(text))
        manifest = {v["name"]: v.get("value", "") for v in self.container.get("env", ())}
        return {
            "PATH": f"/opt/bin:{pathlib.Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": "/app",
            "VAE_NOSYNC": "1",
            **image,
            **{name: value.replace("gs://BUCKET", "/data") for name, value in manifest.items()},
        }

    def _system(self) -> list[str]:
        """The words that make the root, in texts; all of it is read-only."""
        texts = ["--die-with-parent --unshare-pid --unshare-net --clearenv"]
        texts += ["--cap-add CAP_SETUID --cap-add CAP_SETGID --cap-add CAP_SETPCAP"]
        texts += ["--proc /proc --dev /dev --ro-bind /sys /sys", _memory("/dev/shm", 64 * 2**20)]
        for path in _SYSTEM:
            if os.path.islink(path):
                texts.append(f"--symlink {os.readlink(path)} {path}")
            else:
                texts.append(f"--ro-bind-try {path} {path}")
        python = {pathlib.Path(prefix) for prefix in (sys.prefix, sys.base_prefix)}
        for path in sorted({*python, *(path.resolve() for path in python)}):
            if not path.is_relative_to("/usr"):
                texts += [f"--perms 0755 --dir {parent}" for parent in [*path.parents][-2::-1]]
                texts.append(f"--ro-bind {path.resolve()} {path}")
        texts.append(f"--ro-bind {REPOSITORY} /app")
        nightly = manifests.DEPLOY / "nightly" / "nightly.sh"
        beam = "/opt/apache/beam"
        texts += [
            f"--perms 0755 --dir {path}" for path in ("/opt", "/opt/bin", "/opt/apache", beam)
        ]
        texts.append(f"--ro-bind {nightly} /opt/bin/vae-nightly")
        if self._boot:
            texts.append(f"--ro-bind {self._boot} {beam}/boot")
        return texts

    def _volumes(self) -> list[str]:
        """The words that mount what the manifest mounts, and then close the root, in texts."""
        texts, claim = [], "/data"
        volumes = {volume["name"]: volume for volume in self._spec["volumes"]}
        for mount in self.container["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "emptyDir" in volume:
                amount, unit = re.fullmatch(r"(\d+)(..)", volume["emptyDir"]["sizeLimit"]).groups()
                texts.append(_memory(mount["mountPath"], int(amount) * _UNITS[unit]))
            else:
                claim = mount["mountPath"]
        texts.append(f"--bind {self.data} {claim}")
        if self.context.get("readOnlyRootFilesystem"):
            texts.append("--remount-ro /")
        return [*texts, f"--chdir {self.container.get('workingDir', values_of('WORKDIR')[-1])}"]


def _memory(path: str, size: int) -> str:
    return f"--perms 0777 --size {size} --tmpfs {path}"
