"""Measures a published model on a data set: ELBO, log-likelihood, active units."""

import math
import os
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.cli.errors import StageError
from pipeline.cli.progress import Progress
from pipeline.datasets import reader
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files
from trainer.cluster import strategies
from trainer.data import batches, placement
from trainer.model import likelihoods, objective, weights
from trainer.model.networks import VAE
from trainer.runs import config as config_lib
from trainer.runs import metrics as metrics_lib
from trainer.steps.evaluation import SUMS, Evaluator

# Images in a batch, and samples decoded at once for each image. The numbers depend on both, since
# noise belongs to a place in a batch; so there are no flags for them.
_BATCH_SIZE = 200
_SAMPLES_AT_ONCE = 25


class LogLikelihood:
    """The importance-weighted estimate of log p(x) under one model on one strategy.

    log 1/k Σ p(x, z_i) / q(z_i | x) with z_i from q: Burda, Grosse and Salakhutdinov (2016),
    "Importance Weighted Autoencoders", equation 8. The expectation is a lower bound, which rises
    to log p(x) with k.
    """

    def __init__(self, evaluator: Evaluator, num_samples: int):
        """Prepares the estimate with k = num_samples; evaluator has the model."""
        self._evaluator, self._num_samples = evaluator, num_samples
        self._likelihood = likelihoods.make(evaluator.config)
        self._key = batches.noise_key(evaluator.config.seed, "importance samples")

    def _estimate_replica(self, records, batch, number):
        """Log p of this replica's part of a batch, float32 (n,)."""
        config, vae = self._evaluator.config, self._evaluator.vae
        replica_slice = self._evaluator.replica_slice(records, batch, number, "evaluation")
        images = replica_slice.images
        mean, log_var = vae.encoder(images)
        num_chunks = -(-self._num_samples // _SAMPLES_AT_ONCE)
        total = tf.fill(tf.shape(mean)[:1], -math.inf)  # log of the sum so far
        for chunk in tf.range(num_chunks):
            noise = batches.noise(
                self._key,
                number * num_chunks + chunk,
                replica_slice.places,
                batch_size=config.batch_size,
                shape=(_SAMPLES_AT_ONCE, config.latent_dim),
            )
            samples = objective.draw(vae, images, mean, log_var, noise, self._likelihood)
            sample_numbers = chunk * _SAMPLES_AT_ONCE + tf.range(_SAMPLES_AT_ONCE)
            log_weights = tf.where(
                sample_numbers < self._num_samples,
                samples.toward_prior - samples.negative_log,
                -math.inf,
            )
            chunk_total = tf.reduce_logsumexp(log_weights, axis=1)
            total = tf.reduce_logsumexp(tf.stack([total, chunk_total]), axis=0)
        return total - math.log(self._num_samples)

    @tf.function
    def estimate_replicas(
        self, records: placement.OrderedImages, batch: tf.Tensor, number: tf.Tensor
    ):
        """Log p of each replica's part of a batch, a value for each replica."""
        return self._evaluator.strategy.run(self._estimate_replica, args=(records, batch, number))

    def estimate_batch(
        self, records: placement.OrderedImages, batch: tf.Tensor, number: tf.Tensor
    ) -> np.ndarray:
        """Log p of the images of a batch.

        Args:
          records: from data/placement.py.
          batch: int32 scalar, number of the batch in the order of `records`.
          number: int32 scalar, number of the same batch in the split.

        Returns:
          float32 (batch_size or a little more,); values after the batch's images are padding.
        """
        # The host joins the parts: strategy.gather may hang on several GPUs, see
        # https://github.com/tensorflow/tensorflow/issues/62065.
        values = self.estimate_replicas(records, batch, number)
        parts = self._evaluator.strategy.experimental_local_results(values)
        return np.concatenate([part.numpy() for part in parts])


def measure(
    *,
    model_dir: str,
    data_dir: str,
    split: str,
    num_importance_samples: int,
    num_virtual_devices: int = 0,
) -> dict[str, Any]:
    """Measures a model on a split.

    Images are binarised as in training. The terms of the ELBO take one sample an image, and the
    log-likelihood takes num_importance_samples.

    Args:
      model_dir: a published model directory; local path or fsspec URL.
      data_dir: output directory of preprocess.
      split: name of the split.
      num_importance_samples: k of the estimate of the log-likelihood.
      num_virtual_devices: number of replicas on the CPU; 0 for all GPUs, else the CPU.

    Returns:
      The measurements, and the ids of model and data, as JSON values.

    Raises:
      StageError: model or data are unusable, or their image shapes differ.
    """
    published = weights.read(model_dir, "--model_dir")
    dataset = reader.Dataset(data_dir)
    num_examples = sum(entry["num_examples"] for entry in dataset.shards(split))
    if published.manifest["image_shape"] != list(dataset.image_shape):
        raise StageError(
            f"--model_dir={model_dir}: the model is for images of "
            f"{tuple(published.manifest['image_shape'])}, and --data_dir={data_dir} has images of "
            f"{dataset.image_shape}; expected the same shape"
        )
    if not num_examples:
        raise StageError(
            f"--split={split}: {data_dir} has no records in this split; name another split"
        )
    with config_lib.config_from_manifest(published.manifest, model_dir).unlocked() as config:
        config.update(
            batch_size=_BATCH_SIZE,
            num_importance_samples=1,
            strategy="mirrored",
            num_virtual_devices=num_virtual_devices,
        )
    strategy = strategies.make(config)
    with strategy.scope():
        vae = VAE(config, dataset.image_shape)
        weights.assign(vae, published, model_dir=model_dir)
    evaluator = Evaluator(config, strategy, vae)
    images = dataset.read_images(split)
    if config.binarize == "static":
        batches.binarize_once(images, seed=config.seed, split=split)
    placed_split = evaluator.place(images, num_bytes=images.nbytes)
    visit = placed_split.visit(np.arange(num_examples, dtype=np.int32))
    estimate = LogLikelihood(evaluator, num_importance_samples)

    progress = Progress("evaluate", total=num_examples, unit="images")
    sums, log_likelihood = 0.0, []
    for batch in range(batches.steps_per_epoch(num_examples, _BATCH_SIZE)):
        num_done = batch * _BATCH_SIZE
        progress.update(num_done)
        records, first = visit.batches(batch, 1)
        rows, _ = evaluator.evaluate(records, first, tf.constant(batch), tf.constant(1))
        sums = sums + rows.numpy()[0].astype(np.float64)
        values = estimate.estimate_batch(records, first, tf.constant(batch))
        log_likelihood.append(values[: num_examples - num_done][:_BATCH_SIZE].astype(np.float64))
    progress.close()
    metrics = metrics_lib.from_sums(
        sums[: len(SUMS)],
        num_pixels=math.prod(dataset.image_shape),
        bernoulli=config.likelihood == "bernoulli",
    )
    del metrics["loss"]  # Training's weighted ELBO; the ELBO itself is in the metrics.
    return {
        "format_version": manifest_lib.FORMAT_VERSION,
        "model_id": published.manifest["model_id"],
        "step": published.manifest["step"],
        "dataset_id": dataset.dataset_id,
        "split": split,
        "num_examples": num_examples,
        "num_importance_samples": num_importance_samples,
        "log_likelihood": float(np.concatenate(log_likelihood).mean()),
        **metrics,
        "active_units": metrics_lib.active_units(sums[len(SUMS) :], num_examples),
        "latent_dim": config.latent_dim,
    }


def write(measurements: dict[str, Any], model_dir: str, path: str | None) -> str:
    """Writes the measurements as JSON to `path`, or to its default; returns the path."""
    path = path or files.join(model_dir, f"evaluation-{measurements['split']}.json")
    files.write_bytes(path, manifest_lib.readable_json(measurements))
    files.sync(os.path.dirname(path))
    return path


def table(measurements: dict[str, Any]) -> str:
    """The measurements as a table for printing."""
    lines = [
        ("model_id", f"{measurements['model_id']}, after {measurements['step']:,} steps"),
        ("dataset_id", f"{measurements['dataset_id']}, split {measurements['split']}"),
        ("images", f"{measurements['num_examples']:,}"),
        (
            "log_likelihood",
            f"{measurements['log_likelihood']:.2f} nats, with "
            f"{measurements['num_importance_samples']:,} samples an image",
        ),
        ("elbo", f"{measurements['elbo']:.2f} nats"),
        ("reconstruction_loss", f"{measurements['reconstruction_loss']:.2f} nats"),
        ("kl", f"{measurements['kl']:.2f} nats"),
        ("active_units", f"{measurements['active_units']} of {measurements['latent_dim']}"),
    ]
    if "bce" in measurements:
        lines.insert(-1, ("bce", f"{measurements['bce']:.4f} nats a pixel"))
    return "\n".join(f"{name:<22}{value}" for name, value in lines)
