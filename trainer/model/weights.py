"""The weights of a published model, as arrays: to begin another run with, or to evaluate."""

import io
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.stages import manifest as manifest_lib
from trainer.model.networks import VAE

FILE = "weights.npz"


class Published(NamedTuple):
    """A published model directory, read."""

    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray]  # path of the variable -> value


def serialize(vae: VAE) -> bytes:
    """The weights as the bytes of an .npz file; the same for the same weights."""
    buffer = io.BytesIO()
    np.savez(buffer, **{variable.path: variable.numpy() for variable in vae.variables})
    return buffer.getvalue()


def read(model_dir: str, flag: str) -> Published:
    """Reads a model directory.

    Args:
      model_dir: as `publish.publish` writes it; local path or fsspec URL.
      flag: what names it on the command line, for messages.

    Raises:
      StageError: there is no finished model, or it is damaged.
    """
    manifest = manifest_lib.read_manifest(model_dir, "train", flag)
    entries = [entry for entry in manifest["files"] if entry["name"] == FILE]
    if not entries:
        raise StageError(
            f"{flag}={model_dir}: has no {FILE}, so an older version of this program wrote it; "
            "train it again"
        )
    with np.load(
        io.BytesIO(manifest_lib.read_file(model_dir, entries[0])), allow_pickle=False
    ) as file:
        return Published(manifest, {name: file[name] for name in file.files})


def assign(vae: VAE, published: Published, *, model_dir: str) -> None:
    """Gives a model the weights of another.

    Raises:
      StageError: the two are not of the same shape; names the first variable that differs.
    """
    here = {variable.path: variable for variable in vae.variables}
    for path in sorted(here.keys() | published.arrays.keys()):
        shapes = [
            tuple(there[path].shape) if path in there else "absent"
            for there in (published.arrays, here)
        ]
        if shapes[0] != shapes[1]:
            raise StageError(
                f"{model_dir}: its weight {path!r} is {shapes[0]}, and {shapes[1]} in this "
                "config; expected the same architecture and latent_dim"
            )
    for path, variable in here.items():
        variable.assign(published.arrays[path])
