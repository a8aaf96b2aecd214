import ast
import importlib
import inspect
import pathlib
import re

import pytest

from pipeline.cli.errors import UsageError
from tests.conftest import REPOSITORY, smoke_config
from trainer.runs import config as config_lib

NAMES = sorted(p.stem for p in (REPOSITORY / "configs").glob("*.py") if p.stem != "__init__")


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


def test_all_configs_are_there():
    assert NAMES == ["fashion_mnist", "mnist", "mnist_likelihood", "mnist_z2", "rgb", "smoke"]


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_valid_locked_and_has_the_reference_keys(name):
    config = load(name)
    assert config.is_locked
    assert set(config) == set(load("mnist"))
    with pytest.raises(AttributeError, match="latent_dims"):
        config.latent_dims = 3
    config.data_dir = "somewhere"
    config_lib.check(config)


def test_every_key_is_commented_and_read():
    source = inspect.getsource(importlib.import_module("configs.mnist"))
    commented = set(re.findall(r"^ {4}config\.(\w+) = .*  # \w", source, re.MULTILINE))
    # The comments on these take two lines above them.
    assert commented | {"beta", "kl_route"} == set(load("mnist"))

    read = set()
    for path in pathlib.Path(REPOSITORY / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                if name in ("config", "_config"):
                    read.add(node.attr)
    assert set(load("mnist")) - read == set()


def test_a_free_key_exists():
    assert config_lib._FREE_KEYS < set(load("mnist"))


@pytest.mark.parametrize(
    ("name", "latent_dim"), [("mnist", 12), ("mnist_z2", 2), ("fashion_mnist", 16)]
)
def test_a_derived_beta_is_that_of_earlier_versions_to_the_last_bit(name, latent_dim):
    config = load(name)
    resolved = config_lib.resolve(config, (28, 28, 1))
    assert resolved.beta == 2 * 6.5e-4 * 28 * 28 / latent_dim
    assert (config.beta, config.latent_dim) == (None, latent_dim)
    assert resolved.is_locked and config_lib.resolve(resolved, (64, 64, 3)) is resolved


def test_a_derived_beta_follows_latents_and_images():
    config = load("mnist")
    config.latent_dim = 50
    assert config_lib.resolve(config, (28, 28, 1)).beta == 2 * 6.5e-4 * 28 * 28 / 50
    beta = config_lib.resolve(config, (64, 32, 3)).beta
    assert beta == pytest.approx(6.5e-4 * 2 * 64 * 32 * 3 / 50)


def test_configs_with_a_beta_of_their_own_keep_it():
    for name, beta in (("mnist_likelihood", 1.0), ("smoke", 2 * 6.5e-4 * 28 * 28 / 12)):
        assert config_lib.resolve(load(name), (12, 8, 1)).beta == beta


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data_dir", "", "name the output directory"),
        ("batch_size", 0, "at least 1"),
        ("num_virtual_devices", -1, "at least 0"),
        ("learning_rate", 0.0, "a number above 0"),
        ("learning_rate", float("nan"), "a number above 0"),
        ("beta", -1.0, "at least 0"),
        ("kl_route", "no_route", "one of gradient_tape"),
        ("strategy", "parameter_server", "one of mirrored, one_device, multi_worker"),
        ("precision", "float64", "one of float32, mixed_bfloat16"),
        ("batch_size", 3_000_000_000, "at most 1048576"),
        ("num_virtual_devices", 100_000, "at most 64"),
        ("activation", "glu", "that keeps the shape"),
        ("activation", "lru", "the name of an activation in keras.activations"),
        ("filters", (), "an integer of at least 1 for each layer"),
        ("filters", (4, 8, 16), "as many numbers as filters, which has 3"),
        ("strides", (2, 0), "an integer of at least 1"),
        ("hidden_units", (8, -1), "an integer of at least 1 for each layer"),
        ("architecture", "transformer", "one of convolutional, mlp"),
        ("likelihood", "poisson", "one of bernoulli, continuous_bernoulli, gaussian"),
        ("binarize", "yes", "one of none, static, dynamic"),
        ("data_placement", "gpu", "one of auto, device, memory_mapped"),
        ("learning_rate_schedule", "step", "one of constant, cosine"),
        ("learning_rate", float("inf"), "a number above 0"),
        ("gaussian_std", 0.0, "at least 0.0001"),
        ("beta", float("nan"), "at least 0"),
        ("free_bits", -0.5, "at least 0"),
        ("clip_norm", float("inf"), "at least 0, and finite"),
        ("num_importance_samples", 0, "at least 1"),
        ("early_stopping_patience", -1, "at least 0"),
        *(
            ("profile_steps", text, "=.*: expected FIRST:END with FIRST below END, as in 100:110")
            for text in ("100", "7:7", "9:3", "-1:3", "1:2:3", "a:b", "١:٢", " 1:2", f"1:{9**999}")
        ),
    ],
)
def test_values_out_of_range(key, value, expected):
    with pytest.raises(UsageError, match=expected):
        config_lib.check(smoke_config("somewhere", **{key: value}))


def test_settings_that_exclude_each_other():
    with pytest.raises(UsageError, match="binarize=dynamic: expected none, since likelihood is ga"):
        config_lib.check(smoke_config("x", binarize="dynamic", likelihood="gaussian"))
    with pytest.raises(UsageError, match="free_bits=0.5: expected 0"):
        config_lib.check(smoke_config("x", free_bits=0.5, num_importance_samples=5))


def test_what_stands_after_the_colon():
    mnist = importlib.import_module("configs.mnist")
    config = mnist.get_config("latent_dim=7")
    assert (config.latent_dim, config.beta) == (7, None)
    config = mnist.get_config("beta=0.5,latent_dim=3")
    assert (config.latent_dim, config.beta) == (3, 0.5)
    likelihood = importlib.import_module("configs.mnist_likelihood")
    assert likelihood.get_config("num_importance_samples=50").num_importance_samples == 50
    for text in ("latent_dims=7", "latent_dim=x", "7", "latent_dim=7,", "beta=1,beta=2"):
        with pytest.raises(ValueError, match="is not one of latent_dim=INT, beta=FLOAT"):
            mnist.get_config(text)
