"""The metrics that a run reports, and their files metrics.jsonl and timings.jsonl.

metrics.jsonl holds only functions of the inputs, so that an interrupted run and an uninterrupted
run write the same lines. Times go to timings.jsonl and TensorBoard (board.py).
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.storage import files

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"

# A latent is active if its posterior mean varies more than this over the data: Burda, Grosse and
# Salakhutdinov (2016), "Importance Weighted Autoencoders", section 5.2.
_ACTIVE_VARIANCE = 0.01


def from_sums(sums: Sequence[float], *, num_pixels: int, bernoulli: bool) -> dict[str, float]:
    """Means over examples, from sums over the examples.

    Args:
      sums: the columns of `evaluation.SUMS`.
      num_pixels: H·W·C.
      bernoulli: whether the likelihood is Bernoulli, and reconstruction_loss a cross-entropy.

    Returns:
      loss, reconstruction_loss, kl and elbo in nats per image; if bernoulli, bce in nats
      per pixel.
    """
    loss, reconstruction_loss, kl, num_examples = map(float, sums)
    means = {
        "loss": loss / num_examples,
        "reconstruction_loss": reconstruction_loss / num_examples,
        "kl": kl / num_examples,
        "elbo": -(reconstruction_loss + kl) / num_examples,
    }
    if bernoulli:
        means["bce"] = means["reconstruction_loss"] / num_pixels
    return means


def active_units(moment_sums: np.ndarray, num_examples: float) -> int:
    """The number of active latents: those with Var_x(E[z | x]) > 0.01.

    Args:
      moment_sums: float64 (2·latent_dim,), sums of the posterior means, then of their squares.
      num_examples: number of examples in the sums.
    """
    mean, square = np.split(moment_sums / num_examples, 2)
    return int(np.count_nonzero(square - mean**2 > _ACTIVE_VARIANCE))


def describe(metrics: dict[str, float]) -> str:
    """The metrics as a progress line shows them."""
    return " ".join(
        f"{name} {metrics[name]:.4f}" if name == "bce" else f"{name} {metrics[name]:.2f}"
        for name in ("loss", "reconstruction_loss", "kl", "bce")
        if name in metrics
    )


class JsonLines:
    """A file with one JSON object a line, rewritten atomically for each new line.

    A run writes a few lines an epoch, so the file stays small.
    """

    def __init__(
        self,
        path: str,
        *,
        up_to_step: int,
        writes: bool = True,
        checkpoint_text: str | None = None,
        skips_damaged: bool = False,
    ):
        """Opens the file and drops the lines that an earlier try wrote after `up_to_step`.

        Lines of the split `test` go too: they describe the end of a run, and this run goes on.

        Args:
          path: local path or fsspec URL.
          up_to_step: the step from which the run resumes.
          writes: whether to write the file; else the lines stay in memory.
          checkpoint_text: the checkpoint's copy of the file's text at that step; None if the
            checkpoint has no copy, and the file's own text counts.
          skips_damaged: whether to drop damaged lines; for a file that decides nothing.

        Raises:
          StageError: a line of the text is damaged.
        """
        self._path, self._writes, self._skips_damaged = path, writes, skips_damaged
        file_text = files.read_bytes(path).decode(errors="replace") if files.exists(path) else ""
        text = file_text if checkpoint_text is None else checkpoint_text
        self._lines = self._lines_up_to(up_to_step, text)
        # Further lines are normal: the run went on after the checkpoint, until it was stopped.
        if writes and checkpoint_text and not file_text.startswith(checkpoint_text):
            print(
                f"train: {path} was changed after step {up_to_step}; its {len(self._lines)} lines "
                "are restored from the checkpoint",
                file=sys.stderr,
            )
        if file_text != self.text:
            self._write()

    def _lines_up_to(self, last_step: int, text: str) -> list[str]:
        lines = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                value = json.loads(line)
                is_later = value["step"] > last_step
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if self._skips_damaged:
                    continue
                raise StageError(
                    f"{self._path}: line {number} is damaged ({error!r}); expected a JSON object "
                    'with the key "step"; remove the line'
                ) from error
            if not is_later and value.get("split") != "test":
                lines.append(line)
        return lines

    @property
    def text(self) -> str:
        """The file's text."""
        return "".join(f"{line}\n" for line in self._lines)

    def append(self, value: dict[str, Any]) -> None:
        """Adds a line; `value` has a key "step"."""
        self._lines.append(json.dumps(value))
        self._write()

    def split_lines(self, split: str) -> list[dict[str, Any]]:
        """The objects of a split, oldest first."""
        values = [json.loads(line) for line in self._lines]
        return [value for value in values if value.get("split") == split]

    def _write(self) -> None:
        if self._writes:
            files.write_bytes(self._path, self.text.encode())
