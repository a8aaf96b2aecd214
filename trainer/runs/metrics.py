"""The numbers that a run reports: metrics.jsonl and timings.jsonl.

metrics.jsonl holds only what is a function of the inputs, so that an interrupted
run and an uninterrupted one write the same lines; anything with a clock in it goes
to timings.jsonl and TensorBoard (board.py).
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


# A latent whose posterior mean varies less than this over the data is not in use: Burda,
# Grosse and Salakhutdinov (2016), "Importance Weighted Autoencoders", section 5.2.
_ACTIVE_VARIANCE = 0.01


def from_sums(sums: Sequence[float], *, num_pixels: int, bernoulli: bool) -> dict[str, float]:
    """Means over examples from sums over them.

    Args:
      sums: as in `tape_steps.SUMS`.
      num_pixels: H·W·C.
      bernoulli: whether the likelihood is, so that the first term is a cross-entropy.

    Returns:
      loss, reconstruction_loss, kl and elbo in nats per image; if bernoulli, bce in nats
      per pixel.
    """
    loss, reconstruction_loss, kl, num_examples = map(float, sums)
    made = {
        "loss": loss / num_examples,
        "reconstruction_loss": reconstruction_loss / num_examples,
        "kl": kl / num_examples,
        "elbo": -(reconstruction_loss + kl) / num_examples,
    }
    return made | ({"bce": made["reconstruction_loss"] / num_pixels} if bernoulli else {})


def active_units(sums_of_latents: np.ndarray, num_examples: float) -> int:
    """How many latents are in use: those with Var_x(E[z | x]) > 0.01.

    Args:
      sums_of_latents: float64 (2·latent_dim,), sums of the posterior means, then of their
        squares.
      num_examples: over how many examples.
    """
    mean, square = np.split(sums_of_latents / num_examples, 2)
    return int(np.count_nonzero(square - mean**2 > _ACTIVE_VARIANCE))


def describe(metrics: dict[str, float]) -> str:
    """The metrics as a progress line shows them."""
    return " ".join(
        f"{name} {metrics[name]:.4f}" if name == "bce" else f"{name} {metrics[name]:.2f}"
        for name in ("loss", "reconstruction_loss", "kl", "bce")
        if name in metrics
    )


class JsonLines:
    """A file of one JSON object a line, rewritten whole and atomically at each line.

    A run writes a few lines an epoch, so the whole file stays small.
    """

    def __init__(
        self,
        path: str,
        *,
        up_to_step: int,
        writes: bool = True,
        reported: str | None = None,
        skips_damaged: bool = False,
    ):
        """Opens the file and drops what an earlier try wrote after `up_to_step`.

        Lines of the split `test` go too: they are about the end of a run, which is to come.

        Args:
          path: local path or fsspec URL.
          up_to_step: the step from which the run goes on.
          writes: whether to write at all; without it the lines are only kept in memory.
          reported: the text that the file has at that step, by a checkpoint; None where no
            checkpoint says it, and the file is taken at its word.
          skips_damaged: whether lines that are none are dropped: of a file that decides nothing.

        Raises:
          StageError: a line of the file, taken at its word, is no line of metrics.
        """
        self._path, self._writes, self._skips_damaged = path, writes, skips_damaged
        there = files.read_bytes(path).decode(errors="replace") if files.exists(path) else ""
        self._lines = self._kept(there if reported is None else reported, up_to_step)
        # Lines that came after the checkpoint are no surprise: the run was stopped there.
        if writes and reported and not there.startswith(reported):
            print(
                f"train: {path} is not as step {up_to_step} left it; its {len(self._lines)} lines "
                "are restored from the checkpoint",
                file=sys.stderr,
            )
        if there != self.text:
            self._write()

    def _kept(self, text: str, up_to_step: int) -> list[str]:
        kept = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                value = json.loads(line)
                late = value["step"] > up_to_step
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if self._skips_damaged:
                    continue
                raise StageError(
                    f"{self._path}: line {number} is no line of metrics ({error!r}); remove the "
                    "line"
                ) from error
            if not late and value.get("split") != "test":
                kept.append(line)
        return kept

    @property
    def text(self) -> str:
        """The file's text."""
        return "".join(f"{line}\n" for line in self._lines)

    def append(self, value: dict[str, Any]) -> None:
        """Adds a line; `value` has a key "step"."""
        self._lines.append(json.dumps(value))
        self._write()

    def of(self, split: str) -> list[dict[str, Any]]:
        """The lines of a split, oldest first."""
        values = [json.loads(line) for line in self._lines]
        return [value for value in values if value.get("split") == split]

    def _write(self) -> None:
        if self._writes:
            files.write_bytes(self._path, self.text.encode())
