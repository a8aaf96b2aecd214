"""Times export against plain loops over the same work: part of `make bench`."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from pipeline.cli import quiet
from tests.benchmarks.timing import median_secs, report
from tests.conftest import REPOSITORY, make_embeddings, make_idx_set, make_shards

_NUM_RECORDS = 60_000
_ROUNDS = 3
_BATCH_SIZE = 256
# A model of next to no work, where what is measured is memory.
_TINY = {"filters": (2, 2, 2), "latent_dim": 12}


def make_model(directory: str, image_shape: tuple[int, int, int], **changes) -> str:
    """Publishes a model as it is before training; returns its directory."""
    from configs import mnist
    from trainer.model.networks import VAE
    from trainer.runs import config as config_lib
    from trainer.runs import publish

    config = mnist.get_config()
    for key, value in changes.items():
        config[key] = value
    config = config_lib.resolve(config, image_shape)
    publish.publish_model(
        directory,
        config=config,
        run={"dataset_id": "none", "config": {}},
        image_shape=image_shape,
        class_names=[],
        weights=[v.numpy() for v in VAE(config, image_shape).variables],
        step=0,
        trained_steps=0,
        metrics={},
        records={},
    )
    return directory


def bench_speed(data_dir: str, scratch: str) -> None:
    """The job against a bare loop of the same model, and against Keras' predict."""
    import keras
    import tensorflow as tf

    from configs import mnist
    from pipeline.datasets import reader
    from pipeline.formats import tf_example
    from trainer.model.networks import VAE

    dataset = reader.Dataset(data_dir)
    images = dataset.read_images("test")
    model_dir = make_model(f"{scratch}/model", dataset.image_shape)
    signatures = tf.saved_model.load(model_dir).signatures
    vae = VAE(mnist.get_config(), dataset.image_shape)

    class Encode(keras.Model):
        def call(self, pixels):
            return vae.encoder(tf_example.to_floats(pixels))

    class EncodeAndDecode(keras.Model):
        def call(self, pixels):
            mean, log_var = vae.encoder(tf_example.to_floats(pixels))
            return mean, log_var, tf.sigmoid(vae.decoder(mean))

    def bare(name: str) -> None:
        for first in range(0, len(images), _BATCH_SIZE):
            chunk = tf.constant(images[first : first + _BATCH_SIZE])
            _ = [value.numpy() for value in signatures[name](images=chunk).values()]

    for label, settings, signature, keras_model in (
        ("encode and decode", {}, "embed", EncodeAndDecode()),
        ("embeddings only", {"fields": ("mean", "log_var"), "images": "none"}, "encode", Encode()),
    ):

        def job(settings=settings, out=f"{scratch}/{signature}") -> None:
            shutil.rmtree(out, ignore_errors=True)
            make_embeddings(data_dir, model_dir, out, **settings)

        def predict(keras_model=keras_model) -> None:
            keras_model.predict(images, batch_size=_BATCH_SIZE, verbose=0)

        predict()
        secs = median_secs(job, lambda s=signature: bare(s), predict, rounds=_ROUNDS)
        ours, theirs, by_keras = secs
        rate = f"{len(images) / ours:,.0f} images/s"
        report(label, rate, f"{theirs / ours:.2f} ×", "the speed of a bare loop (≥ 0.85)")
        report("", "", f"{by_keras / ours:.2f} ×", "the speed of Keras' predict (≥ 1)")


