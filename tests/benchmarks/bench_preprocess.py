"""Times preprocess against what else one could do with the same images: part of `make bench`.

Prints ratios from one run, since single times say more about the machine than the code.
Startup and imports are left out but for the last line; pixels are random, whose content
does not matter to any of it.
"""

import contextlib
import io
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from pipeline.cli import quiet
from tests.benchmarks.timing import syncing
from tests.conftest import REPOSITORY, make_shards, write_idx

_NUM_RECORDS = 600_000
_NUM_TFDS = 20_000
_NUM_BEAM = 60_000
_ROUNDS = 3
_PROCESSES = "--direct_running_mode=multi_processing"


def secs_of(run: Callable[[], object]) -> float:
    """Seconds that a function takes, once."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def report(what: str, ratio: float, against: str, *, least: bool, bound: float) -> None:
    """Prints a ratio, and the bound it is to keep."""
    kept = ratio >= bound if least else ratio <= bound
    sign = "≥" if least else "≤"
    print(f"  {what:<36}{ratio:>7.2f} × {against} ({sign} {bound}{'' if kept else ', NOT KEPT'})")


def _write_set(directory: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> str:
    directory.mkdir()
    write_idx(directory / "train-images-idx3-ubyte", images[..., 0])
    write_idx(directory / "train-labels-idx1-ubyte", labels)
    return f"idx:{directory}"


def _job(source: str, scratch: pathlib.Path, *beam_args: str) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        make_shards(
            source,
            f"{out}/set",
            num_shards=4,
            validation_fraction=0.0,
            beam_args=list(beam_args),
        )


def _examples(images: np.ndarray, labels: np.ndarray):
    """Serialized tf.Examples as TensorFlow makes them."""
    import tensorflow as tf

    def of_bytes(value: bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        feature = {
            "id": of_bytes(b"train-%07d" % i),
            "image": of_bytes(image.tobytes()),
            "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        }
        example = tf.train.Example(features=tf.train.Features(feature=feature))
        yield example.SerializeToString()


def _plain(
    images: np.ndarray, labels: np.ndarray, scratch: pathlib.Path, *, sync: bool = False
) -> None:
    import tensorflow as tf

    path = scratch / "plain.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in _examples(images, labels):
            writer.write(record)
    if sync:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _synced_job(source: str, scratch: pathlib.Path) -> None:
    with syncing():
        _job(source, scratch)


def _beam_record_by_record(images: np.ndarray, labels: np.ndarray, scratch: pathlib.Path) -> None:
    import apache_beam as beam

    from pipeline.runners import options as beam_options
    from pipeline.runners import run as runner

    def encode(i: int) -> bytes:
        return next(_examples(images[i : i + 1], labels[i : i + 1]))

    options = beam_options.parse_options([])
    with beam.Pipeline(runner=runner.make_runner(options), options=options) as pipeline:
        _ = (
            pipeline
            | beam.Create(range(len(images)))
            | beam.Map(encode)
            | beam.io.WriteToTFRecord(str(scratch / "beam.tfrecord"), num_shards=4)
        )


def _tfds_prepare(
    images: np.ndarray, labels: np.ndarray, scratch: pathlib.Path, *, raw: bool
) -> None:
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # Its name would be taken the second time.
        builder_class = _tfds_builder(images, labels, scratch, raw=raw)
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=scratch) as data_dir:
        with contextlib.redirect_stdout(io.StringIO()):
            builder_class(data_dir=data_dir).download_and_prepare()


def _tfds_builder(images: np.ndarray, labels: np.ndarray, scratch: pathlib.Path, *, raw: bool):
    """A builder like those of its catalog: images as PNG, or else as raw bytes like ours."""
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(28, 28, 1))
    if raw:
        image = tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8, encoding="bytes")

    class Bench(tfds.core.GeneratorBasedBuilder):
        """The same images as a data set of tensorflow-datasets."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = scratch

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Text(),
                        "image": image,
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                )
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                yield i, {"id": f"train-{i:07d}", "image": image, "label": label}

    return Bench


