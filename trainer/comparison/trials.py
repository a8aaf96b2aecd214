"""Runs the five routes side by side and measures their differences and their cost.

Each route runs in its own process, so that its first step and its memory are measured separately.
The routes are timed in turn, so that a slow minute of the machine affects all of them. Only these
processes import TensorFlow.
"""

import contextlib
import multiprocessing
import operator
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from pipeline.cli import quiet
from pipeline.cli.errors import StageError
from pipeline.cli.progress import Progress

BASE = "gradient_tape"  # the route that the others are compared with
NUM_STEPS = 50  # steps after which the weights are compared
IMAGE_SHAPE = (28, 28, 1)


class RouteResult(NamedTuple):
    """A route's numbers from the same weights, batches and noise."""

    terms: np.ndarray  # of the first step: loss, reconstruction_loss, kl
    gradients: list[np.ndarray]  # of the first step
    weights: list[np.ndarray]  # after NUM_STEPS


class Difference(NamedTuple):
    """Largest relative differences of a route from BASE."""

    loss: float
    reconstruction_loss: float
    kl: float
    gradients: float  # of any variable, relative to its largest gradient
    weights: float


class Cost(NamedTuple):
    """Time and memory of a route, medians of several rounds."""

    step_ms: float  # each further step of a call
    call_ms: float  # a call with one step, without the step
    first_step_secs: float  # the first call, without a later call's time: mainly tracing
    peak_mib: float  # of the GPU's memory, or of the process without a GPU
    ratio: float  # of step_ms to BASE's step_ms in the same round


def _blobs(count: int) -> np.ndarray:
    """Bright spots at random places on black, uint8 (count, *IMAGE_SHAPE).

    Gradients of random pixels would cancel, and only rounding errors would remain.
    """
    height, width, _ = IMAGE_SHAPE
    rows, columns = np.mgrid[:height, :width]
    y, x = np.random.default_rng(0).uniform(0, height, (2, count, 1, 1))
    spots = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 20)
    return np.round(255 * spots).astype(np.uint8)[..., np.newaxis]


class _Trial:
    """A route's model and steps, in the route's process."""

    def __init__(self, config: dict[str, Any], num_steps: int):
        quiet.import_tensorflow()
        from trainer.cluster import strategies
        from trainer.data import batches
        from trainer.model.networks import VAE
        from trainer.steps import training
        from trainer.steps.evaluation import Evaluator
        from trainer.steps.optimizer import Optimizer

        config = ml_collections.ConfigDict(config)
        # The last batch of the epoch is half full.
        self._steps_per_epoch = num_steps + 1
        count = num_steps * config.batch_size + max(1, config.batch_size // 2)
        images = _blobs(count)
        strategy = strategies.make(config)
        with strategy.scope():
            self._vae = VAE(config, IMAGE_SHAPE)
            self._optimizer = Optimizer(config, self._vae, total_steps=10**6)
        self._steps = training.make(Evaluator(config, strategy, self._vae), self._optimizer)
        split = self._steps.place(images, num_bytes=images.nbytes)
        self._visit = split.visit(batches.permutation(config.seed, 0, count))
        self._step = 0

    def train(self, num_steps: int) -> tuple[float, np.ndarray]:
        """Trains some steps; returns the seconds they took, and a row of means for each step."""
        rows, start_time = [], time.perf_counter()
        while num_steps:
            batch = self._step % self._steps_per_epoch
            count = int(min(num_steps, self._steps.max_steps, self._steps_per_epoch - batch))
            self._steps.train_some(
                self._visit,
                step=self._step,
                first_batch=batch,
                num_steps=count,
                on_rows=rows.extend,
            )
            self._step += count
            num_steps -= count
        rows = np.array(rows)
        return time.perf_counter() - start_time, rows[:, :-1] / rows[:, -1:]

    def start_epoch(self) -> None:
        """Skips the rest of an epoch, so that all timed batches are full."""
        self._step += -self._step % self._steps_per_epoch

    def gradients(self) -> list[np.ndarray]:
        """0.1 · the gradients of the first step: Adam's first moments after that step."""
        slots = self._optimizer.variables.items()
        return [slot.numpy() for name, slot in slots if name.endswith("_momentum")]

    def weights(self) -> list[np.ndarray]:
        """The current weights."""
        return [variable.numpy() for variable in self._vae.variables]

    def peak_mib(self) -> float:
        """The peak of memory use."""
        import tensorflow as tf

        gpus = [device.name for device in tf.config.list_logical_devices("GPU")]
        if gpus:
            return max(tf.config.experimental.get_memory_info(gpu)["peak"] for gpu in gpus) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _serve(connection, config: dict[str, Any], num_steps: int) -> None:
    trial = _Trial(config, num_steps)
    with contextlib.suppress(EOFError, OSError):  # The parent process has ended.
        while True:
            name, arguments = connection.recv()
            connection.send(getattr(trial, name)(*arguments))


@contextlib.contextmanager
def _trial_process(
    config: ml_collections.ConfigDict, num_steps: int
) -> Iterator[Callable[..., Any]]:
    """A process with a _Trial; gives a function (name of a method, *arguments) -> its result."""
    connection, child_connection = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(child_connection, config.to_dict(), num_steps), daemon=True
    )
    # The process inherits the ignored signal: Ctrl-C ends this process, whose end ends the other.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, handler)
    child_connection.close()

    def call(name: str, *arguments):
        try:
            connection.send((name, arguments))
            return connection.recv()
        except (EOFError, OSError) as error:
            process.join()
            raise StageError(
                f"kl_route {config.kl_route}: its process ended with status {process.exitcode}; if "
                "there is no error above, another program has killed it: check that the machine "
                "has enough memory for five processes"
            ) from error

    try:
        yield call
    finally:
        connection.close()
        process.join()


