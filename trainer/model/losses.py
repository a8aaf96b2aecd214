"""The terms of the objective but the likelihood's, per example, in nats. Pure functions.

The likelihoods are in likelihoods.py.
"""

import tensorflow as tf


@tf.custom_gradient
def _excess(log_var: tf.Tensor):
    """½ (exp(log_var) − 1 − log_var), the variance's part of the divergence."""
    # expm1(v) − v ≥ 0 even in float32, where exp(v) − 1 − v can round below 0.
    variance_minus_1 = tf.math.expm1(log_var)

    def derivative(upstream: tf.Tensor) -> tf.Tensor:
        # TensorFlow would subtract ½ from ½ exp(v), and near v = 0, where training begins, the
        # difference has lost most of its digits.
        return 0.5 * variance_minus_1 * upstream

    return 0.5 * (variance_minus_1 - log_var), derivative


def kl_per_latent(mean: tf.Tensor, log_var: tf.Tensor) -> tf.Tensor:
    """Kullback-Leibler divergence of N(mean, exp(log_var)) from N(0, 1).

    ½ (exp(log_var) + mean² − 1 − log_var), Kingma and Welling (2014), "Auto-Encoding
    Variational Bayes", appendix B.

    Args:
      mean: float32 (n, latent_dim).
      log_var: float32 (n, latent_dim).

    Returns:
      float32 (n, latent_dim), nats, ≥ 0.
    """
    return _excess(log_var) + 0.5 * tf.square(mean)


def kl(mean: tf.Tensor, log_var: tf.Tensor) -> tf.Tensor:
    """`kl_per_latent` summed over the latents: float32 (n,), nats per image, ≥ 0."""
    return tf.reduce_sum(kl_per_latent(mean, log_var), axis=1)


def kl_with_free_bits(mean: tf.Tensor, log_var: tf.Tensor, free_bits: float) -> tf.Tensor:
    """The KL term with a floor of `free_bits` nats for each latent.

    Σ_latents max(free_bits, kl_per_latent), Kingma et al. (2016), "Improved Variational
    Inference with Inverse Autoregressive Flow", equation 15. They take the mean over a minibatch
    first; the term here is per example, so it does not depend on how replicas divide a batch.

    Returns:
      float32 (n,), nats per image.
    """
    return tf.reduce_sum(tf.maximum(kl_per_latent(mean, log_var), free_bits), axis=1)


def log_prior_to_posterior(z: tf.Tensor, noise: tf.Tensor, log_var: tf.Tensor) -> tf.Tensor:
    """Log-ratio log p(z) − log q(z | x) at z = mean + exp(log_var / 2) · noise.

    Its expectation over the noise is −kl.

    Args:
      z: float32 (n, k, latent_dim).
      noise: float32 (n, k, latent_dim).
      log_var: float32 (n, latent_dim).

    Returns:
      float32 (n, k), nats.
    """
    # The constants ½ log 2π of both densities cancel.
    log_var = log_var[:, tf.newaxis]  # (n, 1, latent_dim)
    return 0.5 * tf.reduce_sum(tf.square(noise) - tf.square(z) + log_var, axis=2)


def log_mean_exp(log_weights: tf.Tensor) -> tf.Tensor:
    """Logarithm of the mean of exp(log_weights) over the samples: the importance-weighted bound.

    log 1/k Σ w_i, Burda, Grosse and Salakhutdinov (2016), "Importance Weighted
    Autoencoders", equation 8.

    Args:
      log_weights: float32 (n, k).

    Returns:
      float32 (n,).
    """
    num_samples = tf.cast(tf.shape(log_weights)[1], log_weights.dtype)
    return tf.reduce_logsumexp(log_weights, axis=1) - tf.math.log(num_samples)
