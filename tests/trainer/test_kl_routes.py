"""Five routes, one path; and the recipe that none of them is."""

import json
import pathlib
import re
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.cli.errors import UsageError
from tests.conftest import assert_same_run, make_embeddings, smoke_config, state_of
from tests.faults.interrupting import STEP_OF_FIT, At
from tests.faults.interrupting import train as train_apart
from tests.trainer.test_train import assert_same_path, lines_of
from trainer.cluster import strategies
from trainer.data import batches
from trainer.model.networks import VAE
from trainer.runs import config as config_lib
from trainer.runs import train
from trainer.steps import kl_routes, training
from trainer.steps.evaluation import Evaluator
from trainer.steps.optimizer import Optimizer

BY_FIT = [name for name in kl_routes.NAMES if name != "gradient_tape"]
IMAGE_SHAPE = (12, 8, 1)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    # 10 batches of 27 and a short one of 2.
    return np.random.default_rng(3).integers(0, 256, (272, *IMAGE_SHAPE)).astype(np.uint8)


class Trial:
    """The steps of a route on images, without the run around them."""

    def __init__(self, images: np.ndarray, **changes):
        config = smoke_config("unused", **changes)
        self.num_batches = batches.steps_per_epoch(len(images), config.batch_size)
        strategy = strategies.make(config)
        with strategy.scope():
            self.vae = VAE(config, IMAGE_SHAPE)
            self.optimizer = Optimizer(config, self.vae, total_steps=100)
        self.steps = training.make(Evaluator(config, strategy, self.vae), self.optimizer)
        self.visit = self.steps.place(images, num_bytes=images.nbytes).visit(
            np.random.default_rng(4).permutation(len(images)).astype(np.int32)
        )
        variables = [*self.vae.variables, *self.optimizer.variables.values()]
        self._start = [(variable, variable.numpy()) for variable in variables]

    def train(self, *, step: int, first_batch: int, num_steps: int) -> np.ndarray:
        """Rows of loss, reconstruction_loss, kl, num_examples, all of them sums."""
        rows = []
        at = {"step": step, "first_batch": first_batch, "num_steps": num_steps}
        assert not self.steps.train_some(self.visit, on_rows=rows.extend, **at)
        return np.array(rows)

    def first_step(self, *, batch: int) -> dict[str, np.ndarray]:
        """Sums and all gradients of step `batch`, from the weights of the start."""
        for variable, value in self._start:
            variable.assign(value)
        (row,) = self.train(step=batch, first_batch=batch, num_steps=1)
        sums = dict(zip(("loss", "reconstruction_loss", "kl", "num_examples"), row, strict=True))
        # From nothing Adam's first moment comes to 0.1 · gradient.
        moments = {
            n: v.numpy() for n, v in self.optimizer.variables.items() if n.endswith("_momentum")
        }
        assert len(moments) == len(self.vae.variables)
        return sums | moments


def assert_close(values, expected, tolerance):
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(values[name] - value).max()
        assert error <= tolerance * np.abs(value).max(), (name, error, np.abs(value).max())


