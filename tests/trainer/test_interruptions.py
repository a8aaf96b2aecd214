"""Runs that are stopped or killed, and started again, against one that never was."""

import pathlib
import random
import re
import signal

import pytest

from tests.conftest import assert_same_run, smoke_config, state_of
from tests.faults.interrupting import PHASES, STEP, STUCK, At, train
from trainer.runs import train as train_lib

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
# The n-th call of a phase's function that is hit: in the middle of things where there are several.
CALL = {"training": 3, "report": 2, "checkpoint": 3}


def arguments(data_dir, workdir, *more) -> list[str]:
    """Flags of the run that the fixture `trained` has made, in another directory."""
    flags = ["--config=configs/smoke.py", "--config.batch_size=27", f"--workdir={workdir}"]
    return [*flags, f"--config.data_dir={data_dir}", *more]


def interrupt(data_dir, workdir, at: At, *more) -> str:
    """Runs until the signal ends it; returns what it has printed."""
    log = pathlib.Path(f"{workdir}.log")
    status = train(arguments(data_dir, workdir, *more), log=log, at=at)
    text = log.read_text()
    assert status == (-signal.SIGKILL if at.number == signal.SIGKILL else 75), text
    assert "Traceback" not in text
    return text


def matrix():
    """Every phase and signal; those where SIGINT only repeats SIGTERM are marked long."""
    for phase in (*PHASES, STEP):
        for number in SIGNALS:
            repeats = number == signal.SIGINT and phase != "training"
            marks = [pytest.mark.long] if repeats else []
            yield pytest.param(phase, number, marks=marks, id=f"{phase}-{number.name}")


@pytest.mark.parametrize(("phase", "number"), list(matrix()))
def test_interrupted_in_any_phase_and_started_again_it_ends_the_same(
    data_dir, trained, tmp_path, phase, number
):
    workdir = tmp_path / "run"
    text = interrupt(data_dir, workdir, At(phase, CALL.get(phase, 1), number))
    assert not (workdir / "export" / "manifest.json").exists()
    if number != signal.SIGKILL and phase not in ("trace", "publishing"):
        step = int(re.search(r"stopped by a signal at step (\d+) of 22, state saved", text)[1])
        assert state_of(workdir)["name"].item() == f"step-{step:010d}.npz"
    train_lib.train(smoke_config(data_dir), workdir=str(workdir))
    assert_same_run(workdir, trained)
    assert not list(workdir.rglob(".writing*"))


def test_killed_within_the_report_of_an_epoch_that_was_trained_before(data_dir, trained, tmp_path):
    workdir = tmp_path / "run"
    interrupt(data_dir, workdir, At("evaluation", 1, signal.SIGTERM))
    # What the next try leaves when it is killed between its first line and its second.
    first = (trained / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (workdir / "metrics.jsonl").write_text(first)
    train_lib.train(smoke_config(data_dir), workdir=str(workdir))
    assert_same_run(workdir, trained)


def test_a_signal_ends_a_long_call_after_its_step(data_dir, tmp_path):
    # 272 steps in one call of TensorFlow, a signal in the third.
    longer = ["--config.batch_size=1", "--config.steps_per_loop=1000", "--config.num_epochs=1"]
    at = At(STEP, 3, signal.SIGTERM)
    text = interrupt(
        data_dir, tmp_path / "run", at, *longer, "--config.checkpoint_every_steps=9999"
    )
    assert 3 <= int(re.search(r"stopped by a signal at step (\d+) of 272", text)[1]) < 200


def test_a_second_interrupt_leaves_at_once(data_dir, trained, tmp_path):
    text = interrupt(data_dir, tmp_path / "run", At(STUCK, 1, signal.SIGINT))
    assert "stopped at once; run the same command to resume" in text
    train_lib.train(smoke_config(data_dir), workdir=str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", trained)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL]
)
def test_two_replicas_resume_within_an_epoch_to_the_last_bit(data_dir, tmp_path, number):
    changes = {"num_virtual_devices": 2, "deterministic": True}
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "cut"
    assert train(arguments(data_dir, uninterrupted, *flags), log=tmp_path / "log") == 0
    interrupt(data_dir, interrupted, At("training", 3, number), *flags)
    assert train(arguments(data_dir, interrupted, *flags), log=tmp_path / "log") == 0
    assert_same_run(interrupted, uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_moments_again_and_again_it_ends_the_same(
    data_dir, trained, tmp_path, seed
):
    chance, workdir = random.Random(seed), tmp_path / "run"
    for _ in range(4):
        phase = chance.choice([*PHASES, STEP])
        at = At(phase, chance.randint(1, 5), chance.choice(SIGNALS))
        train(arguments(data_dir, workdir), log=tmp_path / "log", at=at)
    train_lib.train(smoke_config(data_dir), workdir=str(workdir))
    assert_same_run(workdir, trained)
