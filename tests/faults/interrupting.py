"""Trains in a process of its own and sends that process a signal at a chosen moment.

The processes are forked, so that each costs what the training costs and not the imports.
"""

import dataclasses
import functools
import importlib
import os
import pathlib
import threading

from tests import forked

# Phase of a run -> the function whose call begins it, as module, name.
PHASES = {
    "trace": ("trainer.model.objective", "terms"),
    "training": ("trainer.runs.run", "Run.train_steps"),
    "evaluation": ("trainer.steps.evaluation", "Evaluator.evaluate"),
    "report": ("trainer.runs.metrics", "JsonLines.append"),
    "checkpoint": ("pipeline.storage.files", "open_atomic"),
    "publishing": ("trainer.runs.publish", "_save"),
}
# The same while TensorFlow runs a step, which is the n-th of the run: no function of ours is
# called then, so the graph calls back.
STEP = "inside a step"
# The n-th step of a run by Keras' fit.
STEP_OF_FIT = "a step of fit"
# A call in the training loop that never returns; the signal comes twice.
STUCK = "stuck"
_OF_FIT = {STEP_OF_FIT: ("trainer.steps.keras_fit_steps", "_AfterEachStep.on_train_batch_begin")}


@dataclasses.dataclass(frozen=True)
class At:
    """When to send which signal: at the n-th call of a phase's function, 1 the first."""

    phase: str
    call: int
    number: int  # of the signal


def _send(at: At) -> None:
    os.kill(os.getpid(), at.number)


def _hook_step(at: At) -> None:
    import tensorflow as tf

    from trainer.steps import schedules

    original = schedules.beta

    def check(step: tf.Tensor) -> None:
        if step.numpy() == at.call - 1:
            _send(at)

    def beta(config, step):
        with tf.control_dependencies([tf.py_function(check, [step], [])]):
            return tf.identity(original(config, step))

    schedules.beta = beta


def _hook_stuck(at: At) -> None:
    from trainer.runs import run

    def stay(*_):
        _send(at)
        _send(at)
        threading.Event().wait()

    run.Run.train_steps = stay


def _hook_call(at: At) -> None:
    module, name = (PHASES | _OF_FIT)[at.phase]
    owner, calls = importlib.import_module(module), 0
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    @functools.wraps(original)
    def counting(*args, **kwargs):
        nonlocal calls
        if at.phase == "checkpoint" and "checkpoints" not in args[0]:
            return original(*args, **kwargs)
        calls += 1
        if calls == at.call:
            if at.phase == "checkpoint":
                # A half-written file, as a kill leaves it.
                path = pathlib.Path(args[0])
                path.with_name(f".writing-{path.name}-1").write_bytes(b"half")
            _send(at)
        return original(*args, **kwargs)

    setattr(owner, name, counting)


def _hook(at: At) -> None:
    {STEP: _hook_step, STUCK: _hook_stuck}.get(at.phase, _hook_call)(at)


def start(arguments: list[str], *, log: pathlib.Path, at: At | None = None):
    """Starts `python -m trainer.main` with arguments; returns the process, which can be joined."""
    prepare = functools.partial(_hook, at) if at else None
    log.unlink(missing_ok=True)
    return forked.start("trainer.main", *arguments, stdout=log, stderr=log, prepare=prepare)


def train(arguments: list[str], *, log: pathlib.Path, at: At | None = None) -> int:
    """The same to its end; returns the exit status, negative for the signal that ended it."""
    process = start(arguments, log=log, at=at)
    process.join()
    return process.exitcode
