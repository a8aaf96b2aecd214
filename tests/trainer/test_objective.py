"""The terms of the objective against float64, and what they promise."""

import math

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import smoke_config
from trainer.model import likelihoods, losses, objective
from trainer.model.networks import VAE
from trainer.steps import schedules

GENERATOR = np.random.default_rng(0)


def float32(*arrays):
    return [tf.constant(array, tf.float32) for array in arrays]


def expected_negative_log(name, x, logits, std=0.1):
    """The likelihoods' formulas as their papers have them, in float64."""
    if name == "gaussian":
        return 0.5 * ((x - logits) / std) ** 2 + math.log(std * math.sqrt(2 * math.pi))
    softplus = np.logaddexp(0, logits)
    if name == "bernoulli":
        return softplus - x * logits
    rate = 1 / (1 + np.exp(-logits))
    with np.errstate(all="ignore"):
        constant = np.where(
            np.abs(rate - 0.5) < 1e-5,
            2.0,
            2 * np.arctanh(1 - 2 * rate) / (1 - 2 * rate),
        )
    return softplus - x * logits - np.log(constant)


@pytest.mark.parametrize("name", likelihoods.NAMES)
@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_likelihoods_against_float64(name, scale):
    x = GENERATOR.random((40, 3, 2, 1))
    logits = GENERATOR.normal(0, scale, (40, 3, 2, 1))
    likelihood = likelihoods.make(smoke_config("", likelihood=name))
    expected = expected_negative_log(name, x, logits).sum((1, 2, 3))
    np.testing.assert_allclose(
        likelihood.negative_log(*float32(x, logits)), expected, rtol=2e-6, atol=1e-5
    )
    mean = likelihood.mean(*float32(logits)).numpy()
    assert 0 <= mean.min() <= mean.max() <= 1


@pytest.mark.parametrize("name", ["bernoulli", "continuous_bernoulli"])
def test_the_derivative_is_the_mean_less_the_image(name):
    # True of exponential families: the log-normaliser's derivative is the mean.
    likelihood = likelihoods.make(smoke_config("", likelihood=name))
    logits = np.concatenate([np.linspace(-20, 20, 4001), np.linspace(-0.5, 0.5, 2001), [0.0]])
    x, logits = float32(np.full((len(logits), 1, 1, 1), 0.3), logits.reshape(-1, 1, 1, 1))
    with tf.GradientTape() as tape:
        tape.watch(logits)
        value = likelihood.negative_log(x, logits)
    np.testing.assert_allclose(tape.gradient(value, logits), likelihood.mean(logits) - x, atol=2e-6)


def test_grey_pixels_stand_for_the_mean_over_binarised_ones():
    x, logits = float32(GENERATOR.random((1, 4, 4, 1)), GENERATOR.normal(size=(1, 4, 4, 1)))
    negative_log = likelihoods.make(smoke_config("")).negative_log
    binary = tf.cast(GENERATOR.random((20_000, 4, 4, 1)) < x, tf.float32)
    many = negative_log(binary, logits)
    np.testing.assert_allclose(tf.reduce_mean(many), negative_log(x, logits)[0], rtol=5e-3)


def test_kl_against_float64():
    mean, log_var = GENERATOR.normal(0, 2, (2, 4, 5))
    expected = 0.5 * (np.exp(log_var) + mean**2 - 1 - log_var)
    mean, log_var = float32(mean, log_var)
    np.testing.assert_allclose(losses.kl(mean, log_var), expected.sum(1), rtol=1e-5)
    floored = np.maximum(expected, 1.5).sum(1)
    np.testing.assert_allclose(losses.kl_with_free_bits(mean, log_var, 1.5), floored, rtol=1e-5)


def test_kl_is_never_negative_and_0_at_the_prior():
    tiny = tf.reshape(tf.linspace(-1e-3, 1e-3, 2001), (-1, 1))
    assert losses.kl(tf.zeros_like(tiny), tiny).numpy().min() >= 0
    assert losses.kl(tf.zeros((1, 7)), tf.zeros((1, 7))).numpy() == 0


def terms(config, noise, *, beta=1.0):
    """The terms of a few random images under a new model."""
    images = tf.constant(np.random.default_rng(1).random((6, 8, 8, 1)), tf.float32)
    vae = VAE(config, (8, 8, 1))
    mean, log_var = vae.encoder(images)
    log_var = log_var - 1  # Off the prior.
    options = {"config": config, "beta": tf.constant(beta)}
    return objective.terms(vae, images, mean, log_var, noise, **options)


def test_more_samples_make_a_tighter_bound():
    # Exactly so where the fewer are parts of the more: Jensen's inequality.
    noise = tf.random.stateless_normal((6, 64, 3), seed=[1, 2])

    def bound(k):
        config = smoke_config("", num_importance_samples=k)
        parts = [terms(config, noise[:, first : first + k]).loss for first in range(0, 64, k)]
        return tf.reduce_mean(tf.stack(parts), axis=0).numpy()  # (6,)

    assert (bound(2) >= bound(8)).all()
    assert (bound(8) >= bound(64)).all()


