"""Times what waiting for the disk costs each stage, on the embedded digits: part of `make bench`.

    python -m tests.benchmarks.bench_sync [DIRECTORY]

DIRECTORY is on the disk to measure; by default where temporary files lie.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from pipeline.cli import quiet
from tests.benchmarks.timing import report, syncing
from tests.conftest import make_embeddings, make_shards

_ROUNDS = 3


def _count_syncs(run: Callable[[], object]) -> int:
    """The number of times that a function waits for the disk."""
    fsync, count = os.fsync, 0

    def counting(descriptor: int) -> None:
        nonlocal count
        count += 1
        fsync(descriptor)

    os.fsync = counting
    try:
        run()
    finally:
        os.fsync = fsync
    return count


def bench(what: str, work: Callable[[str], object], scratch: str) -> None:
    """Times a stage with and without waiting for the disk, in turn."""
    out = f"{scratch}/out"
    secs: dict[str, list[float]] = {"with": [], "without": []}

    def synced() -> None:
        with syncing():
            work(out)

    def timed(kind: str, run: Callable[[], object]) -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()  # What the round before has left to write is not this round's.
        started = time.perf_counter()
        run()
        secs[kind].append(time.perf_counter() - started)

    shutil.rmtree(out, ignore_errors=True)
    work(out)  # Traces and compiles.
    for _ in range(_ROUNDS):
        timed("with", synced)
        timed("without", lambda: work(out))
    shutil.rmtree(out)
    calls = _count_syncs(synced)
    ours, without = (statistics.median(secs[kind]) for kind in ("with", "without"))
    spread = statistics.median(abs(s - without) for s in secs["without"]) / without
    ratio, more = f"{ours / without:.2f} ×", f"{ours - without:+.2f} s, {calls} calls"
    report(what, more, ratio, f"the {without:.2f} s without fsync (which vary by {spread:.0%})")


def main() -> None:
    """Prints a line for each stage."""
    quiet.import_tensorflow()
    quiet.import_beam()
    from configs import mnist
    from trainer.runs import train

    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as scratch:
        shards, model_dir = f"{scratch}/shards", f"{scratch}/run/export"
        make_shards("sample", shards)
        config = mnist.get_config()
        config.update({"data_dir": shards, "num_epochs": 1})

        def run(workdir: str) -> None:
            train.train(config, workdir=workdir)

        run(f"{scratch}/run")
        bench("fsync: preprocess", lambda out: make_shards("sample", out), scratch)
        bench("fsync: train", run, scratch)
        bench("fsync: export", lambda out: make_embeddings(shards, model_dir, out), scratch)


if __name__ == "__main__":
    main()
