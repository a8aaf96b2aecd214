"""Schedules over the steps of a run: the learning rate and the weight of the KL term."""

import keras
import ml_collections
import tensorflow as tf

LEARNING_RATES = ("constant", "cosine")


def learning_rate(
    config: ml_collections.ConfigDict, total_steps: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """The learning rate of a config, in the form that Keras' optimizers take.

    `constant` does not change; `cosine` falls to 0 at the last step along half a period of a
    cosine, Loshchilov and Hutter (2017), "SGDR". Before either, the rate rises linearly from 0
    for learning_rate_warmup_steps.

    Args:
      config: learning_rate, learning_rate_schedule, learning_rate_warmup_steps.
      total_steps: steps of the whole run, more than learning_rate_warmup_steps.

    Returns:
      The rate, or a schedule: number of finished steps, int -> rate of the next step, float32.
    """
    warmup_steps = config.learning_rate_warmup_steps
    if config.learning_rate_schedule == "constant" and not warmup_steps:
        return config.learning_rate
    # Keras has no constant rate with a warm-up; with alpha = 1 its cosine does not decay.
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else config.learning_rate,
        total_steps - warmup_steps,
        alpha=1.0 if config.learning_rate_schedule == "constant" else 0.0,
        warmup_target=config.learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )


def beta(config: ml_collections.ConfigDict, step: tf.Tensor) -> tf.Tensor:
    """The weight of the KL term in a step: rises linearly to config.beta, then stays constant.

    Args:
      config: beta, beta_warmup_steps.
      step: int32 scalar, number of finished steps.

    Returns:
      float32 scalar; 0 in the first step of a warm-up.
    """
    if not config.beta_warmup_steps:
        return tf.constant(config.beta, tf.float32)
    # A product, since TensorFlow replaces a division by a constant by a product in some graphs.
    share = tf.cast(step, tf.float32) * (1 / config.beta_warmup_steps)
    return config.beta * tf.minimum(share, 1.0)
