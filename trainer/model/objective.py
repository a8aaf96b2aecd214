"""The objective of training, per example: the VAE's, or the importance-weighted one."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
import tensorflow as tf

from trainer.model import likelihoods, losses
from trainer.model.networks import VAE


class Terms(NamedTuple):
    """The terms of n images, each float32 (n,), nats per image."""

    loss: tf.Tensor  # training minimises its mean
    reconstruction_loss: tf.Tensor  # the mean over samples where there are several
    kl: tf.Tensor


def kl_term(config: ml_collections.ConfigDict) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The term that beta multiplies in the loss of one sample: kl, or kl with free bits.

    Returns:
      mean, log_var, both float32 (n, latent_dim) -> float32 (n,), nats per image.
    """
    if config.free_bits:
        return functools.partial(losses.kl_with_free_bits, free_bits=config.free_bits)
    return losses.kl


def noise_shape(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Shape of the noise of one image: (samples, latent_dim)."""
    return config.num_importance_samples, config.latent_dim


@tf.custom_gradient
def _deviation(log_var: tf.Tensor, noise: tf.Tensor):
    """exp(log_var / 2) · noise, from log_var (n, 1, latent_dim)."""
    deviation = tf.exp(log_var / 2) * noise

    def derivative(upstream: tf.Tensor) -> tuple[tf.Tensor, None]:
        # One product; TensorFlow would make several, in an order that differs between graphs.
        return 0.5 * tf.reduce_sum(deviation * upstream, axis=1, keepdims=True), None

    return deviation, derivative


def sample(mean: tf.Tensor, log_var: tf.Tensor, noise: tf.Tensor) -> tf.Tensor:
    """Draws z = mean + exp(log_var / 2) · noise from the posteriors of n images.

    Kingma and Welling (2014), "Auto-Encoding Variational Bayes", section 2.4.

    Args:
      mean: float32 (n, latent_dim).
      log_var: float32 (n, latent_dim).
      noise: float32 (n, k, latent_dim), standard normal.

    Returns:
      float32 (n, k, latent_dim).
    """
    return mean[:, tf.newaxis] + _deviation(log_var[:, tf.newaxis], noise)


class Samples(NamedTuple):
    """k draws from the posteriors of n images, each float32 (n, k), in nats."""

    negative_log: tf.Tensor  # −log p(x | z)
    toward_prior: tf.Tensor  # log p(z) − log q(z | x)


def draw(
    vae: VAE,
    images: tf.Tensor,
    mean: tf.Tensor,
    log_var: tf.Tensor,
    noise: tf.Tensor,
    likelihood: likelihoods.Likelihood,
) -> Samples:
    """Draws k samples for each of n images and decodes them.

    Args:
      vae: the model.
      images: float32 (n, H, W, C) in [0, 1].
      mean: float32 (n, latent_dim).
      log_var: float32 (n, latent_dim).
      noise: float32 (n, k, latent_dim), standard normal.
      likelihood: of an image given z.
    """
    num_samples, latent_dim = noise.shape[1:]
    z = sample(mean, log_var, noise)  # (n, k, latent_dim)
    logits = vae.decoder(tf.reshape(z, (-1, latent_dim)))  # (n·k, H, W, C)
    logits = tf.reshape(logits, (-1, num_samples, *logits.shape[1:]))
    return Samples(
        likelihood.negative_log(images[:, tf.newaxis], logits),
        losses.log_prior_to_posterior(z, noise, log_var),
    )


def terms(
    vae: VAE,
    images: tf.Tensor,
    mean: tf.Tensor,
    log_var: tf.Tensor,
    noise: tf.Tensor,
    *,
    config: ml_collections.ConfigDict,
    beta: tf.Tensor,
) -> Terms:
    """The terms of images, given the images' posteriors.

    With one sample the loss is reconstruction_loss + beta · kl, with kl in closed form (and
    with free bits, if config has them). With k samples the loss is
    −log 1/k Σ exp(log p(x|z) + beta · (log p(z) − log q(z|x))), which is the bound of Burda,
    Grosse and Salakhutdinov (2016), "Importance Weighted Autoencoders", at beta 1.

    Args:
      vae: the model.
      images: float32 (n, H, W, C) in [0, 1].
      mean: float32 (n, latent_dim).
      log_var: float32 (n, latent_dim).
      noise: float32 (n, *noise_shape(config)).
      config: likelihood, num_importance_samples, free_bits.
      beta: float32 scalar, weight of the KL term.
    """
    samples = draw(vae, images, mean, log_var, noise, likelihoods.make(config))
    reconstruction_loss = tf.reduce_mean(samples.negative_log, axis=1)
    kl = losses.kl(mean, log_var)
    if config.num_importance_samples > 1:
        loss = -losses.log_mean_exp(beta * samples.toward_prior - samples.negative_log)
    else:
        loss = reconstruction_loss + beta * kl_term(config)(mean, log_var)
    return Terms(loss, reconstruction_loss, kl)
