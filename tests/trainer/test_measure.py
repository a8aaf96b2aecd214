"""The measurement of a model, against NumPy and on other numbers of replicas."""

import json

import numpy as np
import pytest

from pipeline.cli.errors import StageError
from pipeline.datasets import reader
from tests.conftest import smoke_config
from tests.forked import run_command
from trainer.model import weights
from trainer.runs import measure, train


@pytest.fixture(scope="module")
def mlp(data_dir, tmp_path_factory):
    """A small MLP with 2 latents, whose log-likelihood can be integrated."""
    workdir = tmp_path_factory.mktemp("mlp") / "run"
    config = smoke_config(
        data_dir,
        architecture="mlp",
        activation="tanh",
        latent_dim=2,
        beta=1.0,
        binarize="static",
        num_epochs=30,
        learning_rate=1e-2,
    )
    train.train(config, workdir=str(workdir))
    return workdir / "export"


def log_likelihood_by_quadrature(model_dir, pixels):
    """log p(x) of an MLP with 2 latents, tanh and Bernoulli pixels: a sum over a grid of z."""
    arrays = {
        name: value.astype(np.float64)
        for name, value in weights.read(str(model_dir), "model_dir").arrays.items()
    }
    axis = np.linspace(-6, 6, 301)
    z = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    hidden = z
    for name in ("decoder_dense_0", "decoder_dense_1", "logits"):
        hidden = hidden @ arrays[f"{name}/kernel"] + arrays[f"{name}/bias"]
        hidden = hidden if name == "logits" else np.tanh(hidden)
    log_prior = -0.5 * (z**2).sum(1) - np.log(2 * np.pi)
    softplus = np.logaddexp(0, hidden).sum(1)
    cell = (axis[1] - axis[0]) ** 2
    log_likelihoods = []
    for x in pixels.reshape(len(pixels), -1).astype(np.float64):
        log_joint = hidden @ x - softplus + log_prior
        top = log_joint.max()
        log_likelihoods.append(top + np.log(np.exp(log_joint - top).sum() * cell))
    return np.array(log_likelihoods)


def test_the_estimate_is_the_integral(mlp, data_dir):
    from trainer.data import batches

    images = reader.Dataset(str(data_dir)).read_images("test")
    batches.binarize_once(images, seed=0, split="test")
    exact = log_likelihood_by_quadrature(mlp, images / 255).mean()
    inputs = {"model_dir": str(mlp), "data_dir": str(data_dir), "split": "test"}
    estimate = measure.measure(**inputs, num_importance_samples=40_000)
    # What 40,000 samples leave of chance; see the next test for one where they leave less.
    assert estimate["log_likelihood"] == pytest.approx(exact, abs=1e-2)
    # The bound rises with the number of samples, and with one it is the ELBO up to its noise.
    estimates = [
        measure.measure(**inputs, num_importance_samples=k)["log_likelihood"] for k in (1, 30)
    ]
    assert estimates[0] < estimates[1] < exact
    assert estimates[0] == pytest.approx(estimate["elbo"], rel=0.02)


def test_the_estimate_is_exact_where_the_integral_is_known(data_dir, tmp_path):
    # Probabilistic PCA: a linear Gaussian decoder, whose p(x) is N(bias, W Wᵀ + σ² I), with an
    # encoder that misses its posterior in mean and width.
    from trainer.model.networks import VAE
    from trainer.runs import publish

    std, num_pixels, generator = 0.3, 96, np.random.default_rng(0)
    config = smoke_config(
        "",
        architecture="mlp",
        hidden_units=(2,),
        activation="linear",
        latent_dim=2,
        likelihood="gaussian",
        gaussian_std=std,
    )
    loadings = np.linalg.qr(generator.normal(size=(num_pixels, 2)))[0] * [0.8, 0.4]
    bias = np.full(num_pixels, 0.4)
    precision = (loadings**2).sum(0) + std**2  # Of the posterior, times σ²: diagonal.
    to_mean = loadings / precision
    values = {
        "encoder_dense_0": (to_mean, -bias @ to_mean + [0.05, -0.05]),
        "mean": (np.eye(2), np.zeros(2)),
        "log_var": (np.zeros((2, 2)), 2 * np.log(1.2 * std / np.sqrt(precision))),
        "decoder_dense_0": (np.eye(2), np.zeros(2)),
        "logits": (loadings.T, bias),
    }
    names = [variable.path.split("/") for variable in VAE(config, (12, 8, 1)).variables]
    publish.publish_model(
        str(tmp_path / "model"),
        config=config,
        run={"dataset_id": "", "config": {}},
        image_shape=(12, 8, 1),
        class_names=[],
        weights=[values[layer][kind == "bias"] for layer, kind in names],
        step=0,
        trained_steps=0,
        metrics={},
        records={},
    )
    x = reader.Dataset(str(data_dir)).read_images("test").reshape(50, -1) / 255 - bias
    covariance = loadings @ loadings.T + std**2 * np.eye(num_pixels)
    exact = -0.5 * (
        (x @ np.linalg.inv(covariance) * x).sum(1)
        + np.linalg.slogdet(2 * np.pi * covariance).logabsdet
    )
    inputs = {"model_dir": str(tmp_path / "model"), "data_dir": str(data_dir), "split": "test"}
    estimate = measure.measure(**inputs, num_importance_samples=100_000)
    assert estimate["log_likelihood"] == pytest.approx(exact.mean(), abs=1e-3)


def test_replicas_measure_the_same(mlp, data_dir):
    measurements = [
        measure.measure(
            model_dir=str(mlp),
            data_dir=str(data_dir),
            split="train",  # 272 images: a whole batch and a short one.
            num_importance_samples=30,
            num_virtual_devices=replicas,
        )
        for replicas in (0, 3)
    ]
    assert measurements[0]["num_examples"] == 272
    for key, value in measurements[0].items():
        assert measurements[1][key] == (
            pytest.approx(value, rel=1e-5) if type(value) is float else value
        )


def test_the_command_prints_a_table_and_writes_json(trained, data_dir, tmp_path):
    path = tmp_path / "measured.json"
    done = run_command(
        "trainer.evaluate",
        f"--model_dir={trained}/export",
        f"--data_dir={data_dir}",
        "--num_importance_samples=3",
        f"--output_file={path}",
    )
    measurements = json.loads(path.read_text())
    assert f"{measurements['log_likelihood']:.2f} nats, with 3 samples an image" in done.stdout
    assert "active_units" in done.stdout
    assert done.stderr == ""
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    # Other noise, since it is drawn in batches of another size.
    assert measurements["elbo"] == pytest.approx(last["elbo"], rel=1e-3)
    assert (
        measurements["model_id"]
        == json.loads((trained / "export/manifest.json").read_text())["model_id"]
    )


def test_what_does_not_fit(mlp, data_dir, tmp_path):
    from tests.conftest import make_idx_set, make_shards

    make_idx_set(tmp_path / "idx", num_train=20, num_test=5, size=(4, 4))
    make_shards(f"idx:{tmp_path}/idx", tmp_path / "small", num_shards=1)
    inputs = {"model_dir": str(mlp), "num_importance_samples": 1}
    with pytest.raises(StageError, match=r"the model is for images of \(12, 8, 1\)"):
        measure.measure(**inputs, data_dir=str(tmp_path / "small"), split="test")
    with pytest.raises(StageError, match="--split=all"):
        measure.measure(**inputs, data_dir=str(data_dir), split="all")
