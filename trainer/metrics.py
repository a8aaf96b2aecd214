"""What a run reports: metrics.jsonl, timings.jsonl and TensorBoard.

metrics.jsonl holds only what is a function of the inputs, so that an interrupted
run and an uninterrupted one write the same lines; anything with a clock in it goes
to timings.jsonl and TensorBoard.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline import storage
from pipeline.errors import StageError

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"
TENSORBOARD = "tensorboard"


def from_sums(sums: Sequence[float], *, beta: float, num_pixels: int) -> dict[str, float]:
    """Means over examples from sums over them.

    Args:
      sums: as in `step.SUMS`.
      beta: weight of the KL term.
      num_pixels: H·W·C.

    Returns:
      loss, reconstruction_loss, kl and elbo in nats per image; bce in nats per pixel.
    """
    reconstruction_loss, kl, num_examples = sums
    reconstruction_loss, kl = reconstruction_loss / num_examples, kl / num_examples
    return {
        "loss": reconstruction_loss + beta * kl,
        "reconstruction_loss": reconstruction_loss,
        "kl": kl,
        "elbo": -(reconstruction_loss + kl),
        "bce": reconstruction_loss / num_pixels,
    }


def describe(metrics: dict[str, float]) -> str:
    """The metrics as a progress line shows them."""
    return " ".join(
        f"{name} {metrics[name]:.4f}" if name == "bce" else f"{name} {metrics[name]:.2f}"
        for name in ("loss", "reconstruction_loss", "kl", "bce")
    )


class JsonLines:
    """A file of one JSON object a line, rewritten whole and atomically at each line.

    A run writes a few lines an epoch, so the whole file stays small.
    """

    def __init__(self, path: str, *, up_to_step: int):
        """Opens the file and drops what an earlier try wrote after `up_to_step`.

        Lines of the split `test` go too: they are about the end of a run, which is to come.
        """
        self._path = path
        self._lines = []
        if storage.exists(path):
            for number, line in enumerate(
                storage.read_bytes(path).decode(errors="replace").splitlines(), 1
            ):
                try:
                    value = json.loads(line)
                    late = value["step"] > up_to_step
                except (ValueError, TypeError, KeyError) as error:
                    raise StageError(
                        f"{path}: line {number} is no line of metrics ({error!r}); remove the line"
                    ) from error
                if not late and value.get("split") != "test":
                    self._lines.append(line)
            self._write()

    def append(self, value: dict[str, Any]) -> None:
        """Adds a line; `value` has a key "step"."""
        self._lines.append(json.dumps(value))
        self._write()

    def last(self, split: str) -> dict[str, Any] | None:
        """The newest line of a split."""
        for line in reversed(self._lines):
            value = json.loads(line)
            if value.get("split") == split:
                return value
        return None

    def _write(self) -> None:
        storage.write_bytes(self._path, "".join(f"{line}\n" for line in self._lines).encode())


class TensorBoard:
    """TensorBoard summaries of a run, one event file a try."""

    def __init__(self, workdir: str):
        """Opens a writer below `workdir`."""
        # Events of a URL stay in a scratch directory of the machine until they are published.
        self._target = storage.join(workdir, TENSORBOARD)
        self._scratch = storage.scratch_directory() if storage.is_url(workdir) else None
        self._writer = tf.summary.create_file_writer(self._scratch or self._target)

    def scalars(self, step: int, prefix: str, values: dict[str, float]) -> None:
        """Writes numbers under `<prefix>/<name>`."""
        with self._writer.as_default():
            for name, value in values.items():
                tf.summary.scalar(f"{prefix}/{name}", value, step=step)

    def reconstructions(self, step: int, originals: np.ndarray, made: np.ndarray) -> None:
        """Writes pictures, each an original above its reconstruction.

        Args:
          step: global step.
          originals: float32 (n, H, W, C) in [0, 1].
          made: the same for the reconstructions.
        """
        pairs = np.concatenate([originals, made], axis=1)  # (n, 2H, W, C)
        if pairs.shape[-1] not in (1, 3, 4):  # What a picture can show of other channels.
            pairs = pairs[..., :1]
        with self._writer.as_default():
            tf.summary.image("reconstructions", pairs, step=step, max_outputs=len(pairs))

    def flush(self) -> None:
        """Makes everything written so far visible to readers."""
        self._writer.flush()
        if self._scratch:
            storage.publish_tree(self._scratch, self._target)
