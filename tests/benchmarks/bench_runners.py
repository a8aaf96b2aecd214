"""The Beam stages on each runner that is there: time, and whether the bytes are the same.

    python -m tests.benchmarks.bench_runners --source=sample

`make runners` fetches the runners first. Prints a table in Markdown; a runner that is not
there has no row, but a line that says why.
"""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from tests.conftest import REPOSITORY, outputs_of
from tests.engines import cluster
from tests.engines.flink import FlinkCluster
from tests.engines.processes import ClusterError
from tests.engines.spark import SparkCluster

PRISM = REPOSITORY / "build" / "prism" / "prism"


def timed(module: str, *flags: str) -> float:
    """Runs a command to its end; returns seconds."""
    started = time.perf_counter()
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.DEVNULL,
        env=quiet,
    )
    return time.perf_counter() - started


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="sample", help="the image set, as preprocess takes it")
    parser.add_argument("--num_shards", default="16", help="shards of each split")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as until_done:
        scratch = pathlib.Path(name)
        runners: dict[str, list[str]] = {
            "in process": [],
            "2 processes here": ["--direct_num_workers=2"],
        }
        if PRISM.exists():
            runners["Prism"] = ["--runner=PrismRunner", f"--prism_location={PRISM}"]
        else:
            print(f"{PRISM}: no Prism there", file=sys.stderr)
        engines = {"Flink, 2 task managers": FlinkCluster, "Spark, 2 workers": SparkCluster}
        for engine, cluster_class in engines.items():
            try:
                place = scratch / cluster_class.__name__
                running = until_done.enter_context(cluster.running(cluster_class, place))
                runners[engine] = running.flags()
            except ClusterError as error:
                print(error, file=sys.stderr)
        shards, model = scratch / "shards", scratch / "run"
        stages = {
            "preprocess": (f"--source={asked.source}", f"--num_shards={asked.num_shards}"),
            "export": (f"--data_dir={shards}", f"--model_dir={model}/export", "--split=train"),
        }
        print("| stage | runner | same bytes | seconds | × in process |\n|---|---|---|---|---|")
        for stage, flags in stages.items():
            if stage == "export":
                timed("pipeline.preprocess", *stages["preprocess"], f"--output_dir={shards}")
                config = ("--config=configs/smoke.py", f"--config.data_dir={shards}")
                timed("trainer.main", *config, f"--workdir={model}")
                flags = (*flags, "--noreport")
            first: tuple[float, dict[str, bytes]] | None = None
            for number, (runner, runner_flags) in enumerate(runners.items()):
                out = scratch / f"{stage}-{number}"
                secs = timed(f"pipeline.{stage}", *flags, f"--output_dir={out}", *runner_flags)
                made = outputs_of(out)
                first = first or (secs, made)
                same = "yes" if made == first[1] else "NO"
                print(
                    f"| {stage} | {runner} | {same} | {secs:.1f} | {secs / first[0]:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
