"""A worker of a cluster that hangs ends, and says where it hangs."""

import os

import pytest

from tests.engines.processes import free_ports
from tests.trainer.test_cluster import flags_of, start
from trainer.cluster import watchdog

# Four seconds in place of two minutes, and calls of one step.
QUICK = """
import json, os, threading
from pipeline.cli import quiet
quiet.import_tensorflow()
import tensorflow as tf
from trainer.cluster import watchdog
from trainer.runs import checkpoints
from trainer.steps.evaluation import Evaluator
from trainer.steps.tape_steps import TapeSteps

watchdog._TICK_SECS, watchdog._LEAST_TICKS, watchdog._FIRST_TICKS = 0.02, 200, 6000
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
"""
RUN = """
from trainer import main
main.main()
"""
HANG = """
def hang(number):
    if index == 1 and number == 7:
        threading.Event().wait()
    return number

def hanging(method):
    def run(self, records, batch, number):
        number = tf.py_function(hang, [number], tf.int32)
        number.set_shape(())
        return method(self, records, batch, number)
    return run
"""


def run_two(program: str, data_dir, workdir, *flags: str) -> list[tuple[int, str]]:
    """Exit status and standard error of the two workers of a cluster, which run a program."""
    addresses = [f"localhost:{port}" for port in free_ports(2)]
    flags = (*flags_of(data_dir, workdir), "--config.steps_per_loop=1", *flags)
    workers = [start(["-c", QUICK + program + RUN], n, addresses, *flags) for n in range(2)]
    outputs = [worker.communicate()[1] for worker in workers]
    return [(w.returncode, output) for w, output in zip(workers, outputs, strict=True)]


@pytest.mark.parametrize(
    ("patch", "name"),
    [
        ("TapeSteps._train_batch = hanging(TapeSteps._train_batch)", "training steps"),
        pytest.param(
            "Evaluator._evaluate_batch = hanging(Evaluator._evaluate_batch)",
            "evaluation on test",
            marks=pytest.mark.long,
        ),
    ],
    ids=["training", "evaluation"],
)
def test_a_worker_that_hangs_ends_both_with_75(data_dir, tmp_path, patch, name):
    # Small batches, of which the split test has more than seven.
    ends = run_two(HANG + patch, data_dir, tmp_path, "--config.batch_size=4")
    assert [status for status, _ in ends] == [75, 75], ends
    stderr = ends[1][1]
    assert f"train: a call of {name} has not returned in 4 s (usually " in stderr
    assert "start the job again, and it resumes from the newest checkpoint" in stderr
    assert " in hang\n" in stderr, stderr  # The stack of the thread that hangs.


def test_workers_wait_for_a_slow_checkpoint_of_the_chief(data_dir, tmp_path):
    # The first checkpoint takes the chief longer than a call may last, in ticks of the other.
    os.mkfifo(tmp_path / "fifo")
    slow = f"""
began, fifo = {str(tmp_path / "began")!r}, {str(tmp_path / "fifo")!r}
save, tick, end, num_ticks = checkpoints.save, watchdog.Watchdog._tick, watchdog._end, 0

def slow_save(*args, **kwargs):
    checkpoints.save = save
    open(began, "w").close()
    open(fifo).read()
    save(*args, **kwargs)

def counting_tick(self):
    global num_ticks
    num_ticks += os.path.exists(began)
    if num_ticks == 250:
        open(fifo, "w").close()
    tick(self)

def releasing_end(*args):
    open(fifo, "w").close()
    end(*args)

if index == 0:
    checkpoints.save = slow_save
else:
    watchdog.Watchdog._tick, watchdog._end = counting_tick, releasing_end
"""
    ends = run_two(slow, data_dir, tmp_path / "run", "--config.num_epochs=1")
    assert [status for status, _ in ends] == [0, 0], ends


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def dog(monkeypatch):
    """A watchdog whose ticks come from the test, and whose end raises Ended."""

    def end(_: int) -> None:
        raise Ended

    monkeypatch.setattr(watchdog.threading.Thread, "start", lambda _: None)
    monkeypatch.setattr(watchdog.command, "end_at_once", end)
    return watchdog.Watchdog()


def watch(dog, num_ticks: int, *, num_batches: int = 1) -> None:
    with dog.watch("a call", num_batches):
        for _ in range(num_ticks):
            dog._tick()


def test_a_call_may_take_two_minutes_or_thirty_times_the_median(dog, monkeypatch, capfd):
    now = 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    watch(dog, 1800)  # A first call.
    watch(dog, 120)
    with pytest.raises(Ended):
        watch(dog, 121)
    assert "a call has not returned in 121 s (usually 0.0 s)" in capfd.readouterr().err

    other = type(dog)()
    for secs in (10.0, 10.0, 1e6):  # The clock of a machine that was suspended tells much later.
        with other.watch("a call", 2):
            now += secs
    watch(other, 30 * 5 * 3, num_batches=3)
    with pytest.raises(Ended):
        watch(other, 30 * 5 * 3 + 1, num_batches=3)


def test_ticks_between_calls_count_for_none(dog):
    watch(dog, 0)
    for _ in range(10_000):
        dog._tick()
    watch(dog, 120)
