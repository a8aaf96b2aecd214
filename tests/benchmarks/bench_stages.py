"""Times each stage against a plain loop over the same work: `make bench`.

Prints ratios from one run, since single times say more about the machine than the
code. Startup and imports are left out; the sets are random pixels, whose content
does not matter to any of it.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from pipeline import command

_NUM_RECORDS = 60_000
_ROUNDS = 3


def _median_secs(*runs: Callable[[], object]) -> list[float]:
    """Median seconds of each of several functions, called in turn."""
    secs = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for taken, run in zip(secs, runs, strict=True):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in secs]


def _report(what: str, rate: float, unit: str, ratio: float, against: str) -> None:
    print(f"{what:<12}{rate:>10,.0f} {unit:<10}{ratio:>6.2f} × {against}")


def bench_preprocess(images: np.ndarray, labels: np.ndarray, scratch: str) -> str:
    """The Beam job against a loop over tf.io.TFRecordWriter; returns the shards' directory."""
    import tensorflow as tf

    from pipeline import beam_runner, placement, sources, write_shards

    opened = sources.open_source
    sources.open_source = lambda spec: sources.ArraySource({placement.UNSPLIT: (images, labels)})
    count = iter(range(1000))

    def job() -> str:
        return write_shards.write_shards(
            spec="bench",
            output_dir=f"{scratch}/shards-{next(count)}",
            name="bench",
            num_shards=4,
            validation_fraction=0.0,
            seed=0,
            overwrite=False,
            options=beam_runner.parse_options([]),
        )

    def plain() -> None:
        with tf.io.TFRecordWriter(f"{scratch}/plain.tfrecord") as writer:
            for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                feature = {
                    "id": _bytes_feature(b"train-%07d" % i),
                    "image": _bytes_feature(image.tobytes()),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())

    def _bytes_feature(value: bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    ours, theirs = _median_secs(job, plain)
    sources.open_source = opened
    _report(
        "preprocess", len(images) / ours, "records/s", theirs / ours, "bare TFRecordWriter loop"
    )
    return f"{scratch}/shards-0"


def bench_train(data_dir: str) -> None:
    """The training step against the machine's matrix multiplication."""
    import keras
    import tensorflow as tf

    from configs import mnist
    from pipeline import shards
    from trainer import batches, strategies
    from trainer.model import VAE
    from trainer.step import Steps, place_on_devices

    config, num_steps, size = mnist.get_config(), 20, 3072
    images = shards.Dataset(data_dir).read_images("test")
    strategy = strategies.make(config)
    with strategy.scope():
        vae = VAE(config, images.shape[1:])
        optimizer = keras.optimizers.Adam(config.learning_rate)
        optimizer.build(vae.variables)
    steps = Steps(config, strategy, vae, optimizer)
    placed = place_on_devices(strategy, images)
    order = tf.constant(batches.permutation(0, 0, len(images)))
    matrix = tf.random.normal((size, size))
    multiply = tf.function(lambda: tf.reduce_sum(matrix @ matrix))

    def train() -> None:
        steps.train(placed, order, *map(tf.constant, (0, 0, num_steps))).numpy()

    train()
    multiply()
    ours, theirs = _median_secs(train, lambda: multiply().numpy())
    # Multiply-adds of one image's forward pass: convolutions of 28·28·9·32, 14·14·9·32·64
    # and 7·7·9·64·128, the same mirrored, and the dense layers; times 3 with the backward pass.
    forward = 2 * (225_792 + 2 * 3_612_672) + 3 * 6272 * 12
    flops = 2 * 3 * forward * num_steps * config.batch_size / ours
    _report(
        "train",
        num_steps * config.batch_size / ours,
        "images/s",
        flops / (2 * size**3 / theirs),
        f"the machine's sgemm, {2 * size**3 / theirs / 1e9:,.0f} GFLOP/s",
    )


def bench_export(data_dir: str, scratch: str) -> None:
    """The Beam job against a loop of the same model over the images in memory."""
    import tensorflow as tf

    from configs import mnist
    from pipeline import beam_runner, embed_shards, shards
    from trainer import publish
    from trainer.model import VAE

    dataset = shards.Dataset(data_dir)
    images, config = dataset.read_images("test"), mnist.get_config()
    publish.publish(
        f"{scratch}/model",
        config=config,
        run={"dataset_id": dataset.dataset_id, "config": {}},
        image_shape=dataset.image_shape,
        weights=[v.numpy() for v in VAE(config, dataset.image_shape).variables],
        step=0,
        metrics={},
        records={},
    )
    model = tf.saved_model.load(f"{scratch}/model").signatures["embed"]
    count = iter(range(1000))

    def job() -> None:
        embed_shards.embed_shards(
            data_dir=data_dir,
            model_dir=f"{scratch}/model",
            output_dir=f"{scratch}/embeddings-{next(count)}",
            split="test",
            overwrite=False,
            options=beam_runner.parse_options([]),
        )

    def plain() -> None:
        for first in range(0, len(images), 256):
            _ = [v.numpy() for v in model(images=tf.constant(images[first : first + 256])).values()]

    job()
    ours, theirs = _median_secs(job, plain)
    _report("export", len(images) / ours, "images/s", theirs / ours, "bare loop of the model")


def main() -> None:
    """Runs all benchmarks."""
    command.import_tensorflow()
    command.import_beam()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (_NUM_RECORDS, 28, 28, 1)).astype(np.uint8)
    labels = generator.integers(0, 10, _NUM_RECORDS)
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = bench_preprocess(images, labels, scratch)
        bench_train(data_dir)
        bench_export(data_dir, scratch)


if __name__ == "__main__":
    sys.exit(main())
