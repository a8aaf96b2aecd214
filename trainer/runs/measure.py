"""What a published model achieves on a data set: ELBO, log-likelihood, active units."""

import math
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
from trainer.steps.tape_steps import SUMS, Steps

# Images in a batch and samples decoded at once for each of them. Part of what the numbers
# are a function of, since noise belongs to a place in a batch; so these are no flags.
_BATCH_SIZE = 200
_SAMPLES_AT_ONCE = 25


class LogLikelihood:
    """The importance-weighted estimate of log p(x) under one model on one strategy.

    log 1/k Σ p(x, z_i) / q(z_i | x) with z_i from q: Burda, Grosse and Salakhutdinov (2016),
    "Importance Weighted Autoencoders", equation 8. A lower bound in expectation, which rises to
    log p(x) with k.
    """

    def __init__(self, steps: Steps, num_samples: int):
        """Takes the model's steps, whose slices of batches it shares, and k."""
        self._steps, self._num_samples = steps, num_samples
        self._likelihood = likelihoods.make(steps.config)
        self._key = batches.noise_key(steps.config.seed, "importance samples")

    def _replica(self, records, batch, number):
        """Log p of this replica's part of a batch, float32 (n,)."""
        config, vae = self._steps.config, self._steps.vae
        slice_ = self._steps.my_slice(records, batch, number, "evaluation")
        mean, log_var = vae.encoder(slice_.images)
        num_chunks = -(-self._num_samples // _SAMPLES_AT_ONCE)
        total = tf.fill(tf.shape(mean)[:1], -math.inf)  # log of the sum so far
        for chunk in tf.range(num_chunks):
            noise = batches.noise(
                self._key,
                number * num_chunks + chunk,
                slice_.places,
                batch_size=config.batch_size,
                shape=(_SAMPLES_AT_ONCE, config.latent_dim),
            )
            samples = objective.draw(vae, slice_.images, mean, log_var, noise, self._likelihood)
            in_all = chunk * _SAMPLES_AT_ONCE + tf.range(_SAMPLES_AT_ONCE)
            log_weights = tf.where(
                in_all < self._num_samples,
                samples.toward_prior - samples.negative_log,
                -math.inf,
            )
            chunk_total = tf.reduce_logsumexp(log_weights, axis=1)
            total = tf.reduce_logsumexp(tf.stack([total, chunk_total]), axis=0)
        return total - math.log(self._num_samples)

    @tf.function
    def of_replicas(self, records: placement.Records, batch: tf.Tensor, number: tf.Tensor):
        """Log p of the images of a batch, each replica's part of them: see `of_batch`."""
        return self._steps.strategy.run(self._replica, args=(records, batch, number))

    def of_batch(
        self, records: placement.Records, batch: tf.Tensor, number: tf.Tensor
    ) -> np.ndarray:
        """Log p of the images of a batch.

        Args:
          records: from data/placement.py.
          batch: int32 scalar, number of the batch in their order.
          number: int32 scalar, number of the same batch in the split.

        Returns:
          float32 (batch_size or a little more,); what is beyond the batch's images is padding.
        """
        # Joined by the host: strategy.gather has been seen to hang on several GPUs, see
        # https://github.com/tensorflow/tensorflow/issues/62065.
        parts = self.of_replicas(records, batch, number)
        local = self._steps.strategy.experimental_local_results(parts)
        return np.concatenate([part.numpy() for part in local])


def measure(
    *,
    model_dir: str,
    data_dir: str,
    split: str,
    num_importance_samples: int,
    num_virtual_devices: int = 0,
) -> dict[str, Any]:
    """Measures a model on a split.

    Images are binarised as in training. The terms of the ELBO take one sample an image,
    the log-likelihood num_importance_samples.

    Args:
      model_dir: as the trainer publishes it; local path or fsspec URL.
      data_dir: output directory of preprocess.
      split: which split.
      num_importance_samples: k of the estimate of the log-likelihood.
      num_virtual_devices: replicas on the CPU; 0 for all GPUs, else the CPU.

    Returns:
      What was measured and on what, as JSON values.

    Raises:
      StageError: model or data can't be used, or don't fit each other.
    """
    published = weights.read(model_dir, "--model_dir")
    dataset = reader.Dataset(data_dir)
    num_examples = sum(entry["num_examples"] for entry in dataset.shards(split))
    if published.manifest["image_shape"] != list(dataset.image_shape):
        raise StageError(
            f"--model_dir={model_dir}: is for images of "
            f"{tuple(published.manifest['image_shape'])}, --data_dir={data_dir} has "
            f"{dataset.image_shape}; expected the same shape"
        )
    if not num_examples:
        raise StageError(f"--split={split}: {data_dir} has no records in it; name another")
    with config_lib.config_of(published.manifest, model_dir).unlocked() as config:
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
    steps = Steps(config, strategy, vae, optimizer=None)
    images = dataset.read_images(split)
    if config.binarize == "static":
        batches.binarize_once(images, seed=config.seed, split=split)
    placed = placement.place(strategy, images, config, num_bytes=images.nbytes)
    visit = placed.visit(np.arange(num_examples, dtype=np.int32))
    estimate = LogLikelihood(steps, num_importance_samples)

    progress = Progress("evaluate", total=num_examples, unit="images")
    sums, log_likelihood = 0.0, []
    for batch in range(batches.steps_per_epoch(num_examples, _BATCH_SIZE)):
        done = batch * _BATCH_SIZE
        progress.update(done)
        records, first = visit.batches(batch, 1)
        rows, _ = steps.evaluate(records, first, tf.constant(batch), tf.constant(1))
        sums = sums + rows.numpy()[0].astype(np.float64)
        found = estimate.of_batch(records, first, tf.constant(batch))
        log_likelihood.append(found[: num_examples - done][:_BATCH_SIZE].astype(np.float64))
    progress.close()
    of_images = metrics_lib.from_sums(
        sums[: len(SUMS)],
        num_pixels=math.prod(dataset.image_shape),
        bernoulli=config.likelihood == "bernoulli",
    )
    del of_images["loss"]  # The ELBO with the weights of training: of no use beside it.
    return {
        "format_version": manifest_lib.FORMAT_VERSION,
        "model_id": published.manifest["model_id"],
        "step": published.manifest["step"],
        "dataset_id": dataset.dataset_id,
        "split": split,
        "num_examples": num_examples,
        "num_importance_samples": num_importance_samples,
        "log_likelihood": float(np.concatenate(log_likelihood).mean()),
        **of_images,
        "active_units": metrics_lib.active_units(sums[len(SUMS) :], num_examples),
        "latent_dim": config.latent_dim,
    }


def write(measured: dict[str, Any], model_dir: str, path: str | None) -> str:
    """Writes what was measured as JSON; returns the path, which has a default."""
    path = path or files.join(model_dir, f"evaluation-{measured['split']}.json")
    files.write_bytes(path, manifest_lib.readable_json(measured))
    return path


def table(measured: dict[str, Any]) -> str:
    """What was measured, for a person to read."""
    lines = [
        ("model_id", f"{measured['model_id']}, after {measured['step']:,} steps"),
        ("dataset_id", f"{measured['dataset_id']}, split {measured['split']}"),
        ("images", f"{measured['num_examples']:,}"),
        (
            "log_likelihood",
            f"{measured['log_likelihood']:.2f} nats, with "
            f"{measured['num_importance_samples']:,} samples an image",
        ),
        ("elbo", f"{measured['elbo']:.2f} nats"),
        ("reconstruction_loss", f"{measured['reconstruction_loss']:.2f} nats"),
        ("kl", f"{measured['kl']:.2f} nats"),
        ("active_units", f"{measured['active_units']} of {measured['latent_dim']}"),
    ]
    if "bce" in measured:
        lines.insert(-1, ("bce", f"{measured['bce']:.4f} nats a pixel"))
    return "\n".join(f"{name:<22}{value}" for name, value in lines)
