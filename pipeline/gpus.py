"""The GPUs that a process may use, told without TensorFlow, which would take their memory."""

import ctypes
import functools
import glob
import importlib.util
import itertools
import os
import re
import subprocess

VISIBLE = "CUDA_VISIBLE_DEVICES"
_QUERY_SECS = 30
# What TensorFlow 2.19 to 2.21 loads beside the driver, in the order in which they need each other.
_LIBRARIES = (
    *("libcuda.so.1", "libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12"),
    *("libcufft.so.11", "libcusparse.so.12", "libcusolver.so.11", "libcudnn.so.9"),
)


def visible(devices: str = "/dev") -> list[str]:
    """The GPUs as CUDA_VISIBLE_DEVICES would name them; none on a machine without.

    Args:
      devices: where the driver puts a device file for each GPU.
    """
    named = os.environ.get(VISIBLE)
    if named is not None:
        # CUDA passes over all that stands behind what is no name of a device.
        names = (name.strip() for name in named.split(","))
        return list(itertools.takewhile(lambda name: name and name != "-1", names))
    files = os.listdir(devices) if os.path.isdir(devices) else []
    numbers = (re.fullmatch(r"nvidia(\d+)", name) for name in files)
    return [str(number) for number in sorted(int(match[1]) for match in numbers if match)]


def environment_of(worker: int, num_workers: int) -> dict[str, str]:
    """What a worker process has in its environment to have GPUs of its own.

    With more workers than GPUs several share one.

    Args:
      worker: its number, from 0.
      num_workers: of this machine.

    Returns:
      CUDA_VISIBLE_DEVICES, or nothing on a machine without GPUs.
    """
    gpus = visible()
    if not gpus:
        return {}
    share = max(1, len(gpus) // num_workers)
    first = worker * share % len(gpus)
    return {VISIBLE: ",".join(gpus[first : first + share])}


@functools.cache
def free_bytes() -> int | None:
    """Memory that is free on the smallest visible GPU now; None if the driver does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    if os.environ.get(VISIBLE) is not None:
        command.append(f"--id={','.join(visible())}")
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_QUERY_SECS
        )
        return min(int(line) for line in done.stdout.split()) << 20  # It counts in MiB.
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def missing_library() -> str | None:
    """The first of CUDA's libraries that is not installed; None if all of them are."""
    return next((name for name in _LIBRARIES if not _is_installed(name)), None)


def _is_installed(library: str) -> bool:
    # The wheels of the extra `cuda` lie beside TensorFlow, which finds them by itself.
    wheels = importlib.util.find_spec("nvidia")
    for place in wheels.submodule_search_locations if wheels else ():
        if glob.glob(os.path.join(place, "*", "lib", library)):
            return True
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
