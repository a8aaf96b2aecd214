"""Times training against Keras, PyTorch and the machine's matrix multiplication.

    make bench

Startup and imports are left out, except where they are what is measured; what the
images show does not matter to any of it.
"""

import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.cli import quiet
from tests.benchmarks.timing import median_secs, report
from tests.conftest import REPOSITORY, make_idx_set, make_shards

if TYPE_CHECKING:
    import tensorflow as tf

    from trainer.steps.tape_steps import TapeSteps

_NUM_RECORDS = 5_120
_BATCH_SIZE = 256
_NUM_STEPS = _NUM_RECORDS // _BATCH_SIZE
_SGEMM_SIZE = 3072
# Multiply-adds of the default model's forward pass on an image of 28×28: the encoder's
# convolutions with 28·28·9·1·32, 14·14·9·32·64 and 7·7·9·64·128, the decoder's the same in
# reverse, and three dense layers between 6272 and 12 units.
FORWARD_MULTIPLY_ADDS = 2 * (225_792 + 2 * 3_612_672) + 3 * 6272 * 12
# A multiply-add is 2 operations; the backward pass does each of them for the gradients of its
# inputs and once more for those of the weights.
FLOPS_PER_IMAGE = 2 * 3 * FORWARD_MULTIPLY_ADDS


class Prepared(NamedTuple):
    """Steps of configs/mnist.py on images that lie on the devices, traced and run once."""

    steps: "TapeSteps"
    arguments: tuple  # of steps.train and steps.evaluator.evaluate

    def __call__(self) -> np.ndarray:
        """Trains; a row of sums for each step."""
        rows, _ = self.steps.train(*self.arguments)
        return rows.numpy()


def prepare(
    images: np.ndarray,
    *,
    num_steps: int,
    make_vae: Callable | None = None,
    distribution: "tf.distribute.Strategy | None" = None,
    **changes,
) -> Prepared:
    """Some steps of configs/mnist.py, with changes; by its strategy unless one is given."""
    import tensorflow as tf

    from configs import mnist
    from trainer.cluster import strategies
    from trainer.data import batches, placement
    from trainer.model.networks import VAE
    from trainer.runs import config as config_lib
    from trainer.steps.evaluation import Evaluator
    from trainer.steps.optimizer import Optimizer
    from trainer.steps.tape_steps import TapeSteps

    config = mnist.get_config()
    config.update(changes)
    config = config_lib.resolve(config, images.shape[1:])
    strategy = distribution or strategies.make(config)
    with strategy.scope():
        vae = (make_vae or VAE)(config, images.shape[1:])
        optimizer = Optimizer(config, vae, total_steps=10**6)
    steps = TapeSteps(Evaluator(config, strategy, vae), optimizer)
    visit = placement.OnDevice(strategy, images).visit(batches.permutation(0, 0, len(images)))
    records, first = visit.batches(0, num_steps)
    prepared = Prepared(steps, (records, first, tf.constant(0), tf.constant(num_steps)))
    prepared()
    return prepared


