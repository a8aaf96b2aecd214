"""The GPUs that a process may use; TensorFlow, which would take their memory, is not imported."""

import ctypes
import functools
import glob
import importlib.util
import itertools
import os
import re
import subprocess

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = "/dev"  # Where the driver puts a file for each GPU.
_QUERY_SECS = 30
# Libraries that TensorFlow 2.19 to 2.21 loads, in the order of their dependencies.
_LIBRARIES = (
    *("libcuda.so.1", "libcudart.so.12", "libcublasLt.so.12", "libcublas.so.12"),
    *("libcufft.so.11", "libcusparse.so.12", "libcusolver.so.11", "libcudnn.so.9"),
    "libnccl.so.2",
)


def visible() -> list[str]:
    """Names of the GPUs, as in CUDA_VISIBLE_DEVICES; empty on a machine without GPUs.

    The variable alone proves no GPU: schedulers set it to words of their own for jobs without one.
    """
    files = os.listdir(DEVICES) if os.path.isdir(DEVICES) else []
    # A container has some of the host's files, under the host's numbers; CUDA counts from 0 there.
    count = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in files)

    def is_device(name: str) -> bool:
        return bool(re.match("(GPU|MIG)-", name)) or (name.isdecimal() and int(name) < count)

    named = os.environ.get(VISIBLE)
    if not count or named is None:
        return [str(number) for number in range(count)]
    # CUDA ignores all names behind the first that is no device.
    names = (name.strip() for name in named.split(","))
    return list(itertools.takewhile(is_device, names))


def environment_of(worker: int, num_workers: int) -> dict[str, str]:
    """Environment variables that give a worker process GPUs of its own.

    With more workers than GPUs, several workers share a GPU.

    Args:
      worker: number of the worker, from 0.
      num_workers: number of workers on this machine.

    Returns:
      CUDA_VISIBLE_DEVICES; nothing on a machine without GPUs.
    """
    gpus = visible()
    if not gpus:
        return {}
    share = max(1, len(gpus) // num_workers)
    first = worker * share % len(gpus)
    return {VISIBLE: ",".join(gpus[first : first + share])}


@functools.cache
def free_bytes() -> int | None:
    """Free memory of the visible GPU that has least; None if nvidia-smi does not tell."""
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


def why_unused() -> str:
    """The reason why TensorFlow uses no GPU although a device file exists, and the remedy."""
    library = missing_library()
    if library == _LIBRARIES[0]:
        return f"the driver's {library} cannot be loaded; expected an NVIDIA driver: see nvidia-smi"
    if library:
        return (
            f"{library} is not installed; expected CUDA's libraries: make setup EXTRAS=cuda, or "
            "pip install 'tensorflow[and-cuda]'"
        )
    return f"all libraries are installed, and {VISIBLE}={os.environ.get(VISIBLE)}; see nvidia-smi"


def missing_library() -> str | None:
    """The first CUDA library that is not installed; None if all are installed."""
    return next((name for name in _LIBRARIES if not _is_installed(name)), None)


def _is_installed(library: str) -> bool:
    # The wheels of the extra `cuda` lie beside TensorFlow, which finds them by itself.
    wheels = importlib.util.find_spec("nvidia")
    for place in (wheels.submodule_search_locations or ()) if wheels else ():
        if glob.glob(os.path.join(place, "*", "lib", library)):
            return True
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
