"""Times how long training waits for its checkpoints, on local disk and on gs://.

    python -m tests.benchmarks.bench_checkpoints DATA_DIR [DIRECTORY]

DATA_DIR is a data set. DIRECTORY is on the disk to measure; by default where temporary files lie.
The store is fake-gcs-server on this machine, so a request costs no way there and back.
"""

import os
import sys
import tempfile
import time

from pipeline.cli import quiet
from tests.benchmarks.timing import report, syncing
from tests.storage import object_stores

_NUM_EPOCHS = 3


def bench(where: str, data_dir: str, workdir: str) -> None:
    """Trains configs/mnist.py for some epochs and prints the share of the time in checkpoints."""
    from configs import mnist
    from trainer.runs import train
    from trainer.runs.run import Run

    config = mnist.get_config()
    config.update(data_dir=data_dir, num_epochs=_NUM_EPOCHS)
    save, all_secs = Run.save, []

    def timed_save(run: Run) -> str:
        began = time.perf_counter()
        path = save(run)
        all_secs.append(time.perf_counter() - began)
        return path

    Run.save = timed_save
    began = time.perf_counter()
    with syncing():
        train.train(config, workdir=workdir)
    total = time.perf_counter() - began
    Run.save = save
    each = ", ".join(f"{secs * 1e3:.0f}" for secs in all_secs)
    report(f"{where}", f"{each} ms", f"{sum(all_secs) / total:.2%}", f"of {total:.0f} s")


def main(data_dir: str, directory: str | None = None) -> int:
    """Measures local disk, then gs://."""
    quiet.import_tensorflow()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        bench("local disk", data_dir, f"{scratch}/run")
        program = object_stores.find_server()
        if not program:
            print("bench_checkpoints: no fake-gcs-server; expected one by make fake-gcs-server")
            return 1
        with object_stores.running(program) as store:
            os.environ["STORAGE_EMULATOR_HOST"] = store.url
            bench("gs://", data_dir, f"gs://{object_stores.BUCKET}/run")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