def prepare_keras(images: np.ndarray) -> Callable[[], object]:
    """The same model and objective by compile and fit, fed as Keras' guides feed it."""
    import keras
    import tensorflow as tf

    from configs import mnist
    from trainer.cluster import strategies
    from trainer.model import losses
    from trainer.model.networks import VAE
    from trainer.runs import config as config_lib

    config = config_lib.resolve(mnist.get_config(), images.shape[1:])

    class Fitted(keras.Model):
        def __init__(self):
            super().__init__()
            vae = VAE(config, images.shape[1:])
            self.encoder, self.decoder = vae.encoder, vae.decoder

        def call(self, x):
            mean, log_var = self.encoder(x)
            z = mean + tf.exp(log_var / 2) * tf.random.normal(tf.shape(mean))
            self.add_loss(config.beta * tf.reduce_mean(losses.kl(mean, log_var)))
            return self.decoder(z)

    def negative_log(x, logits):
        per_pixel = tf.nn.sigmoid_cross_entropy_with_logits(labels=x, logits=logits)
        return tf.reduce_sum(per_pixel, axis=(1, 2, 3))

    with strategies.make(config).scope():
        model = Fitted()
        model.compile(optimizer=keras.optimizers.Adam(1e-3), loss=negative_log)

    def to_pair(pixels):
        floats = tf.cast(pixels, tf.float32) / 255.0
        return floats, floats

    dataset = tf.data.Dataset.from_tensor_slices(images).shuffle(len(images)).batch(_BATCH_SIZE)
    dataset = dataset.map(to_pair, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    def fit() -> None:
        model.fit(dataset, shuffle=False, verbose=0)

    fit()
    return fit


def prepare_torch(mode: str) -> Callable[[], object] | None:
    """The same in a PyTorch process, if there is PyTorch: beside TensorFlow it crashes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.torch_process", mode, str(_NUM_RECORDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
        text=True,
    )

    def train() -> bool:
        try:
            process.stdin.write("train\n")
            process.stdin.flush()
        except BrokenPipeError:
            return False
        return bool(process.stdout.readline())

    return train if train() else None


def bench_against_others(images: np.ndarray) -> None:
    """Our steps, other frameworks' and sgemm, in turn."""
    import tensorflow as tf

    matrix = tf.random.normal((_SGEMM_SIZE, _SGEMM_SIZE))
    multiply = tf.function(lambda: tf.reduce_sum(matrix @ matrix))
    multiply()
    runs = {"": prepare(images, num_steps=_NUM_STEPS), "sgemm": lambda: multiply().numpy()}
    runs["Keras compile and fit"] = prepare_keras(images)
    for mode in ("eager", "compiled"):
        torch = prepare_torch(mode)
        if torch:
            runs[f"PyTorch, {mode}"] = torch
        else:
            print(f"PyTorch, {mode}: not installed here, or it cannot; not compared with")
    secs = dict(zip(runs, median_secs(*runs.values()), strict=True))
    ours = secs.pop("")
    sgemm = 2 * _SGEMM_SIZE**3 / secs.pop("sgemm")
    rate = _NUM_RECORDS / ours
    flops = FLOPS_PER_IMAGE * rate
    what = f"the machine's sgemm, {sgemm / 1e9:,.0f} GFLOP/s"
    report("train, float32", f"{rate:,.0f} images/s", f"{flops / sgemm:.2f} ×", what)
    for name, taken in secs.items():
        report("", "", f"{taken / ours:.2f} ×", f"the speed of {name}")


def bench_variants(images: np.ndarray) -> None:
    """Two replicas on the same cores, and bfloat16, against one replica in float32."""
    runs = [
        prepare(images, num_steps=_NUM_STEPS, **changes)
        for changes in ({}, {"num_virtual_devices": 2}, {"precision": "mixed_bfloat16"})
    ]
    one, two, bfloat16 = median_secs(*runs)
    report("2 virtual replicas", "", f"{two / one:.2f} ×", "the time of 1 (≤ 1.05)")
    rate = f"{_NUM_RECORDS / bfloat16:,.0f} images/s"
    report("mixed_bfloat16", rate, f"{one / bfloat16:.2f} ×", "the speed of float32")


class _OneLayer:
    """The smallest model that the step can train: one dense layer, and z as the logits."""

    def __init__(self, config, image_shape):
        import keras

        self.image_shape = image_shape
        inputs = keras.Input(image_shape)
        both = keras.layers.Dense(2 * config.latent_dim)(keras.layers.Flatten()(inputs))
        self.encoder = keras.Model(inputs, keras.ops.split(both, 2, axis=1))
        z = keras.Input((config.latent_dim,))
        self.decoder = keras.Model(z, keras.layers.Reshape(image_shape)(z))
        self.variables = self.encoder.weights


def bench_loop() -> None:
    """What a step costs beside its arithmetic: a model with next to none."""
    num_steps = 1000
    images = np.zeros((num_steps, 2, 2, 1), np.uint8)
    train = prepare(images, num_steps=num_steps, make_vae=_OneLayer, latent_dim=4, batch_size=1)
    (secs,) = median_secs(train)
    report("the loop's own cost", f"{secs / num_steps * 1e6:,.0f} µs a step", "", "(≤ 150)")


_FIRST_STEP = """
import os, trainer.main
from pipeline.cli import quiet
quiet.import_tensorflow()
from trainer.runs import run
steps = run.Run.train_steps
def once(self, visit, count, *_):
    steps(self, visit, 1)
    os._exit(0)
run.Run.train_steps = once
trainer.main.main()
"""


def bench_start(data_dir: str, workdir: str) -> None:
    """From the command to the end of the first step."""
    flags = ["--config=configs/mnist.py", f"--config.data_dir={data_dir}", f"--workdir={workdir}"]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", _FIRST_STEP, *flags], cwd=REPOSITORY, check=True)
    report("to the first step", f"{time.perf_counter() - started:.1f} s", "", "(< 15)")


def main() -> None:
    """Runs the benchmarks of training."""
    quiet.import_tensorflow()
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (_NUM_RECORDS, 28, 28, 1)).astype(np.uint8)
    bench_against_others(images)
    bench_variants(images)
    bench_loop()
    with tempfile.TemporaryDirectory() as scratch:
        source = make_idx_set(pathlib.Path(scratch) / "set", num_train=6000, size=(28, 28))
        make_shards(f"idx:{source}", f"{scratch}/shards")
        bench_start(f"{scratch}/shards", f"{scratch}/run")


if __name__ == "__main__":
    sys.exit(main())
