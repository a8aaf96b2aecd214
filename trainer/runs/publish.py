"""Writes the published model directory: SavedModel, weights and manifest; export reads them."""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from pipeline.cli import quiet
from pipeline.formats import tf_example
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files as files_lib
from pipeline.storage import trees
from trainer.model import likelihoods, losses
from trainer.model import weights as weights_lib
from trainer.model.networks import VAE
from trainer.runs import config as config_lib


def signatures(
    vae: VAE, config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """The signatures of the SavedModel: name -> (function, input specification)."""
    pixels = [tf.TensorSpec((None, *image_shape), tf.uint8, name="images")]
    latents = [tf.TensorSpec((None, config.latent_dim), tf.float32, name="z")]

    likelihood = likelihoods.make(config)

    def embed(images):
        floats = tf_example.to_floats(images)
        mean, log_var = vae.encoder(floats)
        logits = vae.decoder(mean)
        return {
            "mean": mean,
            "log_var": log_var,
            "reconstruction": likelihood.mean(logits),
            "reconstruction_loss": likelihood.negative_log(floats, logits),
            "kl": losses.kl(mean, log_var),
        }

    def encode(images):
        outputs = embed(images)
        return {"mean": outputs["mean"], "log_var": outputs["log_var"]}

    def reconstruct(images):
        return {"images": embed(images)["reconstruction"]}

    def decode(z):
        return {"images": likelihood.mean(vae.decoder(z))}

    return {
        "encode": (encode, pixels),
        "decode": (decode, latents),
        "reconstruct": (reconstruct, pixels),
        "embed": (embed, pixels),
    }


def _save(
    config: ml_collections.ConfigDict,
    image_shape: tuple[int, int, int],
    weights: list[np.ndarray],
    directory: str,
) -> None:
    """Writes weights and SavedModel of a copy of the model, built outside any strategy."""
    vae = VAE(config, image_shape)
    for variable, value in zip(vae.variables, weights, strict=True):
        variable.assign(value)
    with open(os.path.join(directory, weights_lib.FILE), "wb") as file:
        file.write(weights_lib.serialize(vae))
    archive = keras.export.ExportArchive()
    archive.track(vae.encoder)
    archive.track(vae.decoder)
    for name, (function, specification) in signatures(vae, config, image_shape).items():
        archive.add_endpoint(name=name, fn=function, input_signature=specification)
    with quiet.quiet_stderr():
        archive.write_out(directory, verbose=False)


def publish_model(
    export_dir: str,
    *,
    config: ml_collections.ConfigDict,
    run: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    class_names: Sequence[str],
    weights: list[np.ndarray],
    step: int,
    trained_steps: int,
    metrics: Mapping[str, Any],
    records: Mapping[str, int],
) -> dict[str, Any]:
    """Writes the model directory; the manifest comes last and marks the model as finished.

    Signatures: `encode` (uint8 images -> mean, log_var), `decode` (z -> images in [0, 1]),
    `reconstruct` (uint8 images -> images in [0, 1]), and `embed`, which export calls: mean,
    log_var, reconstruction and both loss terms from one pass, at z = mean.

    Args:
      export_dir: local path or fsspec URL.
      config: the run's config.
      run: the run's identity, see RunPlan.identity.
      image_shape: (H, W, C).
      class_names: of the data set; no part of model_id, by which earlier models are known.
      weights: values of `VAE.variables`.
      step: the step whose weights these are.
      trained_steps: number of trained steps; above `step` if the best weights are not the last.
      metrics: split -> line of metrics of these weights.
      records: numbers of records that were read, used and quarantined.

    Returns:
      The manifest.
    """
    digest = hashlib.sha256()
    for value in weights:
        digest.update(np.ascontiguousarray(value))
    made_from = {**run, "step": step, "weights_sha256": digest.hexdigest()}
    identity = {"format_version": manifest_lib.FORMAT_VERSION, "made_from": made_from}
    with tempfile.TemporaryDirectory() as scratch:
        _save(config, image_shape, weights, scratch)
        files = []
        for root, _, names in sorted(os.walk(scratch)):
            for name in sorted(names):
                path = os.path.join(root, name)
                with open(path, "rb") as file:
                    files.append(
                        manifest_lib.file_entry(os.path.relpath(path, scratch), file.read())
                    )
        manifest = {
            "stage": "train",
            "model_id": manifest_lib.content_id(identity),
            "dataset_id": run["dataset_id"],
            **identity,
            "config": {
                key: value
                for key, value in config.to_dict().items()
                if key not in config_lib.UNPUBLISHED_KEYS
            },
            "image_shape": list(image_shape),
            "class_names": list(class_names),
            "step": step,
            "trained_steps": trained_steps,
            "metrics": dict(metrics),
            "records": dict(records),
            "files": files,
        }
        # The old manifest goes first, so that no reader takes a half-written model for finished.
        files_lib.remove(files_lib.join(export_dir, manifest_lib.MANIFEST))
        files_lib.sync(export_dir)
        files_lib.remove(export_dir)
        trees.copy_tree(scratch, export_dir)
    manifest_lib.sync_files(export_dir, files)
    files_lib.write_bytes(
        files_lib.join(export_dir, manifest_lib.MANIFEST), manifest_lib.sealed_json(manifest)
    )
    files_lib.sync(export_dir)
    return manifest
