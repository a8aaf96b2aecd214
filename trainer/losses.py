"""The two terms of the VAE's objective, per example, in nats. Pure functions."""

import tensorflow as tf


def reconstruction_loss(images: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Negative log-likelihood of pixels under independent Bernoulli variables.

    −log p(x|z) = Σ_pixels BCE(x, sigmoid(logits)), Kingma and Welling (2014),
    "Auto-Encoding Variational Bayes", appendix C.1, with x in [0, 1] taken as
    the probability of a white pixel.

    Args:
      images: float32 (n, H, W, C) in [0, 1].
      logits: float32 (n, H, W, C).

    Returns:
      float32 (n,), nats per image, ≥ 0.
    """
    per_pixel = tf.nn.sigmoid_cross_entropy_with_logits(labels=images, logits=logits)
    return tf.reduce_sum(per_pixel, axis=[1, 2, 3])


def kl(mean: tf.Tensor, log_var: tf.Tensor) -> tf.Tensor:
    """Kullback-Leibler divergence of N(mean, exp(log_var)) from N(0, 1), over all latents.

    ½ Σ (exp(log_var) + mean² − 1 − log_var), same paper, appendix B.

    Args:
      mean: float32 (n, latent_dim).
      log_var: float32 (n, latent_dim).

    Returns:
      float32 (n,), nats per image, ≥ 0.
    """
    # expm1(v) − v ≥ 0 even in float32, where exp(v) − 1 − v can round below 0.
    return 0.5 * tf.reduce_sum(tf.math.expm1(log_var) - log_var + tf.square(mean), axis=1)
