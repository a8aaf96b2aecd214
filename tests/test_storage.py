import os
import subprocess
import sys

import pytest

from pipeline import storage
from pipeline.errors import StageError

HOLD_LOCK = """
import sys
from pipeline import storage
with storage.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    """A local directory, and a URL of a file system that is none."""
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_files_come_and_go(place):
    path = storage.join(place, "a", "b.txt")
    assert not storage.exists(path)
    assert storage.list_names(place) == []
    storage.make_dirs(storage.join(place, "a"))
    storage.write_bytes(path, b"first")
    storage.write_bytes(path, b"second")
    assert storage.read_bytes(path) == b"second"
    assert storage.num_bytes(path) == 6
    assert storage.is_dir(storage.join(place, "a"))
    assert storage.list_names(storage.join(place, "a")) == ["b.txt"]
    storage.remove(storage.join(place, "a"))
    storage.remove(path)
    assert not storage.exists(path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(path)


def test_a_failed_write_leaves_what_was_there(place):
    storage.make_dirs(place)
    path = storage.join(place, "file")
    storage.write_bytes(path, b"before")
    with pytest.raises(RuntimeError, match="half-way"):
        with storage.publishing(path) as file:
            file.write(b"after")
            raise RuntimeError("half-way")
    assert storage.read_bytes(path) == b"before"
    assert storage.list_names(place) == ["file"]


def test_trees_go_there_and_back(place, tmp_path):
    tree = tmp_path / "tree"
    (tree / "deep" / "deeper").mkdir(parents=True)
    (tree / "top").write_bytes(b"1")
    (tree / "deep" / "deeper" / "leaf").write_bytes(b"2")
    storage.publish_tree(str(tree), storage.join(place, "copy"))
    with storage.local_copy(storage.join(place, "copy")) as local:
        assert open(os.path.join(local, "top"), "rb").read() == b"1"
        assert open(os.path.join(local, "deep", "deeper", "leaf"), "rb").read() == b"2"


def test_a_lock_keeps_others_out_until_its_process_dies(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(StageError, match="another process is writing here"):
        with storage.lock(str(tmp_path)):
            pass
    holder.kill()
    holder.communicate()
    with storage.lock(str(tmp_path)):
        pass


def test_an_unknown_url_scheme():
    with pytest.raises(StageError, match="no file system for this URL"):
        storage.read_bytes("nosuchscheme://bucket/file")
