import os

import pytest

from pipeline import storage, trees
from pipeline.errors import StageError
from tests.object_stores import BUCKET


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


def test_a_path_is_no_pattern(place):
    for name in ("run1", "run2", "run?", "run[1]", "*"):
        storage.make_dirs(storage.join(place, name))
        storage.write_bytes(storage.join(place, name, "file"), b"1")
    for name in ("run?", "run[1]", "*"):
        storage.remove(storage.join(place, name, "file"))
        storage.write_bytes(storage.join(place, name, "other"), b"1")
        storage.remove(storage.join(place, name))
        assert not storage.exists(storage.join(place, name, "other"))
        assert storage.read_bytes(storage.join(place, "run1", "file")) == b"1"
        assert storage.read_bytes(storage.join(place, "run2", "file")) == b"1"


def test_each_gives_what_all_give_in_order_or_the_first_failure(place):
    def double(name: str) -> str:
        storage.write_bytes(storage.join(place, name), name.encode())
        return 2 * storage.read_bytes(storage.join(place, name)).decode()

    names = [f"{number:02d}" for number in range(50)]
    assert storage.each(place, double, names) == [2 * name for name in names]
    assert storage.list_names(place) == names

    def remove(name: str) -> None:
        if name in ("07", "09"):
            raise StageError(name)
        storage.remove(storage.join(place, name))

    with pytest.raises(StageError, match="07"):
        storage.each(place, remove, names)
    assert {"07", "09"} <= set(storage.list_names(place))


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
    trees.publish_tree(str(tree), storage.join(place, "copy"))
    assert [*trees.read_tree(storage.join(place, "copy")).stamps] == ["deep/deeper/leaf", "top"]
    assert storage.read_bytes(storage.join(place, "copy", "top")) == b"1"
    assert storage.read_bytes(storage.join(place, "copy", "deep", "deeper", "leaf")) == b"2"


def test_a_file_moves_in_place_of_another(place):
    storage.make_dirs(place)
    first, second = storage.join(place, "first"), storage.join(place, "second")
    storage.write_bytes(first, b"1")
    storage.write_bytes(second, b"2")
    storage.move(first, second)
    assert storage.list_names(place) == ["second"]
    assert storage.read_bytes(second) == b"1"


def test_a_file_is_read_in_pieces(place):
    storage.make_dirs(place)
    path = storage.join(place, "lines")
    lines = [b"%d\n" % number for number in range(500_000)]  # More than is fetched at once.
    storage.write_bytes(path, b"".join(lines))
    with storage.open_read(path) as file:
        assert list(file) == lines
        file.seek(-len(lines[-1]), os.SEEK_END)
        assert file.read() == lines[-1]
        file.seek(2)
        assert (file.read(2), file.tell()) == (b"1\n", 4)


def test_a_slash_too_few():
    with pytest.raises(StageError, match="gs:/bucket/x: is no URL.*expected two slashes"):
        storage.make_dirs("gs:/bucket/x")


def test_an_unknown_url_scheme():
    with pytest.raises(StageError, match="no file system for this URL"):
        storage.read_bytes("nosuchscheme://bucket/file")
