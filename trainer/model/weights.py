"""The weights of a published model, as arrays: for a warm start or for evaluation."""

import io
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.stages import manifest as manifest_lib
from trainer.model.networks import VAE

FILE = "weights.npz"


class PublishedWeights(NamedTuple):
    """The contents of a published model directory."""

    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray]  # path of the variable -> value


def serialize(vae: VAE) -> bytes:
    """The weights as the bytes of an .npz file; equal weights give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **{variable.path: variable.numpy() for variable in vae.variables})
    return buffer.getvalue()


def read(model_dir: str, flag: str) -> PublishedWeights:
    """Reads a model directory.

    Args:
      model_dir: directory that `publish.publish_model` wrote; local path or fsspec URL.
      flag: the flag that named model_dir, for messages.

    Raises:
      StageError: the directory holds no finished model, or the model is damaged.
    """
    manifest = manifest_lib.read_manifest(model_dir, "train", flag)
    entries = [entry for entry in manifest["files"] if entry["name"] == FILE]
    if not entries:
        raise StageError(
            f"{flag}={model_dir}: the model has no {FILE}, so an older version of this program "
            "wrote it; train the model again"
        )
    with np.load(
        io.BytesIO(manifest_lib.read_file(model_dir, entries[0])), allow_pickle=False
    ) as file:
        return PublishedWeights(manifest, {name: file[name] for name in file.files})


def assign(vae: VAE, published: PublishedWeights, *, model_dir: str) -> None:
    """Gives a model the weights of a published model.

    Raises:
      StageError: the two models differ in shape; names the first variable that differs.
    """
    variables = {variable.path: variable for variable in vae.variables}
    for path in sorted(variables.keys() | published.arrays.keys()):
        published_shape, expected_shape = (
            tuple(weights[path].shape) if path in weights else "absent"
            for weights in (published.arrays, variables)
        )
        if published_shape != expected_shape:
            raise StageError(
                f"{model_dir}: weight {path!r} is {published_shape} there and {expected_shape} in "
                "this config; expected the same architecture and latent_dim"
            )
    for path, variable in variables.items():
        variable.assign(published.arrays[path])