def bench_job(scratch: pathlib.Path) -> None:
    """The job on 600,000 records against what else one could do, and against itself."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (_NUM_RECORDS, 28, 28, 1), np.uint8)
    labels = generator.integers(0, 10, _NUM_RECORDS).astype(np.uint8)
    tenth = _NUM_RECORDS // 10
    large = _write_set(scratch / "large", images, labels)
    small = _write_set(scratch / "small", images[:tenth], labels[:tenth])
    few = images[:_NUM_TFDS], labels[:_NUM_TFDS]
    one, two = ([f"--direct_num_workers={n}", _PROCESSES] for n in (1, 2))
    runs: dict[str, Callable[[], object]] = {
        "large": lambda: _job(large, scratch),
        "small": lambda: _job(small, scratch),
        "plain": lambda: _plain(images, labels, scratch),
        "large, synced": lambda: _synced_job(large, scratch),
        "plain, synced": lambda: _plain(images, labels, scratch, sync=True),
        "beam": lambda: _beam_record_by_record(images[:_NUM_BEAM], labels[:_NUM_BEAM], scratch),
        "tfds": lambda: _tfds_prepare(*few, scratch, raw=False),
        "tfds, raw": lambda: _tfds_prepare(*few, scratch, raw=True),
        "large, one process": lambda: _job(large, scratch, *one),
        "small, one process": lambda: _job(small, scratch, *one),
        "large, two processes": lambda: _job(large, scratch, *two),
        "small, two processes": lambda: _job(small, scratch, *two),
    }
    runs["small"]()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            taken[name].append(secs_of(run))
    secs = {name: statistics.median(values) for name, values in taken.items()}
    rate = _NUM_RECORDS / secs["large"]
    print(f"preprocess: {rate:,.0f} records/s of 28×28, in process; 600,000 of them against")
    report(
        "a bare tf.io.TFRecordWriter loop",
        secs["plain"] / secs["large"],
        "its speed",
        least=True,
        bound=0.6,
    )
    synced = secs["plain, synced"] / secs["large, synced"]
    report("the same, both with fsync", synced, "its speed", least=True, bound=0.6)
    report(
        "download_and_prepare of TFDS",
        secs["tfds"] / _NUM_TFDS * rate,
        "its speed per record",
        least=True,
        bound=8,
    )
    raw = secs["tfds, raw"] / _NUM_TFDS * rate
    print(f"  {'the same, images not as PNG but raw':<36}{raw:>7.2f} × its speed per record")
    report(
        "Beam's WriteToTFRecord",
        secs["beam"] / _NUM_BEAM * rate,
        "its speed per record",
        least=True,
        bound=6,
    )
    report(
        "60,000 records",
        secs["large"] / secs["small"],
        "the time",
        least=False,
        bound=10.5,
    )
    # What the other 540,000 records take: startup is the same in both.
    marginal = [secs[f"large, {n}"] - secs[f"small, {n}"] for n in ("one process", "two processes")]
    report(
        "one worker process, by two", marginal[0] / marginal[1], "as fast", least=True, bound=1.5
    )


def bench_whole(scratch: pathlib.Path) -> None:
    """The command on 70,000 digits, imports and all, against the import of Beam alone."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (70_000, 28, 28, 1), np.uint8)
    source = _write_set(scratch / "mnist", images, np.arange(70_000).astype(np.uint8) % 10)

    def run(*arguments: str) -> None:
        subprocess.run(
            arguments,
            cwd=REPOSITORY,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    venv = pathlib.Path(sys.prefix)
    ours, theirs = [], []
    for number in range(_ROUNDS):
        out = scratch / f"whole-{number}"
        make = ("make", "preprocess", f"VENV={venv}", f"SOURCE={source}", f"OUTPUT_DIR={out}")
        ours.append(secs_of(lambda make=make: run(*make)))
        theirs.append(secs_of(lambda: run(sys.executable, "-c", "import apache_beam")))
    report(
        "make preprocess of 70,000 digits",
        statistics.median(ours) / statistics.median(theirs),
        'the time of "import apache_beam"',
        least=False,
        bound=6,
    )


def main() -> None:
    """Runs all benchmarks of preprocess."""
    quiet.import_tensorflow()
    quiet.import_beam()
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        bench_job(scratch)
        bench_whole(scratch)


if __name__ == "__main__":
    main()