@pytest.mark.parametrize(
    ("numbers", "changes", "tolerance"),
    [
        ((0, 10), {}, 1e-5),
        # In batch 10, the short one, one replica has nothing; in step 0 beta is 0.
        ((0, 3, 10), {"num_virtual_devices": 2, "beta": 2.0, "beta_warmup_steps": 6}, 1e-5),
        ((1,), {"num_virtual_devices": 3, "free_bits": 0.05, "binarize": "dynamic"}, 1e-5),
        ((1,), {"likelihood": "gaussian", "architecture": "mlp", "strategy": "one_device"}, 1e-5),
        # bfloat16 has 8 bits of mantissa.
        ((1,), {"precision": "mixed_bfloat16", "num_virtual_devices": 2}, 2**-8),
    ],
    ids=["1 replica", "2 replicas, warm-up", "3 replicas, free bits", "mlp", "mixed_bfloat16"],
)
def test_loss_terms_and_gradients_are_equal(images, numbers, changes, tolerance):
    expected = Trial(images, **changes)
    expected = {batch: expected.first_step(batch=batch) for batch in numbers}
    for route in BY_FIT:
        trial = Trial(images, kl_route=route, **changes)
        for batch in numbers:
            values = trial.first_step(batch=batch)
            assert values["num_examples"] == (2 if batch == 10 else 27)
            assert_close(values, expected[batch], tolerance)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        # Shares of 1/32 and, in the last batch, 1/16 are exact, and so is all the rest.
        ({"batch_size": 32}, 0.0),
        ({"num_virtual_devices": 2, "learning_rate_schedule": "cosine"}, 1e-4),
        pytest.param(
            {"num_virtual_devices": 2, "precision": "mixed_bfloat16"},
            2**-6,
            marks=pytest.mark.long,
        ),
    ],
    ids=["1 replica", "2 replicas", "mixed_bfloat16"],
)
def test_50_steps_and_more_end_in_the_same_weights(images, changes, tolerance):
    weights, last_rows = {}, {}
    for route in kl_routes.NAMES:
        trial = Trial(images, kl_route=route, beta_warmup_steps=20, **changes)
        count = trial.num_batches
        for epoch in range(-(-50 // count)):
            rows = trial.train(step=epoch * count, first_batch=0, num_steps=count)
        weights[route] = {variable.path: variable.numpy() for variable in trial.vae.variables}
        last_rows[route] = {"rows": rows}
    for route in BY_FIT:
        assert_close(weights[route], weights["gradient_tape"], tolerance)
        assert_close(last_rows[route], last_rows["gradient_tape"], max(tolerance, 1e-6))


@pytest.fixture(scope="module")
def fitted(data_dir, tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished run by fit."""
    workdir = tmp_path_factory.mktemp("fitted") / "run"
    train.train(smoke_config(data_dir, kl_route="model_add_loss"), workdir=str(workdir))
    return workdir


@pytest.mark.parametrize(
    "at",
    [
        At("checkpoint", 3, signal.SIGKILL),
        At(STEP_OF_FIT, 3, signal.SIGTERM),
        pytest.param(At("training", 2, signal.SIGKILL), marks=pytest.mark.long),
        pytest.param(At(STEP_OF_FIT, 11, signal.SIGINT), marks=pytest.mark.long),
    ],
    ids=lambda at: f"{at.phase} {at.number.name}",
)
def test_a_run_by_fit_resumes_to_the_last_bit(data_dir, fitted, tmp_path, at):
    workdir, log = tmp_path / "run", tmp_path / "log"
    flags = ["--config=configs/smoke.py", "--config.batch_size=27", f"--workdir={workdir}"]
    flags += [f"--config.data_dir={data_dir}", "--config.kl_route=model_add_loss"]
    status = train_apart(flags, log=log, at=at)
    text = log.read_text()
    assert status == (-signal.SIGKILL if at.number == signal.SIGKILL else 75), text
    if at.number != signal.SIGKILL:
        step = int(re.search(r"stopped by a signal at step (\d+) of 22, state saved", text)[1])
        assert at.call <= step <= at.call + 2  # After the step under way.
    config = smoke_config(data_dir, kl_route="model_add_loss")
    train.train(config, workdir=str(workdir))
    assert_same_run(workdir, fitted)


def test_a_run_by_fit_reports_what_ours_does(fitted, trained):
    assert_same_path(fitted, trained)
    manifests = [
        json.loads((workdir / "export" / "manifest.json").read_text())
        for workdir in (fitted, trained)
    ]
    assert manifests[0].keys() == manifests[1].keys()
    names = [list(state_of(workdir)) for workdir in (fitted, trained)]
    assert names[0] == names[1]


def test_data_in_a_mapped_file_change_nothing(data_dir, fitted, tmp_path):
    config = smoke_config(data_dir, kl_route="model_add_loss", data_placement="memory_mapped")
    train.train(config, workdir=str(tmp_path))
    assert_same_run(tmp_path, fitted)


def test_another_route_is_another_run(data_dir, fitted):
    with pytest.raises(UsageError, match="kl_route"):
        train.train(smoke_config(data_dir, kl_route="output_layer"), workdir=str(fitted))


def test_its_model_is_exported_like_any_other(data_dir, fitted, tmp_path):
    assert (
        make_embeddings(data_dir, fitted / "export", tmp_path / "out")["records"]["written"] == 50
    )
    assert {line["split"] for line in lines_of(fitted)} == {"train", "validation", "test"}


def test_a_loss_that_diverges_ends_fit_at_its_step(data_dir, tmp_path):
    config = smoke_config(data_dir, kl_route="encoder_layer", learning_rate=1e30)
    with pytest.raises(Exception, match=r"the loss is NaN or infinite in step 2 \(steps 2 to"):
        train.train(config, workdir=str(tmp_path))


@pytest.mark.parametrize("route", BY_FIT)
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_importance_samples", 5, "1 for kl_route .*, since the importance-weighted bound has"),
        ("clip_norm", 1.0, "0 for kl_route .*, since Keras clips the gradients of each replica"),
        ("precision", "mixed_float16", "float32 or mixed_bfloat16 for kl_route"),
        ("jit_compile", True, "False for kl_route"),
        ("strategy", "multi_worker", "mirrored or one_device for kl_route"),
        ("data_placement", "device", "auto or memory_mapped for kl_route"),
    ],
)
def test_what_fit_cannot_honour_is_refused_with_the_config(route, key, value, expected):
    with pytest.raises(UsageError, match=f"--config.{key}={value}: expected {expected}"):
        config_lib.check(smoke_config("unused", kl_route=route, **{key: value}))


def test_an_unknown_route_lists_all_five():
    with pytest.raises(UsageError, match=f"one of {', '.join(kl_routes.NAMES)}"):
        config_lib.check(smoke_config("unused", kl_route="add_metric"))


# The classic recipe, in which a layer or a loss finds mean and log_var by itself.


def kl(mean, log_var):
    return 0.5 * tf.reduce_sum(tf.math.expm1(log_var) - log_var + tf.square(mean), axis=1)


class ClosesOver(keras.layers.Layer):
    def __init__(self, *tensors):
        super().__init__()
        self.tensors = tensors

    def call(self, z):
        self.add_loss(tf.reduce_mean(kl(*self.tensors)))
        return z


class IsPassed(keras.layers.Layer):
    def call(self, z, *tensors):
        self.add_loss(tf.reduce_mean(kl(*tensors)))
        return z


def fit_with(make_model) -> None:
    inputs = keras.Input((4,))
    mean, log_var = (keras.layers.Dense(2)(inputs) for _ in range(2))
    model = make_model(inputs, mean, log_var)
    x = np.ones((8, 4), np.float32)
    model.fit(x, x, verbose=0)


def with_layer_that_closes_over(inputs, mean, log_var):
    model = keras.Model(inputs, keras.layers.Dense(4)(ClosesOver(mean, log_var)(mean)))
    model.compile("sgd", "mse")
    return model


def with_loss_that_closes_over(inputs, mean, log_var):
    model = keras.Model(inputs, keras.layers.Dense(4)(mean))
    model.compile("sgd", lambda x, y: tf.reduce_mean(tf.square(x - y), axis=1) + kl(mean, log_var))
    return model


def with_add_loss_of_placeholders(inputs, mean, log_var):
    model = keras.Model(inputs, keras.layers.Dense(4)(mean))
    model.add_loss(tf.reduce_mean(kl(mean, log_var)))
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize(
    "recipe",
    [
        with_layer_that_closes_over,
        with_loss_that_closes_over,
        with_add_loss_of_placeholders,
    ],
)
def test_a_loss_that_is_not_passed_its_tensors_still_fails(recipe):
    with pytest.raises(ValueError, match="A KerasTensor cannot be used as input to a TensorFlow"):
        fit_with(recipe)


def test_the_same_layer_works_once_it_is_passed_them():
    def make_model(inputs, mean, log_var):
        model = keras.Model(inputs, keras.layers.Dense(4)(IsPassed()(mean, mean, log_var)))
        model.compile("sgd", "mse")
        return model

    fit_with(make_model)
