"""What a million images take of each stage, on this machine: the numbers of docs/sizing.md.

    python -m tests.benchmarks.bench_sizing

Synthetic 28×28 images, whose content does not matter to any of it. Each figure is of a process of
its own: seconds beside imports, and the peak of its memory.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from tests.conftest import REPOSITORY, write_idx

_NUM_RECORDS = (100_000, 1_000_000)

# What a measured process runs first: `secs` and `peak_mib` are what it prints in the end.
_MEASURE = """
import json, re, sys, time
from pipeline.cli import quiet
quiet.import_beam()
from tests.conftest import make_shards, make_embeddings
from trainer.data import batches
import numpy as np

def peak_mib():
    # VmHWM, since ru_maxrss is what a child inherits from its parent too.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before, started = peak_mib(), time.perf_counter()
WORK
print(json.dumps([time.perf_counter() - started, before, peak_mib()]))
"""


def measure(work: str) -> tuple[float, float, float]:
    """Runs a piece of code in a process of its own; returns seconds, MiB before, and peak MiB."""
    program = _MEASURE.replace("WORK", work)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def row(what: str, num_records: int, measured: tuple[float, float, float]) -> None:
    """Prints one line of the table."""
    secs, before, peak = measured
    print(
        f"| {what} | {num_records:,} | {secs:.1f} | {secs / num_records * 1e6:.1f} | "
        f"{peak:,.0f} ({peak - before:+,.0f}) |",
        flush=True,
    )


def main() -> None:
    """Prints the tables."""
    from tests.benchmarks.bench_export import make_model

    generator = np.random.default_rng(0)
    print("| what | images | s | s a million | peak MiB (above imports) |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        for num_records in _NUM_RECORDS:
            source, data = scratch / f"idx{num_records}", scratch / f"set{num_records}"
            source.mkdir()
            images = generator.integers(0, 256, (num_records, 28, 28), np.uint8)
            write_idx(source / "train-images-idx3-ubyte", images)
            write_idx(source / "train-labels-idx1-ubyte", np.zeros(num_records, np.uint8))
            settings = "num_shards=None, validation_fraction=0.0"
            work = f"make_shards('idx:{source}', '{data}', {settings})"
            row("preprocess, in process", num_records, measure(work))
            two = "beam_args=['--direct_num_workers=2']"
            work = f"make_shards('idx:{source}', '{data}2', {settings}, {two})"
            row("preprocess, 2 processes", num_records, measure(work))
            row(
                "order of an epoch",
                num_records,
                measure(f"batches.permutation(0, 1, {num_records})"),
            )
        model = make_model(str(scratch / "model"), (28, 28, 1))
        small = scratch / f"set{_NUM_RECORDS[0]}"
        for images, what in (("none", "embeddings only"), ("sheets", "embeddings and sheets")):
            out = scratch / f"out-{images}"
            work = (
                f"make_embeddings('{small}', '{model}', '{out}', split='train', images='{images}')"
            )
            row(f"export, {what}", _NUM_RECORDS[0], measure(work))
        for num_records in (10_000_000, 100_000_000):
            work = f"batches.permutation(0, 1, {num_records})"
            row("order of an epoch", num_records, measure(work))
        manifest = (small / "manifest.json").stat().st_size
        num_files = len(json.loads((small / "manifest.json").read_text())["files"])
        print(f"\nA manifest of {num_files} files has {manifest:,} bytes.")


if __name__ == "__main__":
    main()
