"""Rows of an export in memory: their columns, the sampled z, and the sums kept of them.

A row is a function of its record's bytes and the model. How rows lie in files is in
files.py.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# What a row may hold beside id, label and record_sha. Vectors have latent_dim numbers; the
# losses are nats per image.
VECTORS = ("mean", "log_var", "z")
FIELDS = (*VECTORS, "reconstruction_loss", "kl", "elbo")
DEFAULT_FIELDS = ("mean", "log_var", "reconstruction_loss", "kl")
# Rows of largest reconstruction_loss that are kept of each shard.
_NUM_WORST = 32


class Rows(NamedTuple):
    """n rows, in the order of their shard."""

    ids: list[str]
    labels: np.ndarray  # (n,) int64
    shas: list[str]  # sha256 of each record's bytes, hex
    columns: dict[str, np.ndarray]  # field -> (n, latent_dim) or (n,) float32

    def take(self, places: Sequence[int]) -> "Rows":
        """The rows at some places, in that order."""
        return Rows(
            [self.ids[place] for place in places],
            self.labels[places],
            [self.shas[place] for place in places],
            {name: values[places] for name, values in self.columns.items()},
        )


def concatenated(parts: Sequence[Rows]) -> Rows:
    """The rows of at least one part, as one."""
    return Rows(
        [i for part in parts for i in part.ids],
        np.concatenate([part.labels for part in parts]),
        [sha for part in parts for sha in part.shas],
        {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns},
    )


def noise(shas: Sequence[str], *, latent_dim: int, seed: int) -> np.ndarray:
    """Standard normal numbers that belong to the records and to no place in a batch.

    Uniform numbers out of SHAKE-128 over seed and record_sha, made normal by Box and Muller
    (1958), "A Note on the Generation of Random Normal Deviates".

    Args:
      shas: sha256 of each record's bytes, hex.
      latent_dim: numbers for each record.
      seed: another one gives other numbers.

    Returns:
      float64 (n, latent_dim).
    """
    num_pairs = -(-latent_dim // 2)
    keyed = hashlib.shake_128(b"z%d|" % seed)
    drawn = []
    for sha in shas:
        of_record = keyed.copy()
        of_record.update(bytes.fromhex(sha))
        drawn.append(of_record.digest(16 * num_pairs))
    words = np.frombuffer(b"".join(drawn), "<u8").reshape(len(shas), 2, num_pairs)
    uniform = ((words >> np.uint64(11)) + 0.5) / 2.0**53  # In (0, 1), never 0.
    radius = np.sqrt(-2 * np.log(uniform[:, 0]))
    angle = 2 * math.pi * uniform[:, 1]
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs[:, :latent_dim]


def columns(
    outputs: Mapping[str, np.ndarray], shas: Sequence[str], fields: Sequence[str], *, seed: int
) -> dict[str, np.ndarray]:
    """The fields of some rows from what the model gave for them.

    Args:
      outputs: what `needed_outputs` names, float32, n of each.
      shas: sha256 of each record's bytes, hex.
      fields: which fields to make.
      seed: of the noise in z.
    """
    made = {}
    for field in fields:
        if field == "z":
            mean, log_var = outputs["mean"], outputs["log_var"]
            drawn = noise(shas, latent_dim=mean.shape[1], seed=seed)
            made[field] = (mean + np.exp(log_var / np.float32(2)) * drawn).astype(np.float32)
        elif field == "elbo":
            made[field] = -(outputs["reconstruction_loss"] + outputs["kl"])
        else:
            made[field] = outputs[field]
    return made


def needed_outputs(fields: Sequence[str]) -> list[str]:
    """The model's outputs that the fields are made of."""
    of = {"z": ("mean", "log_var"), "elbo": ("reconstruction_loss", "kl")}
    return sorted({output for field in fields for output in of.get(field, (field,))})


def kl_per_latent(mean: np.ndarray, log_var: np.ndarray) -> np.ndarray:
    """KL(N(mean, exp(log_var)) ‖ N(0, 1)) of each latent, nats; float64 like its arguments.

    Kingma and Welling (2014), "Auto-Encoding Variational Bayes", appendix B.
    """
    mean, log_var = mean.astype(np.float64), log_var.astype(np.float64)
    return 0.5 * (mean**2 + np.expm1(log_var) - log_var)


def sums(rows: Rows) -> dict[str, Any]:
    """What is kept of a shard's rows, as JSON values: `summary.py` adds shards up.

    Returns:
      "num_rows"; for each number of nats "sum" and "sum_of_squares"; for the latents lists of
      sums of mean, of its squares and of kl; "worst": [loss, id, label] of the largest
      reconstruction_loss, downwards.
    """
    found: dict[str, Any] = {"num_rows": len(rows.ids)}
    wide = {name: values.astype(np.float64) for name, values in rows.columns.items()}
    for name, values in wide.items():
        if name not in VECTORS:
            found[name] = {"sum": float(values.sum()), "sum_of_squares": float((values**2).sum())}
    if "mean" in wide:
        found["mean"] = wide["mean"].sum(axis=0).tolist()
        found["mean_squared"] = (wide["mean"] ** 2).sum(axis=0).tolist()
        if "log_var" in wide:
            per_latent = kl_per_latent(wide["mean"], wide["log_var"])
            found["kl_per_latent"] = per_latent.sum(axis=0).tolist()
    if "reconstruction_loss" in wide:
        losses = rows.columns["reconstruction_loss"]
        order = sorted(range(len(rows.ids)), key=lambda i: (-losses[i], rows.ids[i]))
        found["worst"] = [
            [float(losses[i]), rows.ids[i], int(rows.labels[i])] for i in order[:_NUM_WORST]
        ]
    return found
