"""Which GPUs a process has: device files, and a driver that says what it is told."""

import pytest

from pipeline import gpus
from tests.conftest import run_command


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus.free_bytes.cache_clear()
    yield
    gpus.free_bytes.cache_clear()


def test_visible_gpus(tmp_path, monkeypatch):
    assert gpus.visible(str(tmp_path / "nowhere")) == []
    for name in ("nvidia10", "nvidia2", "nvidia0", "nvidiactl", "nvidia-uvm", "sda"):
        (tmp_path / name).touch()
    assert gpus.visible(str(tmp_path)) == ["0", "2", "10"]
    for text, expected in (
        ("", []),
        ("-1", []),
        ("1", ["1"]),
        ("3, 1", ["3", "1"]),
        ("0,-1,2", ["0"]),
        ("GPU-8932f937,MIG-1", ["GPU-8932f937", "MIG-1"]),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert gpus.visible(str(tmp_path)) == expected


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


def test_a_launcher_refuses_more_workers_than_gpus():
    environment = {"CUDA_VISIBLE_DEVICES": "0"}
    done = run_command("trainer.launch", "--", "--workdir=x", check=False, env=environment)
    assert done.returncode == 2
    assert "--num_workers=2: this machine has 1 GPU(s), and each worker takes" in done.stderr


def test_without_gpus_workers_have_nothing_in_their_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.environment_of(0, 2) == {}


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
    monkeypatch.setattr(gpus, "_LIBRARIES", ("libc.so.6",))
    assert gpus.missing_library() is None