def bench_run_inference(data_dir: str, scratch: str) -> None:
    """Beam's RunInference over the same images, for comparison: it writes no files."""
    import apache_beam as beam
    import numpy as np
    import tensorflow as tf
    from apache_beam.ml.inference import base

    from pipeline.datasets import reader
    from pipeline.runners import options as beam_options
    from pipeline.runners import run as runner

    images = reader.Dataset(data_dir).read_images("test")[:10_000]
    model_dir = f"{scratch}/model"
    embed = tf.saved_model.load(model_dir).signatures["embed"]

    class Handler(base.ModelHandler):  # Beam's own for TensorFlow need tensorflow_hub.
        def load_model(self):
            import tensorflow as tf

            return tf.saved_model.load(model_dir)

        def run_inference(self, batch, model, inference_args=None):
            import tensorflow as tf

            found = model.signatures["embed"](images=tf.constant(np.stack(batch)))
            return list(zip(*(value.numpy() for value in found.values()), strict=True))

        def batch_elements_kwargs(self):
            return {"min_batch_size": _BATCH_SIZE, "max_batch_size": _BATCH_SIZE}

    def job() -> None:
        with beam.Pipeline(runner=runner.make_runner(beam_options.parse_options([]))) as p:
            _ = p | beam.Create(list(images)) | base.RunInference(Handler())

    def bare() -> None:
        for first in range(0, len(images), _BATCH_SIZE):
            chunk = tf.constant(images[first : first + _BATCH_SIZE])
            _ = [value.numpy() for value in embed(images=chunk).values()]

    job()
    ours, theirs = median_secs(job, bare, rounds=_ROUNDS)
    rate = f"{len(images) / ours:,.0f} images/s"
    report("Beam's RunInference", rate, f"{theirs / ours:.2f} ×", "the speed of a bare loop")


_PEAK = """
import json, re, sys
from pipeline.cli import quiet
quiet.import_beam()
from tests.conftest import make_embeddings
manifest = make_embeddings(*sys.argv[1:4])
# Of this program alone, where ru_maxrss counts what the process was before it became this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps({"peak": peak, "rows": manifest["records"]["written"]}))
"""


def bench_memory(scratch: str) -> None:
    """Peak memory of the command at 60,000 and 600,000 records."""
    peaks = []
    for number in (1, 10):
        data_dir = f"{scratch}/data{number}"
        _make_data(f"{scratch}/set{number}", data_dir, number * _NUM_RECORDS, None)
        if number == 1:
            make_model(f"{scratch}/tiny", (28, 28, 1), **_TINY)
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, data_dir, f"{scratch}/tiny", f"{scratch}/out{number}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
        shutil.rmtree(f"{scratch}/set{number}")
    small, large = peaks
    assert large["rows"] == 10 * small["rows"]
    more = f"{large['peak'] - small['peak']:+,.0f} MiB"
    report("600,000 records", f"{large['peak']:,.0f} MiB", more, "those of 60,000 (≤ 200)")


def bench_nothing_to_do(scratch: str) -> None:
    """The command run again, against its imports."""
    flags = [f"--{name}={scratch}/{place}" for name, place in
             (("data_dir", "data10"), ("model_dir", "tiny"), ("output_dir", "out10"))]  # fmt: skip

    def run(*args: str) -> None:
        subprocess.run([sys.executable, *args], cwd=REPOSITORY, check=True, capture_output=True)

    def again() -> None:
        run("-m", "pipeline.export", *flags, "--noreport")

    ours, imports = median_secs(again, lambda: run("-c", "import apache_beam"), rounds=_ROUNDS)
    left = f"{ours - imports:.1f} s"
    report("nothing to do", f"{ours:.1f} s", left, "more than import apache_beam (< 3 s)")


def _make_data(source: str, data_dir: str, count: int, num_shards: int | None) -> None:
    make_idx_set(pathlib.Path(source), num_train=1, num_test=count, size=(28, 28))
    make_shards(f"idx:{source}", data_dir, num_shards=num_shards, validation_fraction=0.0)


def main() -> None:
    """Runs the benchmarks of export."""
    quiet.import_tensorflow()
    quiet.import_beam()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        _make_data(f"{scratch}/set", f"{scratch}/shards", _NUM_RECORDS, None)
        bench_speed(f"{scratch}/shards", scratch)
        bench_run_inference(f"{scratch}/shards", scratch)
        bench_memory(scratch)
        bench_nothing_to_do(scratch)
    print(f"export: measured in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
