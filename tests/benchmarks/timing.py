"""How the benchmarks take times: in turn, and as ratios from one run.

Single times say more about the machine than about the code. tests/conftest.py sets VAE_NOSYNC, so
neither side waits for the disk but in `syncing`.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator

from pipeline.storage import files

_ROUNDS = 5


@contextlib.contextmanager
def syncing() -> Iterator[None]:
    """Lets this process wait for the disk while the block runs."""
    value = os.environ.pop(files.NOSYNC, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[files.NOSYNC] = value


def median_secs(*runs: Callable[[], object], rounds: int = _ROUNDS) -> list[float]:
    """Median seconds of each of several functions, called in turn."""
    secs = [[] for _ in runs]
    for _ in range(rounds):
        for taken, run in zip(secs, runs, strict=True):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in secs]


def report(what: str, measured: str, ratio: str, against: str) -> None:
    """Prints a line of the table."""
    print(f"{what:<20}{measured:>18}  {ratio:>9} {against}", flush=True)
