"""What TensorBoard shows of a run: its numbers, and what its model makes of images."""

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
# Shown at each epoch: from the first records of a split, and from the prior.
NUM_RECORDS = 256
_NUM_RECONSTRUCTIONS = 16
_NUM_SAMPLES = 64
_IN_A_ROW = 8


class Board:
    """TensorBoard summaries of a run, one event file a try."""

    def __init__(self, workdir: str):
        """Opens a writer below `workdir`."""
        # Events of a URL stay in a scratch directory of the machine until they are published.
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
          pixels: uint8 (at most NUM_RECORDS, H, W, C), whose reconstructions and posteriors.
          config: likelihood, latent_dim, seed.
        """
        likelihood = likelihoods.make(config)
        images = tf_example.to_floats(tf.constant(pixels))
        mean, log_var = vae.encoder(images)
        made = likelihood.mean(vae.decoder(mean[:_NUM_RECONSTRUCTIONS]))
        # Each above its reconstruction, (n, 2H, W, C).
        pairs = _grid(tf.concat([images[:_NUM_RECONSTRUCTIONS], made], axis=1))
        key = batches.noise_key(config.seed, "samples from the prior")
        z = tf.random.stateless_normal([_NUM_SAMPLES, config.latent_dim], seed=[key, 0])
        samples = _grid(likelihood.mean(vae.decoder(z)))
        with self._writer.as_default():
            for name, pictures in {"reconstructions": pairs, "samples": samples}.items():
                if pictures.shape[-1] not in (1, 3, 4):  # What a picture can show of others.
                    pictures = pictures[..., :1]
                tf.summary.image(name, pictures, step=step)
            tf.summary.histogram("posterior/mean", mean, step=step)
            tf.summary.histogram("posterior/std", tf.exp(log_var / 2), step=step)

    def flush(self) -> None:
        """Makes everything written so far visible to readers."""
        self._writer.flush()
        if self._scratch:
            trees.copy_tree(self._scratch, self._target)


def _grid(images: tf.Tensor) -> tf.Tensor:
    """Images (n, H, W, C) as one, in rows of _IN_A_ROW, the last one filled up: (1, H', W', C)."""
    count, height, width, channels = images.shape
    images = tf.pad(images, [[0, -count % _IN_A_ROW], [0, 0], [0, 0], [0, 0]])
    rows = tf.reshape(images, (-1, _IN_A_ROW, height, width, channels))
    rows = tf.transpose(rows, (0, 2, 1, 3, 4))  # (rows, H, images in a row, W, C)
    return tf.reshape(rows, (1, -1, _IN_A_ROW * width, channels))
