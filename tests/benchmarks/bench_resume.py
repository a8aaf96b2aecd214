"""Times the training command from its start to its first step, and kills it there, 20 times.

    python -m tests.benchmarks.bench_resume [CONFIG]

A run on the embedded digits writes a checkpoint after every step. It is killed with SIGKILL when
the checkpoint of its first step is there, and started again; so each start but the first resumes.
"""

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from tests.conftest import REPOSITORY, make_shards

_NUM_KILLS = 20
_WATCH_SECS = 0.002


def _secs_to_first_step(command: list[str], checkpoints: pathlib.Path) -> float:
    """Starts a run, waits for the checkpoint of a new step, kills the run."""
    before = set(checkpoints.glob("step-*.npz"))
    began = time.perf_counter()
    run = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not set(checkpoints.glob("step-*.npz")) - before:
        if run.poll() is not None:
            raise RuntimeError(run.stderr.read().decode())
        time.sleep(_WATCH_SECS)
    secs = time.perf_counter() - began
    run.kill()
    run.communicate()
    return secs


def main(config: str = "configs/mnist.py") -> int:
    """Prints the seconds of the first start, and of the resumed starts."""
    with tempfile.TemporaryDirectory() as scratch:
        make_shards("sample", f"{scratch}/shards", num_shards=4)
        workdir = pathlib.Path(scratch, "run")
        command = [
            *(sys.executable, "-m", "trainer.main", f"--config={config}"),
            *(f"--config.data_dir={scratch}/shards", f"--workdir={workdir}"),
            *("--config.steps_per_loop=1", "--config.checkpoint_every_steps=1"),
        ]
        first, *resumed = (
            _secs_to_first_step(command, workdir / "checkpoints") for _ in range(_NUM_KILLS + 1)
        )
    print("| start | seconds to the first step |\n|---|---|")
    print(f"| the first | {first:.1f} |")
    print(
        f"| after each of {_NUM_KILLS} kills | median {statistics.median(resumed):.1f}, "
        f"{min(resumed):.1f} to {max(resumed):.1f} |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
