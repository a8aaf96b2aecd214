"""What an append costs, by the size of the data set, and beside what cannot be avoided.

    python -m tests.benchmarks.bench_append [NUM_RECORDS ...]

For each number of records, by default 100,000 and 1,000,000 images of 28×28, a set is made, and
1,000 records are appended. Then a folder of 100,000 files grows by 1,000. Each command runs in a
process of its own, and its memory is the largest that the process has held. More than 1,000,000
records are of 8×8.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

_SIZES = (100_000, 1_000_000)
_NUM_NEW, _NUM_FILES = 1_000, 100_000
_RUN = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def run(*command: str) -> tuple[float, int]:
    """Seconds and megabytes of a command."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *command], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - started, int(done.stdout.split()[-1])


def preprocess(source: str, out: pathlib.Path, *flags: str) -> tuple[float, int]:
    """Seconds and megabytes of preprocess."""
    command = [sys.executable, "-m", "pipeline.preprocess", f"--source={source}"]
    settings = [f"--output_dir={out}", "--name=images", "--num_shards=auto"]
    return run(*command, *settings, *flags)


def save(path: pathlib.Path, num_records: int, side: int, seed: int) -> str:
    """A source of random images."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_records, side, side), np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(num_records) % 10)
    return f"npz:{path}"


def main() -> None:
    """Prints two tables."""
    sizes = [int(argument) for argument in sys.argv[1:]] or _SIZES
    beam, megabytes = run(sys.executable, "-c", "import apache_beam")
    print(f"import apache_beam: {beam:.1f} s, {megabytes} MB")
    print("| records | made in | 1,000 appended in | nothing new | memory of the append |")
    print("|---|---|---|---|---|", flush=True)
    for size in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            place, side = pathlib.Path(temporary), 8 if size > 1_000_000 else 28
            source = save(place / "set.npz", size, side, 0)
            made, _ = preprocess(source, place / "out")
            os.remove(place / "set.npz")
            source = save(place / "more.npz", _NUM_NEW, side, 1)
            flags = ["--append", "--id_prefix=more-"]
            appended, megabytes = preprocess(source, place / "out", *flags)
            again, _ = preprocess(source, place / "out", *flags)
            print(
                f"| {size:,} of {side}×{side} | {made:.1f} s | {appended:.1f} s | {again:.1f} s | "
                f"{megabytes} MB |",
                flush=True,
            )
    if len(sys.argv) == 1:
        folder()


def folder() -> None:
    """A folder that grows."""
    print(
        "| a folder of 100,000 files | seconds | memory | image files opened |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        place = pathlib.Path(temporary)
        images = np.random.default_rng(2).integers(0, 256, (_NUM_FILES + _NUM_NEW, 8, 8), np.uint8)

        def write(first: int, last: int) -> None:
            for number in range(first, last):
                directory = place / "set" / str(number % 10)
                directory.mkdir(parents=True, exist_ok=True)
                path = directory / f"{number:07d}.png"
                Image.fromarray(images[number]).save(path)
                os.utime(path, (1e9, 1e9))  # As files that were written some time ago.

        def line(event: str, *flags: str) -> None:
            opened = place / "opened"
            command = [sys.executable, "-m", "tests.faults.list_opened", str(opened)]
            command += ["pipeline.preprocess", f"--source=folder:{place}/set"]
            settings = [f"--output_dir={place}/out", "--name=images", "--num_shards=auto"]
            secs, megabytes = run(*command, *settings, *flags)
            names = {name for name in opened.read_text().splitlines() if name.endswith(".png")}
            opened.unlink()
            print(f"| {event} | {secs:.1f} | {megabytes} MB | {len(names):,} |", flush=True)

        write(0, _NUM_FILES)
        line("the set is made")
        write(_NUM_FILES, _NUM_FILES + _NUM_NEW)
        line("1,000 new files", "--append")
        line("nothing new", "--append")
        line("nothing new, all read again", "--append", "--reread")


if __name__ == "__main__":
    main()
