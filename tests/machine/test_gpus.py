"""Which GPUs a process has: device files, and a driver that says what it is told."""

import subprocess
import sys

import pytest

from pipeline.machine import gpus
from tests.conftest import REPOSITORY
from trainer import join


@pytest.fixture(autouse=True)
def ten_gpus(monkeypatch, tmp_path_factory):
    devices = tmp_path_factory.mktemp("dev")
    # As a container sees some of a host's: their numbers are no names for CUDA.
    for number in range(4, 14):
        (devices / f"nvidia{number}").touch()
    for name in ("nvidiactl", "nvidia-uvm", "sda"):
        (devices / name).touch()
    monkeypatch.setattr(gpus, "DEVICES", str(devices))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus.free_bytes.cache_clear()
    yield
    gpus.free_bytes.cache_clear()


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, [str(number) for number in range(10)]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", ["1"]),
        ("3, 1", ["3", "1"]),
        ("0,-1,2", ["0"]),
        ("0,10,2", ["0"]),
        ("GPU-8932f937,MIG-1", ["GPU-8932f937", "MIG-1"]),
    ],
)
def test_visible_gpus(monkeypatch, text, expected):
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert gpus.visible() == expected


@pytest.mark.parametrize("text", ["0", "0,1", "GPU-8932f937", "NoDevFiles", "all"])
def test_the_variable_is_no_proof_of_a_gpu(monkeypatch, tmp_path, text):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    for devices in (tmp_path, tmp_path / "nowhere"):
        monkeypatch.setattr(gpus, "DEVICES", str(devices))
        assert gpus.visible() == []
        assert gpus.environment_of(0, 2) == {}


@pytest.mark.parametrize(
    "visible, num_workers, expected",
    [
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("0,1,2,3", 4, ["0", "1", "2", "3"]),
        ("0,1,2", 2, ["0", "1"]),
        ("5,7", 5, ["5", "7", "5", "7", "5"]),
    ],
)
def test_workers_share_the_gpus(monkeypatch, visible, num_workers, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [gpus.environment_of(number, num_workers) for number in range(num_workers)]
    assert found == [{"CUDA_VISIBLE_DEVICES": names} for names in expected]


@pytest.mark.parametrize(
    "num_gpus, told",
    [
        (1, "--num_workers=2: this machine has 1 GPU(s), and each worker needs"),
        (3, "launch: 1 of 3 GPU(s) stay idle"),
    ],
)
def test_a_launcher_divides_the_gpus(tmp_path, num_gpus, told):
    for number in range(num_gpus):
        (tmp_path / f"nvidia{number}").touch()
    program = (
        f"import sys; import {gpus.__name__} as gpus; gpus.DEVICES = {str(tmp_path)!r}\n"
        "from trainer import launch; sys.argv = ['launch', '--', '--workdir=x']; launch.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert told in done.stderr
    assert done.returncode == 2


def test_workers_that_share_a_host_share_its_gpus(monkeypatch):
    workers = ["a:2222", "b:2222", "a:2223"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert join._worker_gpus(workers, 2) == {}  # The scheduler has chosen.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    own = [join._worker_gpus(workers, index) for index in range(3)]
    names = [{"CUDA_VISIBLE_DEVICES": names} for names in ("0,1,2,3,4", "5,6,7,8,9")]
    assert own == [names[0], {}, names[1]]


def test_free_memory_is_what_the_driver_says_of_the_smallest(tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {asked}\nprintf "81000\\n79000\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert gpus.free_bytes() == 79000 << 20
    assert "--id=0,3" in asked.read_text()
    gpus.free_bytes.cache_clear()
    program.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    assert gpus.free_bytes() is None


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(gpus, "_LIBRARIES", ("libc.so.6", "libnonesuch.so.1"))
    assert gpus.missing_library() == "libnonesuch.so.1"
    assert "libnonesuch.so.1 is not installed; expected CUDA's libraries" in gpus.why_unused()
    monkeypatch.setattr(gpus, "_LIBRARIES", ("libnonesuch.so.1",))
    assert "expected an NVIDIA driver" in gpus.why_unused()
    monkeypatch.setattr(gpus, "_LIBRARIES", ("libc.so.6",))
    assert gpus.missing_library() is None
    assert "CUDA_VISIBLE_DEVICES=None" in gpus.why_unused()
