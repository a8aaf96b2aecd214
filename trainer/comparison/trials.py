"""Five routes side by side: how far apart their numbers are, and what each of them costs.

Each route lives in a process of its own, so that its first step and its memory are its own
too; they are timed in turn, so that a slow minute of the machine hits all of them alike.
Nothing here imports TensorFlow before such a process has begun.
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

BASE = "gradient_tape"
NUM_STEPS = 50  # after which the weights are compared
IMAGE_SHAPE = (28, 28, 1)


class Proof(NamedTuple):
    """What a route makes of the same weights, batches and noise."""

    terms: np.ndarray  # of the first step: loss, reconstruction_loss, kl
    gradients: list[np.ndarray]  # of the first step
    weights: list[np.ndarray]  # after NUM_STEPS


class Difference(NamedTuple):
    """Largest relative differences of a route from BASE."""

    loss: float
    reconstruction_loss: float
    kl: float
    gradients: float  # of any variable, relative to its largest
    weights: float


class Cost(NamedTuple):
    """What a route takes, the median of several rounds."""

    step_ms: float  # each further step of a call
    call_ms: float  # a call with one step, but for the step
    first_step_secs: float  # the first call of all, but for a later one: above all to trace
    peak_mib: float  # of the GPU's memory, or of the process where there is none
    ratio: float  # of step_ms to that of BASE in the same round


def _blobs(count: int) -> np.ndarray:
    """Bright spots at random places on black, uint8 (count, *IMAGE_SHAPE).

    Pixels of pure noise would not do: their gradients cancel, and what is left is rounding.
    """
    height, width, _ = IMAGE_SHAPE
    rows, columns = np.mgrid[:height, :width]
    y, x = np.random.default_rng(0).uniform(0, height, (2, count, 1, 1))
    spots = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 20)
    return np.round(255 * spots).astype(np.uint8)[..., np.newaxis]


class _Trial:
    """A route's model and steps; lives in the route's process."""

    def __init__(self, config: dict[str, Any], num_steps: int):
        quiet.import_tensorflow()
        from trainer.cluster import strategies
        from trainer.data import batches
        from trainer.model.networks import VAE
        from trainer.steps import keras_fit_steps
        from trainer.steps.optimizer import Optimizer

        config = ml_collections.ConfigDict(config)
        # The last batch of the epoch is half a batch.
        self._epoch = num_steps + 1
        count = num_steps * config.batch_size + max(1, config.batch_size // 2)
        images = _blobs(count)
        strategy = strategies.make(config)
        with strategy.scope():
            self._vae = VAE(config, IMAGE_SHAPE)
            self._optimizer = Optimizer(config, self._vae, total_steps=10**6)
        self._steps = keras_fit_steps.make(config, strategy, self._vae, self._optimizer)
        placed = self._steps.place("train", images, num_bytes=images.nbytes)
        self._visit = placed.visit(batches.permutation(config.seed, 0, count))
        self._step = 0

    def train(self, num_steps: int) -> tuple[float, np.ndarray]:
        """Goes on for some steps; returns seconds and a row of means for each step."""
        rows, started = [], time.perf_counter()
        while num_steps:
            batch = self._step % self._epoch
            count = int(min(num_steps, self._steps.max_steps, self._epoch - batch))
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
        return time.perf_counter() - started, rows[:, :-1] / rows[:, -1:]

    def start_epoch(self) -> None:
        """Skips what is left of an epoch, so that all timed batches are whole."""
        self._step += -self._step % self._epoch

    def gradients(self) -> list[np.ndarray]:
        """The first step's: from nothing Adam's first moment comes to 0.1 · gradient."""
        slots = self._optimizer.variables.items()
        return [slot.numpy() for name, slot in slots if name.endswith("_momentum")]

    def weights(self) -> list[np.ndarray]:
        """The present ones."""
        return [variable.numpy() for variable in self._vae.variables]

    def peak_mib(self) -> float:
        """The most memory that was in use."""
        import tensorflow as tf

        gpus = [device.name for device in tf.config.list_logical_devices("GPU")]
        if gpus:
            return max(tf.config.experimental.get_memory_info(gpu)["peak"] for gpu in gpus) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _serve(connection, config: dict[str, Any], num_steps: int) -> None:
    trial = _Trial(config, num_steps)
    with contextlib.suppress(EOFError, OSError):  # The other end is gone.
        while True:
            name, arguments = connection.recv()
            connection.send(getattr(trial, name)(*arguments))


@contextlib.contextmanager
def _started(config: ml_collections.ConfigDict, num_steps: int) -> Iterator[Callable[..., Any]]:
    """A process with a _Trial; gives (name of a method, *arguments) -> what it returns."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(there, config.to_dict(), num_steps), daemon=True
    )
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Which the process inherits:
    process.start()  # Ctrl-C is for this one, whose end ends the other.
    signal.signal(signal.SIGINT, interrupt)
    there.close()

    def call(name: str, *arguments):
        try:
            here.send((name, arguments))
            return here.recv()
        except (EOFError, OSError) as error:
            process.join()
            raise StageError(
                f"kl_route {config.kl_route}: its process ended with status {process.exitcode}; if "
                "no error stands above, something has killed it: is there memory for five?"
            ) from error

    try:
        yield call
    finally:
        here.close()
        process.join()


