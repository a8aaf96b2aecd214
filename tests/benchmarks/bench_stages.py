"""Times training and export against a plain loop over the same work: part of `make bench`.

Prints ratios from one run, since single times say more about the machine than the
code. Startup and imports are left out; what the images show does not matter to any of it.
"""

import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from pipeline import command
from tests.conftest import make_idx_set, make_shards

_NUM_RECORDS = 6_000
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
    """Runs the benchmarks of training and export."""
    command.import_tensorflow()
    command.import_beam()
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch) / "set"
        make_idx_set(source, num_train=1, num_test=_NUM_RECORDS, size=(28, 28))
        data_dir = f"{scratch}/shards"
        make_shards(f"idx:{source}", data_dir, num_shards=1, validation_fraction=0.0)
        bench_train(data_dir)
        bench_export(data_dir, scratch)


if __name__ == "__main__":
    sys.exit(main())
