"""Encoder, decoder and the VAE made of them: convolutional, or a multilayer perceptron.

Every layer has its own name and its own seed, so the initial weights are a function of the
config alone, whatever else the process has built.
"""

import hashlib
import math
from collections.abc import Callable

import keras
import ml_collections
import tensorflow as tf

_NEGATIVE_SLOPE = 0.2  # Keras' default.


def _initializer(seed: int, name: str) -> keras.initializers.Initializer:
    """Glorot's uniform initializer (Keras' default) with the layer's own seed."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4, person=b"weights").digest()
    return keras.initializers.GlorotUniform(seed=int.from_bytes(digest, "little") >> 1)


@tf.custom_gradient
def _leaky_relu(x: tf.Tensor):
    """Keras' leaky_relu with a derivative of the output, whose sign is the input's sign.

    TensorFlow's derivative takes the input. The input then stays in memory, and TensorFlow's graph
    optimizer cannot fuse convolution, bias and activation.
    """
    y = tf.nn.leaky_relu(x, _NEGATIVE_SLOPE)

    def derivative(upstream: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.LeakyReluGrad(gradients=upstream, features=y, alpha=_NEGATIVE_SLOPE)

    return y, derivative


def _activation(name: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """An activation by its name in Keras."""
    return _leaky_relu if name == "leaky_relu" else keras.activations.get(name)


def _dense(
    config: ml_collections.ConfigDict, units: int, name: str, **options
) -> keras.layers.Dense:
    """A dense layer with its own seed."""
    options = {"dtype": config.precision, **options}
    return keras.layers.Dense(
        units, kernel_initializer=_initializer(config.seed, name), name=name, **options
    )


def _convolutions(config: ml_collections.ConfigDict, x: keras.KerasTensor) -> keras.KerasTensor:
    """Images -> features, (n, H, W, C) -> (n, H', W', filters[-1])."""
    for i, (filters, stride) in enumerate(zip(config.filters, config.strides, strict=True)):
        name = f"encoder_conv_{i}"
        x = keras.layers.Conv2D(
            filters,
            config.kernel_size,
            strides=stride,
            padding="same",
            activation=_activation(config.activation),
            kernel_initializer=_initializer(config.seed, name),
            dtype=config.precision,
            name=name,
        )(x)
    return x


def _transposed_convolutions(
    config: ml_collections.ConfigDict, z: keras.KerasTensor, image_shape: tuple[int, int, int]
) -> keras.KerasTensor:
    """Latents -> logits with the encoder's strides in reverse, (n, latent_dim) -> (n, H, W, C)."""
    height, width, channels = image_shape
    for stride in config.strides:
        height, width = height // stride, width // stride
    start = (height, width, config.filters[-1])

    x = _dense(config, height * width * config.filters[-1], "decoder_dense")(z)
    x = keras.layers.Reshape(start, dtype=config.precision, name="decoder_reshape")(x)
    all_filters = [*reversed(config.filters[:-1]), channels]
    last = len(all_filters) - 1
    for i, (filters, stride) in enumerate(zip(all_filters, reversed(config.strides), strict=True)):
        name = f"decoder_conv_{i}"
        x = keras.layers.Conv2DTranspose(
            filters,
            config.kernel_size,
            strides=stride,
            padding="same",
            activation=None if i == last else _activation(config.activation),
            kernel_initializer=_initializer(config.seed, name),
            dtype="float32" if i == last else config.precision,
            name=name,
        )(x)
    return x


def build_encoder(
    config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]
) -> keras.Model:
    """Hidden layers, then two dense heads: image -> mean, log_var.

    Args:
      config: architecture and its keys, activation, latent_dim, precision, seed.
      image_shape: (H, W, C); the strides of convolutions divide H and W.

    Returns:
      Model from float32 (n, H, W, C) in [0, 1] to two float32 (n, latent_dim).
    """
    x = inputs = keras.Input(image_shape, name="images")  # (n, H, W, C)
    if config.architecture == "convolutional":
        x = _convolutions(config, x)
    x = keras.layers.Flatten(dtype=config.precision, name="encoder_flatten")(x)
    if config.architecture == "mlp":
        for i, units in enumerate(config.hidden_units):
            x = _dense(
                config, units, f"encoder_dense_{i}", activation=_activation(config.activation)
            )(x)
    # exp(log_var) and the KL term need float32's precision.
    heads = [
        _dense(config, config.latent_dim, name, dtype="float32")(x) for name in ("mean", "log_var")
    ]
    return keras.Model(inputs, heads, name="encoder")


def build_decoder(
    config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]
) -> keras.Model:
    """The encoder in reverse: z -> logits.

    Args:
      config: as for the encoder.
      image_shape: (H, W, C) of the decoded images.

    Returns:
      Model from float32 (n, latent_dim) to float32 (n, H, W, C), the logits of likelihoods.py.
    """
    x = inputs = keras.Input((config.latent_dim,), name="z")
    if config.architecture == "convolutional":
        return keras.Model(inputs, _transposed_convolutions(config, x, image_shape), name="decoder")
    for i, units in enumerate(reversed(config.hidden_units)):
        x = _dense(config, units, f"decoder_dense_{i}", activation=_activation(config.activation))(
            x
        )
    x = _dense(config, math.prod(image_shape), "logits", dtype="float32")(x)
    x = keras.layers.Reshape(image_shape, dtype="float32", name="decoder_reshape")(x)
    return keras.Model(inputs, x, name="decoder")


class VAE:
    """Encoder and decoder; objective.py draws the samples between them."""

    def __init__(self, config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]):
        """Builds both networks, under the current distribution strategy."""
        self.image_shape = image_shape
        self.encoder = build_encoder(config, image_shape)
        self.decoder = build_decoder(config, image_shape)

    @property
    def variables(self) -> list[keras.Variable]:
        """All weights, the encoder's first; all of them are trained."""
        return self.encoder.weights + self.decoder.weights
