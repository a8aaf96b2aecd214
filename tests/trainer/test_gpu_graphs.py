"""What training, evaluation and export would do on GPUs, read off their traced graphs."""

import collections
import functools

import numpy as np
import pytest
import tensorflow as tf

from configs import mnist
from pipeline.machine import gpus
from tests.trainer import gpu_graphs
from trainer.data import placement
from trainer.model.networks import VAE
from trainer.runs import config as config_lib
from trainer.runs import measure, publish
from trainer.steps import kl_routes, training
from trainer.steps.evaluation import Evaluator
from trainer.steps.optimizer import Optimizer

_IMAGES = np.zeros((600, 28, 28, 1), np.uint8)
# Configurations with operations of their own; together they have those of all.
_CASES = {
    "mnist": {},
    "mlp, importance samples, dynamic binarisation": {
        "architecture": "mlp",
        "num_importance_samples": 5,
        "binarize": "dynamic",
    },
    "mixed_float16, clipping": {"precision": "mixed_float16", "clip_norm": 1.0},
    "mixed_bfloat16, free bits, schedules": {
        "precision": "mixed_bfloat16",
        "free_bits": 0.1,
        "beta_warmup_steps": 10,
        "learning_rate_schedule": "cosine",
        "learning_rate_warmup_steps": 5,
    },
    "XLA": {"jit_compile": True, "clip_norm": 1.0},
    "continuous Bernoulli": {"likelihood": "continuous_bernoulli", "activation": "gelu"},
    "Gaussian": {"likelihood": "gaussian"},
}


@pytest.fixture(scope="module", autouse=True)
def soft_placement():
    """What is placed on a GPU while a graph is made lies on the CPU of a machine without one."""
    before = tf.config.get_soft_device_placement()
    tf.config.set_soft_device_placement(True)
    yield
    tf.config.set_soft_device_placement(before)


def steps_on_gpus(num_gpus: int, **changes) -> training.TrainingSteps:
    config = mnist.get_config()
    for key, value in changes.items():
        config[key] = value
    config = config_lib.resolve(config, _IMAGES.shape[1:])
    strategy = tf.distribute.MirroredStrategy([f"GPU:{number}" for number in range(num_gpus)])
    with gpu_graphs.variables_as_placed(), strategy.scope():
        vae = VAE(config, _IMAGES.shape[1:])
        optimizer = Optimizer(config, vae, total_steps=100)
        return training.make(Evaluator(config, strategy, vae), optimizer)


def arguments_of(evaluator: Evaluator) -> tuple:
    visit = placement.OnDevice(evaluator.strategy, _IMAGES).visit(
        np.arange(len(_IMAGES), dtype=np.int32)
    )
    records, first = visit.batches(0, 4)
    return records, first, tf.constant(0), tf.constant(4)


@functools.cache
def operations_of(num_gpus: int, case: str, name: str = "train") -> list[gpu_graphs.Operation]:
    """The operations of `TapeSteps.train` or `Evaluator.evaluate`."""
    steps = steps_on_gpus(num_gpus, **_CASES[case])
    function = {"train": steps.train, "evaluate": steps.evaluator.evaluate}[name]
    with gpu_graphs.variables_as_placed():
        function = function.get_concrete_function(*arguments_of(steps.evaluator))
    return gpu_graphs.operations_of(function)


@pytest.mark.parametrize(
    "num_gpus, case",
    [
        *((1, case) for case in list(_CASES)[:3]),
        (2, "mnist"),
        *(pytest.param(1, case, marks=pytest.mark.long) for case in list(_CASES)[3:]),
        *(pytest.param(2, case, marks=pytest.mark.long) for case in list(_CASES)[1:]),
        *(pytest.param(8, case, marks=pytest.mark.long) for case in _CASES),
    ],
)
def test_a_gpu_has_a_kernel_for_every_operation(num_gpus, case):
    for name in ("train", "evaluate"):
        operations = operations_of(num_gpus, case, name)
        assert any(op.device == "GPU" and op.launches for op in operations)
        assert gpu_graphs.without_kernel(operations) == {}
    evaluator = steps_on_gpus(num_gpus, **_CASES[case]).evaluator
    estimate = measure.LogLikelihood(evaluator, 30)
    with gpu_graphs.variables_as_placed():
        function = estimate.estimate_replicas.get_concrete_function(*arguments_of(evaluator)[:3])
    assert gpu_graphs.without_kernel(gpu_graphs.operations_of(function)) == {}


