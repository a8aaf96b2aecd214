"""What happens when a file system fails: with one of fsspec's own that fails when it is told to."""

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.cli.errors import StageError
from pipeline.storage import files, retries


class Failing(MemoryFileSystem):
    """Files in memory; as many of its calls fail as there are errors left."""

    protocol = "failing"
    store: dict = {}
    pseudo_dirs = [""]
    errors: list[Exception] = []

    def _fail(self):
        if self.errors:
            raise self.errors.pop(0)

    def cat_file(self, *args, **kwargs):
        self._fail()
        return super().cat_file(*args, **kwargs)

    def put_file(self, *args, **kwargs):
        super().put_file(*args, **kwargs)
        self._fail()  # When it has had its effect.

    def _open(self, *args, **kwargs):
        self._fail()
        file = super()._open(*args, **kwargs)
        read = file.read

        def failing(*args):
            self._fail()
            return read(*args)

        file.read = failing
        return file


class HttpError(Exception):
    def __init__(self, code):
        super().__init__(f"status {code}")
        self.code = code


@pytest.fixture(autouse=True)
def failing(monkeypatch):
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(retries, "_FIRST_PAUSE_SECS", 1e-4)
    monkeypatch.setattr(retries, "_LONGEST_PAUSE_SECS", 1e-3)
    Failing.errors.clear()
    files.write_bytes("failing://there", b"these bytes")


PASSING = [ConnectionResetError("reset"), HttpError(503), HttpError("429"), TimeoutError()]


def test_what_fails_for_a_moment_is_tried_again(failing):
    Failing.errors[:] = PASSING * 3
    assert files.read_bytes("failing://there") == b"these bytes"
    assert not Failing.errors
    Failing.errors[:] = PASSING * 3
    files.write_bytes("failing://there", b"others")
    assert not Failing.errors
    assert files.read_bytes("failing://there") == b"others"


def test_a_file_goes_on_where_reading_has_failed(failing, monkeypatch):
    monkeypatch.setattr(files, "_READ_AT_ONCE", 2)
    with files.open_read("failing://there") as file:
        assert file.read(3) == b"the"
        Failing.errors[:] = PASSING
        assert file.read(4) == b"se b"
        assert not Failing.errors
        assert file.read() == b"ytes"


@pytest.mark.parametrize(
    "error", [HttpError(401), HttpError(400), PermissionError("no"), OSError("Forbidden: it")]
)
def test_what_is_refused_is_not_tried_again(failing, error):
    Failing.errors[:] = [error, error]
    with pytest.raises(StageError, match="failing://there: .*check the URL and the credentials"):
        files.read_bytes("failing://there")
    assert len(Failing.errors) == 1


def test_what_is_not_there_is_an_answer(failing):
    with pytest.raises(FileNotFoundError):
        files.read_bytes("failing://nowhere")


def test_patience_ends(failing, monkeypatch):
    monkeypatch.setattr(retries, "_PATIENCE_SECS", 0.01)
    Failing.errors[:] = [ConnectionResetError("reset by the peer")] * 1000
    with pytest.raises(
        StageError, match=r"failing://there: the storage has failed for 0 s: .*reset by the peer"
    ):
        files.read_bytes("failing://there")
    assert len(Failing.errors) > 900
