"""The TensorBoard summaries of a run: its metrics, reconstructions and samples."""

from collections.abc import Mapping

import ml_collections
import numpy as np
import tensorflow as tf

from pipeline.formats import tf_example
from pipeline.storage import files, trees
from trainer.data import batches
from trainer.model import likelihoods
from trainer.model.networks import VAE

DIRECTORY = "tensorboard"
NUM_RECORDS = 256  # first records of a split, for reconstructions and histograms
_NUM_RECONSTRUCTIONS = 16
_NUM_SAMPLES = 64
_IMAGES_PER_ROW = 8


class Board:
    """Writes TensorBoard summaries, one event file for each start of a run."""

    def __init__(self, workdir: str):
        """Opens a writer below `workdir`."""
        # Events for a URL stay in a local scratch directory until `flush`.
        self._target = files.join(workdir, DIRECTORY)
        self._scratch = trees.scratch_directory() if files.is_url(workdir) else None
        self._writer = tf.summary.create_file_writer(self._scratch or self._target)

    def scalars(self, step: int, prefix: str, values: Mapping[str, float]) -> None:
        """Writes numbers under `<prefix>/<name>`."""
        with self._writer.as_default():
            for name, value in values.items():
                tf.summary.scalar(f"{prefix}/{name}", value, step=step)

    def show_model(
        self, step: int, vae: VAE, pixels: np.ndarray, config: ml_collections.ConfigDict
    ) -> None:
        """Writes reconstructions, samples from the prior, and histograms of the posteriors.

        Args:
          step: global step.
          vae: the model.
          pixels: uint8 (at most NUM_RECORDS, H, W, C), the images to reconstruct.
          config: likelihood, latent_dim, seed.
        """
        likelihood = likelihoods.make(config)
        images = tf_example.to_floats(tf.constant(pixels))
        mean, log_var = vae.encoder(images)
        reconstructions = likelihood.mean(vae.decoder(mean[:_NUM_RECONSTRUCTIONS]))
        # Each image above its reconstruction, (n, 2H, W, C).
        pairs = _grid(tf.concat([images[:_NUM_RECONSTRUCTIONS], reconstructions], axis=1))
        key = batches.noise_key(config.seed, "samples from the prior")
        z = tf.random.stateless_normal([_NUM_SAMPLES, config.latent_dim], seed=[key, 0])
        samples = _grid(likelihood.mean(vae.decoder(z)))
        with self._writer.as_default():
            for name, pictures in {"reconstructions": pairs, "samples": samples}.items():
                if pictures.shape[-1] not in (1, 3, 4):  # Show the first channel.
                    pictures = pictures[..., :1]
                tf.summary.image(name, pictures, step=step)
            tf.summary.histogram("posterior/mean", mean, step=step)
            tf.summary.histogram("posterior/std", tf.exp(log_var / 2), step=step)

    def flush(self) -> None:
        """Makes all summaries written before visible to readers."""
        self._writer.flush()
        if self._scratch:
            trees.copy_tree(self._scratch, self._target)


def _grid(images: tf.Tensor) -> tf.Tensor:
    """Tiles images (n, H, W, C) in rows of _IMAGES_PER_ROW, padded with black: (1, H', W', C)."""
    count, height, width, channels = images.shape
    images = tf.pad(images, [[0, -count % _IMAGES_PER_ROW], [0, 0], [0, 0], [0, 0]])
    rows = tf.reshape(images, (-1, _IMAGES_PER_ROW, height, width, channels))
    rows = tf.transpose(rows, (0, 2, 1, 3, 4))  # (rows, H, images in a row, W, C)
    return tf.reshape(rows, (1, -1, _IMAGES_PER_ROW * width, channels))
