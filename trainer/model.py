"""Encoder, decoder and the VAE made of them.

Layers are named and their initial weights seeded one by one, so the weights are
a function of the config and not of what else the process has built.
"""

import hashlib

import keras
import ml_collections
import tensorflow as tf

from pipeline import examples


def _initializer(seed: int, name: str) -> keras.initializers.Initializer:
    """Glorot's uniform initializer (Keras' default) with a seed for this layer alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4, person=b"weights").digest()
    return keras.initializers.GlorotUniform(seed=int.from_bytes(digest, "little") >> 1)


def build_encoder(
    config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]
) -> keras.Model:
    """Convolutions, then two dense heads: image -> mean, log_var.

    Args:
      config: filters, strides, kernel_size, activation, latent_dim, precision, seed.
      image_shape: (H, W, C); the strides divide H and W.

    Returns:
      Model from float32 (n, H, W, C) in [0, 1] to two float32 (n, latent_dim).
    """
    x = inputs = keras.Input(image_shape, name="images")  # (n, H, W, C)
    for i, (filters, stride) in enumerate(zip(config.filters, config.strides, strict=True)):
        name = f"encoder_conv_{i}"
        x = keras.layers.Conv2D(
            filters,
            config.kernel_size,
            strides=stride,
            padding="same",
            activation=config.activation,
            kernel_initializer=_initializer(config.seed, name),
            dtype=config.precision,
            name=name,
        )(x)
    x = keras.layers.Flatten(dtype=config.precision, name="encoder_flatten")(x)

    def head(name: str) -> keras.KerasTensor:  # (n, latent_dim)
        return keras.layers.Dense(
            config.latent_dim,
            kernel_initializer=_initializer(config.seed, name),
            dtype="float32",  # exp(log_var) and the KL term need the digits.
            name=name,
        )(x)

    return keras.Model(inputs, [head("mean"), head("log_var")], name="encoder")


def build_decoder(
    config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]
) -> keras.Model:
    """The encoder in reverse, with transposed convolutions: z -> logits.

    Args:
      config: as for the encoder.
      image_shape: (H, W, C) of the images to make.

    Returns:
      Model from float32 (n, latent_dim) to float32 (n, H, W, C); a sigmoid of
      these logits is the reconstruction.
    """
    height, width, channels = image_shape
    for stride in config.strides:
        height, width = height // stride, width // stride
    start = (height, width, config.filters[-1])

    x = inputs = keras.Input((config.latent_dim,), name="z")
    x = keras.layers.Dense(
        height * width * config.filters[-1],
        kernel_initializer=_initializer(config.seed, "decoder_dense"),
        dtype=config.precision,
        name="decoder_dense",
    )(x)
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
            activation=None if i == last else config.activation,
            kernel_initializer=_initializer(config.seed, name),
            dtype="float32" if i == last else config.precision,
            name=name,
        )(x)
    return keras.Model(inputs, x, name="decoder")


class VAE:
    """Encoder and decoder with the reparametrised sample between them."""

    def __init__(self, config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]):
        """Builds both networks, under the current distribution strategy."""
        self.encoder = build_encoder(config, image_shape)
        self.decoder = build_decoder(config, image_shape)

    @property
    def variables(self) -> list[keras.Variable]:
        """All weights, those of the encoder first; every one is trained."""
        return self.encoder.weights + self.decoder.weights

    def __call__(
        self, pixels: tf.Tensor, noise: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """The forward pass.

        Args:
          pixels: uint8 (n, H, W, C).
          noise: float32 (n, latent_dim), standard normal; zeros give the reconstruction
            from the posterior mean.

        Returns:
          images float32 (n, H, W, C) in [0, 1], mean and log_var float32 (n, latent_dim),
          logits float32 (n, H, W, C).
        """
        images = examples.to_floats(pixels)
        mean, log_var = self.encoder(images, training=True)
        z = mean + tf.exp(log_var / 2) * noise  # (n, latent_dim)
        return images, mean, log_var, self.decoder(z, training=True)
