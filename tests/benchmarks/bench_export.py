"""Times export against a plain loop over the same work: part of `make bench`."""

import pathlib
import sys
import tempfile

from pipeline import command
from tests.benchmarks.timing import median_secs, report
from tests.conftest import make_idx_set, make_shards

_NUM_RECORDS = 6_000


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
        trained_steps=0,
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
    ours, theirs = median_secs(job, plain, rounds=3)
    rate = f"{len(images) / ours:,.0f} images/s"
    report("export", rate, f"{theirs / ours:.2f} ×", "the speed of a bare loop of the model")


def main() -> None:
    """Runs the benchmark of export."""
    command.import_tensorflow()
    command.import_beam()
    with tempfile.TemporaryDirectory() as scratch:
        source = pathlib.Path(scratch) / "set"
        make_idx_set(source, num_train=1, num_test=_NUM_RECORDS, size=(28, 28))
        data_dir = f"{scratch}/shards"
        make_shards(f"idx:{source}", data_dir, num_shards=1, validation_fraction=0.0)
        bench_export(data_dir, scratch)


if __name__ == "__main__":
    sys.exit(main())