def test_weights_of_any_size_give_a_finite_bound():
    noise = tf.random.stateless_normal((6, 2, 3), seed=[1, 2])
    config = smoke_config("", num_importance_samples=2)
    assert np.isfinite(terms(config, noise * 1e4).loss).all()
    log_weights = tf.constant([[-1e30, -1e4, -1e4], [1e4, 1e4, 1e4], [-np.inf, 0.0, 0.0]])
    expected = [-1e4 + np.log(2 / 3), 1e4, np.log(2 / 3)]
    np.testing.assert_allclose(losses.log_mean_exp(log_weights), expected, rtol=1e-6)


def test_beta_and_free_bits_enter_the_loss_and_nothing_else():
    noise = tf.random.stateless_normal((6, 1, 3), seed=[1, 2])
    plain = terms(smoke_config(""), noise, beta=0.25)
    np.testing.assert_allclose(plain.loss, plain.reconstruction_loss + 0.25 * plain.kl, rtol=1e-6)
    free = terms(smoke_config("", free_bits=50.0), noise, beta=0.25)
    np.testing.assert_allclose(free.loss, free.reconstruction_loss + 0.25 * 150, rtol=1e-6)
    np.testing.assert_array_equal(free.kl, plain.kl)


def test_beta_rises_in_a_straight_line():
    config = smoke_config("", beta=0.5, beta_warmup_steps=10)
    betas = [float(schedules.beta(config, tf.constant(step))) for step in (0, 5, 10, 10**6)]
    assert betas == pytest.approx([0, 0.25, 0.5, 0.5])
    assert float(schedules.beta(smoke_config("", beta=0.5), tf.constant(0))) == 0.5


@pytest.mark.parametrize(
    ("name", "warmup_steps", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 10, [0, 0.5, 1, 1]),
        ("cosine", 0, [1, (1 + math.cos(math.pi * 5 / 110)) / 2, 0.5, 0]),
        ("cosine", 10, [0, 0.5, (1 + math.cos(math.pi * 0.45)) / 2, 0]),
    ],
)
def test_learning_rates(name, warmup_steps, expected):
    config = smoke_config(
        "",
        learning_rate=2.0,
        learning_rate_schedule=name,
        learning_rate_warmup_steps=warmup_steps,
    )
    schedule = schedules.learning_rate(config, 110)
    if isinstance(schedule, float):
        schedule = {step: schedule for step in (0, 5, 55, 110)}.__getitem__
    rates = [float(schedule(step)) for step in (0, 5, 55, 110)]
    assert rates == pytest.approx([2 * value for value in expected], abs=1e-6)


def test_adam_is_that_of_keras():
    import keras

    from trainer.steps.optimizer import Optimizer

    config = smoke_config("", learning_rate=0.01)
    vae = VAE(config, (8, 8, 1))
    optimizer = Optimizer(config, vae, total_steps=100)
    initial_values = [variable.numpy() for variable in vae.variables]
    keras_variables = [keras.Variable(value) for value in initial_values]
    adam = keras.optimizers.Adam(0.01)
    generator = np.random.default_rng(0)
    for _ in range(5):
        gradients = [
            tf.constant(generator.normal(0, 10.0 ** generator.integers(-9, 3), v.shape), tf.float32)
            for v in initial_values
        ]
        tf.distribute.get_strategy().run(optimizer.apply, args=(gradients,))
        adam.apply(gradients, keras_variables)
    for variable, keras_variable, initial_value in zip(
        vae.variables, keras_variables, initial_values, strict=True
    ):
        np.testing.assert_allclose(variable.numpy(), keras_variable.numpy(), rtol=1e-5, atol=1e-6)
        assert not np.array_equal(variable.numpy(), initial_value)


@pytest.mark.parametrize("size", [1e-4, 0.1, 3.0])
def test_derivatives_are_those_of_the_formulas(size):
    # All routes of the KL term share them, so no comparison of routes would find one wrong.
    generator = np.random.default_rng(0)
    mean, log_var = (generator.normal(0, size, (2, 5)) for _ in range(2))
    noise, upstream = (generator.normal(size=(2, 4, 5)) for _ in range(2))

    def gradients(dtype, kl, sample):
        inputs = [tf.constant(value, dtype) for value in (mean, log_var)]
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(inputs)
            kl_sum = tf.reduce_sum(kl(*inputs))
            z = sample(*inputs, tf.constant(noise, dtype)) * tf.constant(upstream, dtype)
        return [*tape.gradient(kl_sum, inputs), *tape.gradient(z, inputs)]

    expected = gradients(
        tf.float64,
        lambda m, v: 0.5 * (tf.exp(v) + m**2 - 1 - v),
        lambda m, v, e: m[:, None] + tf.exp(v / 2)[:, None] * e,
    )
    derivatives = gradients(tf.float32, losses.kl, objective.sample)
    for derivative, expected_derivative in zip(derivatives, expected, strict=True):
        np.testing.assert_allclose(derivative, expected_derivative, rtol=1e-5, atol=1e-6 * size)
