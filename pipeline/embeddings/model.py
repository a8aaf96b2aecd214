"""Loads a published model directory and runs the model, for export and its report."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.cli import quiet
from pipeline.cli.errors import StageError
from pipeline.machine import arithmetic
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import verification

# Images in one call of the model, and their most bytes as floats. All calls of a model have the
# same shape, and the last batch is padded, so that a row does not depend on the size of its batch.
_BATCH_SIZE = 256
_MAX_BATCH_BYTES = 1 << 28
_SIGNATURE = "embed"


@contextlib.contextmanager
def _checked_files(model_dir: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a scratch directory with the checked bytes of the files that a manifest lists.

    So what TensorFlow reads is what was checked, even if somebody writes to `model_dir` meanwhile.

    Raises:
      StageError: a file is missing, damaged, or not in the manifest.
    """
    for path in verification.unlisted_in_model(model_dir, entries):
        raise StageError(
            f"{path}: is not in {manifest_lib.MANIFEST}, but TensorFlow looks for files of that "
            "name; expected no other files of a SavedModel than the listed ones: remove the file, "
            "or run the training command again, which publishes the model again"
        )
    with tempfile.TemporaryDirectory() as scratch:
        for entry in entries:
            path = os.path.join(scratch, entry["name"])
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(manifest_lib.read_file(model_dir, entry))
        yield scratch


class PublishedModel:
    """The SavedModel that a manifest describes."""

    def __init__(self, model_dir: str, manifest: dict[str, Any], *, fast_math: bool = False):
        """Checks the files against the manifest and loads the SavedModel.

        Args:
          model_dir: local path or fsspec URL.
          manifest: the directory's manifest, which the command sends to its workers.
          fast_math: on GPUs, whether products may be rounded to TensorFloat-32, and the last
            digits of results may depend on timing.

        Raises:
          StageError: a file is missing, damaged or unlisted, or the SavedModel does not fit the
            manifest.
        """
        quiet.import_tensorflow()
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if gpus:  # On a CPU, results never depend on timing.
            tf.config.experimental.enable_tensor_float_32_execution(fast_math)
            if not fast_math:
                tf.config.experimental.enable_op_determinism()
        for device in gpus:
            # Workers share a device, and by default the first would take all of its memory.
            with contextlib.suppress(RuntimeError):  # The device is already in use.
                tf.config.experimental.set_memory_growth(device, True)
        with _checked_files(model_dir, manifest["files"]) as directory:
            self._loaded = tf.saved_model.load(directory)
        self.image_shape: tuple[int, int, int] = tuple(manifest["image_shape"])
        self.latent_dim: int = manifest["config"]["latent_dim"]
        self.kind = arithmetic.kind()
        self._check_shapes(model_dir)
        max_images = _MAX_BATCH_BYTES // (4 * math.prod(self.image_shape))
        self.batch_size = max(1, min(_BATCH_SIZE, max_images))
        self._functions: dict[tuple[str, ...], Any] = {}

    def _check_shapes(self, model_dir: str) -> None:
        """Raises a StageError unless the SavedModel has the shapes that the manifest names."""
        expected = self.image_shape, self.latent_dim
        actual = None
        if _SIGNATURE in self._loaded.signatures:
            embed = self._loaded.signatures[_SIGNATURE]
            images = embed.structured_input_signature[1]["images"].shape
            actual = tuple(images[1:]), embed.structured_outputs["mean"].shape[-1]
        if actual != expected:
            raise StageError(
                f"{model_dir}: its SavedModel has image shape and number of latents {actual}, "
                f"{manifest_lib.MANIFEST} says {expected}; expected the same: train the model again"
            )

    def prepared(self, outputs: Sequence[str]) -> "PublishedModel":
        """Returns self after tracing the function for `outputs`, before threads share it."""
        self.embed(np.zeros((0, *self.image_shape), np.uint8), outputs)
        return self

    def embed(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Runs the model over at most batch_size images.

        Args:
          images: uint8 (n, H, W, C).
          outputs: some of mean and log_var (n, latent_dim), reconstruction (n, H, W, C) in
            [0, 1], reconstruction_loss and kl (n,) in nats per image. Nothing else is computed.

        Returns:
          name of the output -> float32 array.
        """
        import tensorflow as tf

        names = tuple(outputs)
        if names not in self._functions:
            self._functions[names] = self._function(names)
        padding = [(0, self.batch_size - len(images))] + [(0, 0)] * 3
        values = self._functions[names](tf.constant(np.pad(images, padding)))
        return {name: value.numpy()[: len(images)] for name, value in values.items()}

    def _function(self, names: Sequence[str]) -> Any:
        import tensorflow as tf

        embed = self._loaded.signatures[_SIGNATURE]
        shape = (self.batch_size, *self.image_shape)

        @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8)], autograph=False)
        def embed_outputs(images):
            outputs = embed(images=images)
            return {name: outputs[name] for name in names}

        return embed_outputs

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Reconstructions of any number of images, float32 (n, H, W, C) in [0, 1]."""
        parts = [np.empty((0, *self.image_shape), np.float32)]
        for first in range(0, len(images), self.batch_size):
            chunk = images[first : first + self.batch_size]
            parts.append(self.embed(chunk, ("reconstruction",))["reconstruction"])
        return np.concatenate(parts)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Decodes latents, float32 (n, latent_dim), to images, float32 (n, H, W, C) in [0, 1]."""
        import tensorflow as tf

        decode = self._loaded.signatures["decode"]
        return decode(z=tf.constant(z, tf.float32))["images"].numpy()
