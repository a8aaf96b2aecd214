import contextlib
import errno
import json
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest

from pipeline.cli.errors import StageError
from pipeline.storage import files
from pipeline.storage import lease as lease_lib
from pipeline.storage import lock as lock_lib
from tests.conftest import REPOSITORY
from tests.faults import without_locks
from tests.forked import run_command
from tests.storage.object_stores import BUCKET

HOLD = """
import sys
from pipeline.storage import lease, lock
lease._BEAT_SECS = float(sys.argv[2])
with lock.hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def quick(monkeypatch):
    """Tenths of seconds in place of seconds."""
    monkeypatch.setattr(lease_lib, "_BEAT_SECS", 0.1)
    monkeypatch.setattr(lease_lib, "_LEASE_SECS", 1.0)
    monkeypatch.setattr(lease_lib, "_LOOK_EVERY_SECS", 0.05)


@pytest.fixture(params=["local", "gs"])
def place(request, tmp_path):
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("object_store")
    return f"gs://{BUCKET}/{tmp_path.name}"


@contextlib.contextmanager
def held_elsewhere(place, beat_secs=0.1):
    """Another process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, place, str(beat_secs)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def another_host(place, **changes):
    """The lease of a process of another host, which this one knows nothing of."""
    lease = {**lease_lib._this_process(), "nonce": "1", "beats": 1, "host": "elsewhere"}
    files.write_bytes(files.join(place, ".lock"), json.dumps(lease | changes).encode())


def test_one_at_a_time_until_it_ends_or_dies(place, quick):
    with held_elsewhere(place) as holder:
        with pytest.raises(StageError, match="another process is writing here"):
            with lock_lib.hold(place):
                pass
        holder.stdin.close()
        assert holder.wait() == 0
        with lock_lib.hold(place):
            pass
    with held_elsewhere(place) as holder:
        holder.kill()
        holder.wait()
        with lock_lib.hold(place):
            pass


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in without_locks.NUMBERS,
    reason="has the number of flock for other systems only",
)
@pytest.mark.parametrize(
    "error", [errno.ENOLCK, pytest.param(errno.ENOSYS, marks=pytest.mark.long)]
)
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, error):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--source=sample", "--output_dir=~/out"]
    done = run_command(
        "tests.faults.without_locks", error, "pipeline.preprocess", *flags, check=False
    )
    assert done.returncode == 1, done.stderr
    message = f"preprocess: {tmp_path}/out: its file system has no locks ({os.strerror(error)})"
    assert done.stderr.startswith(message)
    assert "expected a file system with flock: for NFS start the lock daemon" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_dead_process_of_this_machine_costs_no_waiting(object_store, capfd):
    place = f"gs://{BUCKET}/dead"
    with held_elsewhere(place, 1000) as holder:
        holder.kill()
        holder.wait()
        with lock_lib.hold(place):
            assert "waiting" not in capfd.readouterr().err
    assert not files.list_names(place)


def test_a_lease_of_another_host_runs_out(object_store, quick, capfd):
    place = f"gs://{BUCKET}/lease"
    another_host(place)
    with lock_lib.hold(place):
        assert "of elsewhere; waiting up to 1 s for a sign of life" in capfd.readouterr().err
    assert not files.list_names(place)


def test_a_lease_that_is_renewed_is_left_alone(object_store, quick):
    place, ended = f"gs://{BUCKET}/renewed", threading.Event()

    def live() -> None:
        beats = 0
        while not ended.wait(0.1):
            another_host(place, beats=(beats := beats + 1))

    another_host(place)
    holder = threading.Thread(target=live)
    holder.start()
    try:
        with pytest.raises(StageError, match=r"writing here \(process \d+ of elsewhere\)"):
            with lock_lib.hold(place):
                pass
    finally:
        ended.set()
        holder.join()
    assert files.list_names(place) == [".lock"]


def test_a_process_whose_lease_was_taken_ends(object_store):
    place = f"gs://{BUCKET}/taken"
    with held_elsewhere(place) as holder:
        another_host(place)
        assert holder.wait() == 1
        assert b"of elsewhere has taken over; stopped" in holder.stderr.read()
    lock = json.loads(files.read_bytes(files.join(place, ".lock")))
    assert lock["host"] == "elsewhere"


@pytest.mark.parametrize("turn", range(3))
def test_of_many_that_find_a_dead_holder_one_gets_in(object_store, quick, turn):
    place, inside, most = f"gs://{BUCKET}/many-{turn}", 0, []
    another_host(place, host=platform.node(), pid="0")  # Of this one, and dead.
    together, counting = threading.Barrier(6), threading.Lock()

    def enter() -> None:
        nonlocal inside
        together.wait()
        with contextlib.suppress(StageError), lock_lib.hold(place):
            with counting:
                inside += 1
                most.append(inside)
            files.list_names(place)  # As long as a request takes.
            with counting:
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert not files.list_names(place)


def test_a_process_whose_lease_is_gone_ends(object_store):
    # Whoever took it over while this process was stopped may have come to its end by now.
    place = f"gs://{BUCKET}/gone"
    with held_elsewhere(place) as holder:
        holder.send_signal(signal.SIGSTOP)
        files.remove(files.join(place, ".lock"))
        holder.send_signal(signal.SIGCONT)
        assert holder.wait() == 1
        assert b"another process has taken over; stopped" in holder.stderr.read()
    assert not files.list_names(place)


def test_a_created_lease_whose_answer_was_lost_is_ours(object_store, quick):
    place = f"gs://{BUCKET}/lost"

    def lose(request):
        return "lose" if request.method == "POST" and request.number < 3 else None

    with object_store.deciding(lose):
        with lock_lib.hold(place):
            pass
    assert not files.list_names(place)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"pid": "x"}'])
def test_a_lease_that_says_nothing_runs_out_too(object_store, quick, damage):
    place = f"gs://{BUCKET}/damaged-{len(damage)}"
    files.write_bytes(files.join(place, ".lock"), damage)
    with lock_lib.hold(place):
        assert os.getpid()
    assert not files.list_names(place)