def _prove(call: Callable[..., Any]) -> tuple[Proof, float]:
    """The proof of a new process, and the seconds of its first step."""
    secs, (terms,) = call("train", 1)
    gradients = call("gradients")
    call("train", NUM_STEPS - 1)
    return Proof(terms, gradients, call("weights")), secs


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    largest = np.abs(found - expected).max()
    return float(largest and largest / np.abs(expected).max())  # Nothing from nothing is nothing.


def difference(found: Proof, expected: Proof) -> Difference:
    """Largest relative differences between two proofs; of an array, relative to its largest."""

    def largest(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
        return max(_relative(*pair) for pair in zip(ours, theirs, strict=True))

    terms = map(_relative, found.terms, expected.terms)
    return Difference(
        *terms,
        largest(found.gradients, expected.gradients),
        largest(found.weights, expected.weights),
    )


def on_two_replicas(config: ml_collections.ConfigDict, routes: Sequence[str]) -> dict[str, Proof]:
    """Route -> proof on two virtual replicas, one process after the other."""
    proofs = {}
    for route in routes:
        two = _with(config, kl_route=route, num_virtual_devices=2)
        with _started(two, NUM_STEPS // 2) as call:
            proofs[route], _ = _prove(call)
    return proofs


def _with(config: ml_collections.ConfigDict, **changes) -> ml_collections.ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.update(changes)
    return changed


def compare(
    config: ml_collections.ConfigDict, routes: Sequence[str], *, num_steps: int, num_rounds: int
) -> tuple[dict[str, Proof], dict[str, Cost]]:
    """Proofs and costs of the routes, whose processes live side by side and work in turn.

    Args:
      config: as configs/mnist.py explains; its kl_route and data_dir do not matter.
      routes: their names, BASE among them.
      num_steps: of a timed call, at least 2.
      num_rounds: how often each route is timed.
    """
    progress = Progress("timing", total=num_rounds, unit="rounds")
    proofs, first, ones, manys = {}, {}, {}, {}
    with contextlib.ExitStack() as stack:
        calls = {
            route: stack.enter_context(_started(_with(config, kl_route=route), num_steps))
            for route in routes
        }
        for route, call in calls.items():
            proofs[route], first[route] = _prove(call)
            ones[route], manys[route] = [], []
        for number in range(num_rounds):
            progress.update(number)
            for route, call in calls.items():
                call("start_epoch")
                ones[route].append(call("train", 1)[0])
                call("start_epoch")
                manys[route].append(call("train", num_steps)[0])
        progress.close()
        peaks = {route: call("peak_mib") for route, call in calls.items()}
    one = {route: statistics.median(secs) for route, secs in ones.items()}
    by_round = {
        route: [1e3 * (secs - one[route]) / (num_steps - 1) for secs in manys[route]]
        for route in routes
    }
    costs = {}
    for route in routes:
        step_ms = statistics.median(by_round[route])
        ratios = map(operator.truediv, by_round[route], by_round[BASE])
        costs[route] = Cost(
            step_ms=step_ms,
            ratio=statistics.median(ratios),
            call_ms=1e3 * one[route] - step_ms,
            first_step_secs=first[route] - one[route],
            peak_mib=peaks[route],
        )
    return proofs, costs