def _first_steps(call: Callable[..., Any]) -> tuple[RouteResult, float]:
    """The result of a new process, and the seconds of its first step."""
    secs, (terms,) = call("train", 1)
    gradients = call("gradients")
    call("train", NUM_STEPS - 1)
    return RouteResult(terms, gradients, call("weights")), secs


def _relative(array: np.ndarray, expected: np.ndarray) -> float:
    largest = np.abs(array - expected).max()
    return float(largest and largest / np.abs(expected).max())  # 0 / 0 counts as 0.


def difference(result: RouteResult, expected: RouteResult) -> Difference:
    """The largest differences between two results, relative to the largest value of each array."""

    def largest(arrays: list[np.ndarray], expected_arrays: list[np.ndarray]) -> float:
        return max(_relative(*pair) for pair in zip(arrays, expected_arrays, strict=True))

    terms = map(_relative, result.terms, expected.terms)
    return Difference(
        *terms,
        largest(result.gradients, expected.gradients),
        largest(result.weights, expected.weights),
    )


def run_on_two_replicas(
    config: ml_collections.ConfigDict, routes: Sequence[str]
) -> dict[str, RouteResult]:
    """Route -> result on two virtual replicas, one process after the other."""
    results = {}
    for route in routes:
        changed = _with(config, kl_route=route, num_virtual_devices=2)
        with _trial_process(changed, NUM_STEPS // 2) as call:
            results[route], _ = _first_steps(call)
    return results


def _with(config: ml_collections.ConfigDict, **changes) -> ml_collections.ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.update(changes)
    return changed


def compare(
    config: ml_collections.ConfigDict, routes: Sequence[str], *, num_steps: int, num_rounds: int
) -> tuple[dict[str, RouteResult], dict[str, Cost]]:
    """Results and costs of the routes; all processes exist at once and run in turn.

    Args:
      config: configs/mnist.py explains its keys; kl_route and data_dir are ignored.
      routes: names of the routes, BASE among them.
      num_steps: steps of a timed call, at least 2.
      num_rounds: number of timed calls of each route.
    """
    progress = Progress("timing", total=num_rounds, unit="rounds")
    results, first_secs, one_step_secs, many_step_secs = {}, {}, {}, {}
    with contextlib.ExitStack() as stack:
        calls = {
            route: stack.enter_context(_trial_process(_with(config, kl_route=route), num_steps))
            for route in routes
        }
        for route, call in calls.items():
            results[route], first_secs[route] = _first_steps(call)
            one_step_secs[route], many_step_secs[route] = [], []
        for number in range(num_rounds):
            progress.update(number)
            for route, call in calls.items():
                call("start_epoch")
                one_step_secs[route].append(call("train", 1)[0])
                call("start_epoch")
                many_step_secs[route].append(call("train", num_steps)[0])
        progress.close()
        peaks = {route: call("peak_mib") for route, call in calls.items()}
    median_secs = {route: statistics.median(secs) for route, secs in one_step_secs.items()}
    step_ms_by_round = {
        route: [
            1e3 * (secs - median_secs[route]) / (num_steps - 1) for secs in many_step_secs[route]
        ]
        for route in routes
    }
    costs = {}
    for route in routes:
        step_ms = statistics.median(step_ms_by_round[route])
        ratios = map(operator.truediv, step_ms_by_round[route], step_ms_by_round[BASE])
        costs[route] = Cost(
            step_ms=step_ms,
            ratio=statistics.median(ratios),
            call_ms=1e3 * median_secs[route] - step_ms,
            first_step_secs=first_secs[route] - median_secs[route],
            peak_mib=peaks[route],
        )
    return results, costs