@pytest.mark.parametrize("route", [name for name in kl_routes.NAMES if name != "gradient_tape"])
def test_a_gpu_has_a_kernel_for_every_operation_of_a_route(route):
    steps = steps_on_gpus(1, kl_route=route)
    number, size = tf.TensorSpec((32,), tf.int32), tf.TensorSpec((32,), tf.float32)
    inputs = {
        "images": tf.TensorSpec((32, *_IMAGES.shape[1:]), tf.float32),
        "places": number,
        "step": number,
        "weights": size,
        "beta": size,
    }

    @tf.function(autograph=False)
    def train_step(inputs, weights):
        given = (inputs, kl_routes.targets(route, inputs), weights)
        return steps.evaluator.strategy.run(steps.model.train_step, args=(given,))

    with gpu_graphs.variables_as_placed():
        function = train_step.get_concrete_function(inputs, size)
    operations = gpu_graphs.operations_of(function)
    assert sum(op.type == "ResourceApplyAdam" for op in operations) == 18
    assert gpu_graphs.without_kernel(operations) == {}


def test_a_gpu_has_a_kernel_for_every_operation_of_a_published_model():
    config = mnist.get_config()
    with gpu_graphs.variables_as_placed(), tf.device("GPU:0"):
        vae = VAE(config, _IMAGES.shape[1:])
        for function, specification in publish.signatures(vae, config, _IMAGES.shape[1:]).values():
            traced = tf.function(function).get_concrete_function(*specification)
            assert gpu_graphs.without_kernel(gpu_graphs.operations_of(traced)) == {}


def test_what_lacks_a_kernel_is_found():
    @tf.function
    def gather(images, rows):
        with tf.device("GPU:0"):
            return tf.gather(images, rows)

    traced = gather.get_concrete_function(
        tf.TensorSpec((600, 28, 28, 1), tf.uint8), tf.TensorSpec((32,), tf.int32)
    )
    lacking = gpu_graphs.without_kernel(gpu_graphs.operations_of(traced))
    assert lacking == {"GatherV2(int32, int32, uint8)": 1}


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_launches_of_a_step(num_gpus):
    operations = operations_of(num_gpus, "mnist")
    types = collections.Counter(op.type for op in operations)
    assert gpu_graphs.launches_per_step(operations) / num_gpus <= 155
    assert types["Pow"] == 2 * num_gpus  # Adam's powers, once a step and not for each variable.
    # All gradients of a step in one, for each device.
    assert types["CollectiveReduceV2"] == (num_gpus if num_gpus > 1 else 0)


def test_xla_takes_a_replicas_step_but_for_gather_noise_and_rates():
    operations = [
        op
        for op in operations_of(1, "XLA")
        if op.launches and op.function.startswith("while_body") and op.device != "CPU"
    ]
    assert gpu_graphs.launches_per_step(operations) <= 20
    types = {op.type for op in operations}
    assert {"GatherV2", "StatelessRandomNormalV2", "Pow"} <= types
    assert not types & {"Conv2D", "MatMul", "ResourceApplyAdam"}


def test_the_loop_stays_on_the_host():
    operations = operations_of(2, "mnist")
    condition = [op for op in operations if op.function.startswith("while_cond")]
    assert {"Less", "LogicalAnd", "LogicalNot"} <= {op.type for op in condition}
    assert {op.device for op in condition} == {"CPU"}
    body = [op for op in operations if op.function.startswith("while_body")]
    control = [op for op in body if op.type == "TensorListSetItem" or op.dtypes == ("bool",)]
    control = [op for op in control if op.type != "ReadVariableOp"]  # It is where its variable is.
    assert control and {op.device for op in control} == {"CPU"}


@pytest.mark.parametrize("shape", [(28, 28, 1), (5, 3, 1), (1, 1, 1), (4, 4, 3)])
def test_words_hold_the_images(shape):
    images = np.random.default_rng(0).integers(0, 256, (7, *shape)).astype(np.uint8)
    rows = np.array([6, 0, 3, 3], np.int32)
    gathered = placement.gather_images(
        tf.constant(placement.to_words(images)), tf.constant(rows), shape
    )
    np.testing.assert_array_equal(gathered, images[rows])


@pytest.mark.parametrize(
    "free_mib, num_bytes, fits, told",
    [
        (
            80_000,
            1 << 30,
            True,
            "80,000 MiB free on the smallest GPU, of which images may take 25%",
        ),
        (80_000, 30 << 30, False, "30,720 MiB of images, 80,000 MiB free on the smallest GPU"),
        (None, 1, False, "set --config.data_placement=device"),
    ],
)
def test_images_lie_on_gpus_where_they_fit(tmp_path, monkeypatch, free_mib, num_bytes, fits, told):
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\necho {free_mib}\n" if free_mib else "#!/bin/sh\nexit 9\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpus.free_bytes.cache_clear()
    strategy = tf.distribute.MirroredStrategy(["GPU:0", "GPU:1"])
    answer, reason = placement.fits_devices(strategy, num_bytes)
    gpus.free_bytes.cache_clear()
    assert (answer, told in reason) == (fits, True), reason
