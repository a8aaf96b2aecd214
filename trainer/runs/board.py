"""What a run shows on TensorBoard: config, metrics, pictures, a projector, a profile of steps."""

import io
import math
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np
import tensorflow as tf

from pipeline.datasets import reader
from pipeline.formats import projector, tf_example, tfrecord
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files, trees
from trainer.data import batches
from trainer.model import likelihoods
from trainer.model.networks import VAE

DIRECTORY = "tensorboard"
NUM_RECORDS = 256  # first records of a split, for reconstructions and histograms
_NUM_RECONSTRUCTIONS = 16
_NUM_SAMPLES = 64
_IMAGES_PER_ROW = 8
# TensorBoard shows the first config of a directory. A resumed run may have more epochs, so the
# config has an event file of its own, which each start replaces.
_CONFIG_EVENTS = "config.tfevents"
# The projector shows records of the first of these splits that has any.
_POINT_SPLITS = ("validation", "test", "train")
# Limits of the projector: its records, and the memory of their images during the run.
_MAX_POINTS = 1_000
_MAX_POINT_BYTES = 32 << 20


class Board:
    """Writes TensorBoard summaries, one event file for each start of a run, and a projector."""

    def __init__(self, workdir: str, config: ml_collections.ConfigDict, dataset: reader.Dataset):
        """Writes the config, reads the records of the projector, and opens a writer.

        Args:
          workdir: the run's directory.
          config: the run's config, with all values resolved.
          dataset: the run's data set.
        """
        # Events for a URL stay in a local scratch directory until `flush`.
        self._target = files.join(workdir, DIRECTORY)
        self._scratch = trees.scratch_directory() if files.is_url(workdir) else None
        self.directory = self._scratch or self._target  # Where TensorFlow writes.
        files.make_dirs(files.join(self._target, projector.DIRECTORY))
        files.write_bytes(files.join(self._target, _CONFIG_EVENTS), _config_events(config))
        # Now: at the end of a long run, the data set may be out of reach.
        self._points = _points(dataset)
        self._class_names = dict(enumerate(dataset.manifest["class_names"]))
        self._image_shape = dataset.image_shape
        self._writer = tf.summary.create_file_writer(self.directory)

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

    def show_points(self, vae: VAE) -> None:
        """Writes the projector: posterior means of some records, their classes and pictures."""
        records, means = self._points, []
        if not records:
            return
        for start in range(0, len(records), NUM_RECORDS):
            pixels = b"".join(record.image for record in records[start : start + NUM_RECORDS])
            images = np.frombuffer(pixels, np.uint8).reshape(-1, *self._image_shape)
            means.append(vae.encoder(tf_example.to_floats(tf.constant(images)))[0].numpy())
        sprite = projector.Sprite(range(len(records)), self._image_shape)
        for index, record in enumerate(records):
            image = np.frombuffer(record.image, np.uint8).reshape(self._image_shape)
            sprite.add(index, image)
        contents = projector.files(
            [record.id.decode() for record in records],
            np.array([record.label for record in records], np.int64),
            np.concatenate(means),
            class_names=self._class_names,
            sprite=sprite,
            directory=f"{projector.DIRECTORY}/",
        )
        for name, data in contents.items():
            files.write_bytes(files.join(self._target, name), data)

    def flush(self) -> None:
        """Makes all summaries written before visible to readers."""
        self._writer.flush()
        if self._scratch:
            trees.copy_tree(self._scratch, self._target)


class Profiler:
    """Records what TensorFlow does in a range of steps; as a context, ends a recording under way.

    TensorBoard's profile plugin shows the recording. No step depends on it.
    """

    def __init__(self, steps: range, board: Board | None):
        """`board` gets the recording; None at a worker that records nothing."""
        self.steps, self._board = steps, board
        self._first: int | None = None  # The first recorded step while a recording is under way.

    def reach(self, step: int) -> float:
        """Starts or ends the recording before the global step `step`.

        Returns:
          The number of steps until the next start or end, the same at all workers of a cluster.
        """
        if self._first is not None and step not in self.steps:
            self._end(f"steps {self._first} to {step - 1}")
        elif self._first is None and self._board and step in self.steps:
            tf.profiler.experimental.start(self._board.directory)
            self._first = step
        return min(
            (b - step for b in (self.steps.start, self.steps.stop) if b > step), default=math.inf
        )

    def _end(self, recorded: str) -> None:
        self._first = None
        tf.profiler.experimental.stop()
        self._board.flush()
        print(f"train: a profile of {recorded} is in {DIRECTORY}/plugins/profile", file=sys.stderr)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        if self._first is not None:
            self._end(f"the steps from {self._first} on")


def _config_events(config: ml_collections.ConfigDict) -> bytes:
    """An event file with the config as a session of HParams and as text."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.plugins.hparams import summary_v2 as hparams
    from tensorboard.plugins.text import summary_v2 as text

    values = config.to_dict()
    scalars = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in values.items()}
    code = textwrap.indent(manifest_lib.readable_json(values).decode(), "    ")  # In Markdown.
    now = time.time()
    events = [event_pb2.Event(wall_time=now, file_version="brain.Event:2")]
    # Without a name, each run is a group of its own, also beside a run with the same config.
    for summary in (hparams.hparams_pb(scalars, trial_id=""), text.text_pb("config", code)):
        events.append(event_pb2.Event(wall_time=now, step=0, summary=summary))
    buffer = io.BytesIO()
    tfrecord.write(buffer, _CONFIG_EVENTS, (event.SerializeToString() for event in events))
    return buffer.getvalue()


def _points(dataset: reader.Dataset) -> Sequence[tf_example.Record]:
    """The records of the projector."""
    count = max(1, min(_MAX_POINTS, _MAX_POINT_BYTES // math.prod(dataset.image_shape)))
    heads = (dataset.read_head(split, count) for split in _POINT_SPLITS if split in dataset.splits)
    return next(filter(None, heads), [])


def _grid(images: tf.Tensor) -> tf.Tensor:
    """Tiles images (n, H, W, C) in rows of _IMAGES_PER_ROW, padded with black: (1, H', W', C)."""
    count, height, width, channels = images.shape
    images = tf.pad(images, [[0, -count % _IMAGES_PER_ROW], [0, 0], [0, 0], [0, 0]])
    rows = tf.reshape(images, (-1, _IMAGES_PER_ROW, height, width, channels))
    rows = tf.transpose(rows, (0, 2, 1, 3, 4))  # (rows, H, images in a row, W, C)
    return tf.reshape(rows, (1, -1, _IMAGES_PER_ROW * width, channels))
