import errno
import os

import pytest

from pipeline.cli.errors import StageError
from pipeline.storage import files, trees
from tests.storage.object_stores import BUCKET


@pytest.fixture(params=["local", "memory", "gs"])
def place(request, tmp_path):
    """A local directory, and URLs of file systems that are none."""
    if request.param == "local":
        return str(tmp_path)
    if request.param == "gs":
        request.getfixturevalue("object_store")
        return f"gs://{BUCKET}/{tmp_path.name}"
    return f"memory://{tmp_path.name}"


def test_files_come_and_go(place):
    path = files.join(place, "a", "b.txt")
    assert not files.exists(path)
    assert files.list_names(place) == []
    files.make_dirs(files.join(place, "a"))
    files.write_bytes(path, b"first")
    files.write_bytes(path, b"second")
    assert files.read_bytes(path) == b"second"
    assert files.num_bytes(path) == 6
    assert files.is_dir(files.join(place, "a"))
    assert files.list_names(files.join(place, "a")) == ["b.txt"]
    files.remove(files.join(place, "a"))
    files.remove(path)
    assert not files.exists(path)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(path)


def test_a_path_is_no_pattern(place):
    for name in ("run1", "run2", "run?", "run[1]", "*"):
        files.make_dirs(files.join(place, name))
        files.write_bytes(files.join(place, name, "file"), b"1")
    for name in ("run?", "run[1]", "*"):
        files.remove(files.join(place, name, "file"))
        files.write_bytes(files.join(place, name, "other"), b"1")
        files.remove(files.join(place, name))
        assert not files.exists(files.join(place, name, "other"))
        assert files.read_bytes(files.join(place, "run1", "file")) == b"1"
        assert files.read_bytes(files.join(place, "run2", "file")) == b"1"


def test_each_gives_what_all_give_in_order_or_the_first_failure(place):
    def double(name: str) -> str:
        files.write_bytes(files.join(place, name), name.encode())
        return 2 * files.read_bytes(files.join(place, name)).decode()

    names = [f"{number:02d}" for number in range(50)]
    assert files.each(place, double, names) == [2 * name for name in names]
    assert files.list_names(place) == names

    def remove(name: str) -> None:
        if name in ("07", "09"):
            raise StageError(name)
        files.remove(files.join(place, name))

    with pytest.raises(StageError, match="07"):
        files.each(place, remove, names)
    assert {"07", "09"} <= set(files.list_names(place))


def test_a_failed_write_leaves_what_was_there(place):
    files.make_dirs(place)
    path = files.join(place, "file")
    files.write_bytes(path, b"before")
    with pytest.raises(RuntimeError, match="half-way"):
        with files.open_atomic(path) as file:
            file.write(b"after")
            raise RuntimeError("half-way")
    assert files.read_bytes(path) == b"before"
    assert files.list_names(place) == ["file"]


def test_trees_go_there_and_back(place, tmp_path):
    tree = tmp_path / "tree"
    (tree / "deep" / "deeper").mkdir(parents=True)
    (tree / "top").write_bytes(b"1")
    (tree / "deep" / "deeper" / "leaf").write_bytes(b"2")
    trees.copy_tree(str(tree), files.join(place, "copy"))
    assert [*trees.read_tree(files.join(place, "copy")).stamps] == ["deep/deeper/leaf", "top"]
    assert files.read_bytes(files.join(place, "copy", "top")) == b"1"
    assert files.read_bytes(files.join(place, "copy", "deep", "deeper", "leaf")) == b"2"


def test_a_file_is_linked_in_place_of_another(place):
    files.make_dirs(place)
    first, second = files.join(place, "first"), files.join(place, "second")
    files.write_bytes(first, b"1")
    files.write_bytes(second, b"2")
    for _ in range(2):  # The second time it is linked already.
        files.link(first, second)
        assert files.list_names(place) == ["first", "second"]
        assert files.read_bytes(second) == b"1"
    files.write_bytes(first, b"3")  # A file is replaced, and not written into.
    assert files.read_bytes(second) == b"1"
    with pytest.raises(FileNotFoundError):
        files.link(files.join(place, "nothing"), second)
    assert files.list_names(place) == ["first", "second"]


def test_a_file_is_copied_from_a_disk_to_a_store(place, tmp_path):
    (tmp_path / "first").write_bytes(b"1")
    files.make_dirs(place)
    files.link(str(tmp_path / "first"), files.join(place, "second"))
    files.link(files.join(place, "second"), str(tmp_path / "third"))
    assert (tmp_path / "third").read_bytes() == b"1"


def test_a_file_is_read_in_pieces(place):
    files.make_dirs(place)
    path = files.join(place, "lines")
    lines = [b"%d\n" % number for number in range(500_000)]  # More than is fetched at once.
    files.write_bytes(path, b"".join(lines))
    with files.open_read(path) as file:
        assert list(file) == lines
        file.seek(-len(lines[-1]), os.SEEK_END)
        assert file.read() == lines[-1]
        file.seek(2)
        assert (file.read(2), file.tell()) == (b"1\n", 4)


def test_a_slash_too_few():
    with pytest.raises(StageError, match="gs:/bucket/x: is no URL.*expected two slashes"):
        files.make_dirs("gs:/bucket/x")


def test_an_unknown_url_scheme():
    with pytest.raises(StageError, match="no file system for this URL"):
        files.read_bytes("nosuchscheme://bucket/file")


def test_nothing_waits_for_the_disk_if_told_so(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(os, "fsync", waits.append)
    path, url = str(tmp_path / "new" / "file"), f"memory://{tmp_path.name}/file"

    def write() -> None:
        files.make_dirs(os.path.dirname(path))
        files.write_bytes(path, b"1")
        files.sync(str(tmp_path), str(tmp_path / "missing"), str(tmp_path))
        files.write_bytes(url, b"1")
        files.sync(os.path.dirname(url))

    monkeypatch.setenv("VAE_NOSYNC", "1")
    write()
    assert not waits
    files.remove(os.path.dirname(path))
    monkeypatch.delenv("VAE_NOSYNC")
    write()
    assert len(waits) == 3  # The parent of the new directory, the file, the directory.


def test_a_disk_that_fails_to_sync_fails_the_write(tmp_path, monkeypatch):
    monkeypatch.delenv("VAE_NOSYNC", raising=False)
    path = str(tmp_path / "file")
    files.write_bytes(path, b"before")

    def failing_with(number: int):
        def fail(_: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fail)

    failing_with(errno.ENOSPC)
    with pytest.raises(StageError, match="file: No space left on device; free some space"):
        files.write_bytes(path, b"after")
    failing_with(errno.EIO)
    with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
        files.write_bytes(path, b"after")
    assert files.read_bytes(path) == b"before"
    assert files.list_names(str(tmp_path)) == ["file"]
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}'"):
        files.sync(str(tmp_path))
    failing_with(errno.EINVAL)  # A file system that syncs no directories.
    files.sync(str(tmp_path))
