"""Likelihoods of an image given a decoder's output: log-likelihood and mean, by name.

Pure functions of images and the decoder's output, which is called logits for every
likelihood. The other terms of the objective are in losses.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import tensorflow as tf

# Axes of an image in a tensor (..., H, W, C).
_IMAGE_AXES = (-3, -2, -1)
# Below this, series replace differences of large numbers that nearly cancel: with three terms
# their error is below float32's.
_NEAR_ZERO = 0.3


class Likelihood(NamedTuple):
    """p(x | z) of an image, its pixels independent of each other."""

    # images (..., H, W, C) in [0, 1], logits of the same shape up to broadcasting ->
    # −log p(x | z), nats per image, float32 (...,). Negative where p is a density above 1.
    negative_log: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    # logits -> expected image in [0, 1], of the same shape.
    mean: Callable[[tf.Tensor], tf.Tensor]


def _bernoulli_negative_log(images: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Σ_pixels BCE(x, sigmoid(logits)).

    Kingma and Welling (2014), "Auto-Encoding Variational Bayes", appendix C.1. An x between
    0 and 1 counts as the probability of a white pixel: the term is then the mean over images
    binarised with these probabilities.
    """
    # softplus(l) − x·l is −x·log σ(l) − (1 − x)·log(1 − σ(l)). The derivative is written out
    # since TensorFlow's derivative takes twice as many passes over the pixels of every sample.

    @tf.custom_gradient
    def cross_entropy(logits: tf.Tensor):
        def derivative(upstream: tf.Tensor) -> tf.Tensor:
            return (tf.sigmoid(logits) - images) * upstream[..., tf.newaxis, tf.newaxis, tf.newaxis]

        return tf.reduce_sum(tf.nn.softplus(logits) - images * logits, axis=_IMAGE_AXES), derivative

    return cross_entropy(logits)


def _split_at_zero(logits: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A mask of logits near 0, and the logits with 1 there, so that no gradient is NaN."""
    near = tf.abs(logits) < _NEAR_ZERO
    return near, tf.where(near, tf.ones_like(logits), logits)


def _continuous_bernoulli_negative_log(images: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Bernoulli's term with the constant that makes p(x | z) a density on [0, 1].

    Loaiza-Ganem and Cunningham (2019), "The continuous Bernoulli", equation 8:
    log C(λ) = log(2·atanh(1 − 2λ) / (1 − 2λ)); with λ = sigmoid(l) it is log(l / tanh(l/2)).
    """
    near, safe = _split_at_zero(logits)
    far = tf.abs(safe)
    square = tf.square(logits)
    log_constant = tf.where(
        near,
        math.log(2) + square * (1 / 12 - square * (7 / 1440 - square * 31 / 90720)),
        tf.math.log(far) - tf.math.log(tf.tanh(far / 2)),
    )
    per_pixel = tf.nn.softplus(logits) - images * logits - log_constant
    return tf.reduce_sum(per_pixel, axis=_IMAGE_AXES)


def _continuous_bernoulli_mean(logits: tf.Tensor) -> tf.Tensor:
    """Same paper, equation 8: λ / (2λ − 1) + 1 / (2·atanh(1 − 2λ)); 1/2 where λ is 1/2."""
    near, safe = _split_at_zero(logits)
    far = tf.sigmoid(safe) / tf.tanh(safe / 2) - 1 / safe
    square = tf.square(logits)
    series = 0.5 + logits * (1 / 12 - square * (1 / 720 - square / 30240))
    return tf.where(near, series, far)


def _gaussian(std: float) -> Likelihood:
    """N(logits, std²) for each pixel."""
    constant = math.log(std) + 0.5 * math.log(2 * math.pi)

    def negative_log(images: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        per_pixel = 0.5 * tf.square((images - logits) / std) + constant
        return tf.reduce_sum(per_pixel, axis=_IMAGE_AXES)

    return Likelihood(negative_log, lambda logits: tf.clip_by_value(logits, 0.0, 1.0))


_WITHOUT_SETTINGS = {
    "bernoulli": Likelihood(_bernoulli_negative_log, tf.sigmoid),
    "continuous_bernoulli": Likelihood(
        _continuous_bernoulli_negative_log, _continuous_bernoulli_mean
    ),
}
NAMES = (*_WITHOUT_SETTINGS, "gaussian")


def make(config: ml_collections.ConfigDict) -> Likelihood:
    """The likelihood of a config: its keys likelihood and gaussian_std."""
    if config.likelihood == "gaussian":
        return _gaussian(config.gaussian_std)
    return _WITHOUT_SETTINGS[config.likelihood]
