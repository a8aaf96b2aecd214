"""Rows of an export in memory: their columns, the sampled z, and the sums of a shard.

A row is a function of its record's bytes and the model. The file formats are in files.py.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Fields of a row beside id, label and record_sha. Vectors have latent_dim numbers; losses are nats
# per image.
VECTORS = ("mean", "log_var", "z")
FIELDS = (*VECTORS, "reconstruction_loss", "kl", "elbo")
# Rows with the largest reconstruction_loss that the sums of a shard list.
_NUM_WORST = 32
# Images whose pixels are looked up at once, to bound memory.
_IMAGES_AT_ONCE = 256


class Rows(NamedTuple):
    """n rows, in the order of their shard."""

    ids: list[str]
    labels: np.ndarray  # (n,) int64
    shas: list[str]  # sha256 of each record's bytes, hex
    columns: dict[str, np.ndarray]  # field -> (n, latent_dim) or (n,) float32

    def take(self, indices: Sequence[int]) -> "Rows":
        """The rows at these indices, in the order of the indices."""
        return Rows(
            [self.ids[i] for i in indices],
            self.labels[indices],
            [self.shas[i] for i in indices],
            {name: values[indices] for name, values in self.columns.items()},
        )


def concatenated(parts: Sequence[Rows]) -> Rows:
    """Concatenates the rows of one or more parts."""
    return Rows(
        [record_id for part in parts for record_id in part.ids],
        np.concatenate([part.labels for part in parts]),
        [sha for part in parts for sha in part.shas],
        {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns},
    )


def noise(shas: Sequence[str], *, latent_dim: int, seed: int) -> np.ndarray:
    """Standard normal noise that depends on the record and not on its position in a batch.

    SHAKE-128 over seed and record_sha gives uniform numbers. The transform of Box and Muller
    (1958), "A Note on the Generation of Random Normal Deviates", makes them normal.

    Args:
      shas: sha256 of each record's bytes, hex.
      latent_dim: numbers for each record.
      seed: seed of the noise.

    Returns:
      float64 (n, latent_dim).
    """
    num_pairs = -(-latent_dim // 2)
    keyed = hashlib.shake_128(b"z%d|" % seed)
    digests = []
    for sha in shas:
        shake = keyed.copy()
        shake.update(bytes.fromhex(sha))
        digests.append(shake.digest(16 * num_pairs))
    words = np.frombuffer(b"".join(digests), "<u8").reshape(len(shas), 2, num_pairs)
    uniform = ((words >> np.uint64(11)) + 0.5) / 2.0**53  # In (0, 1), never 0.
    radius = np.sqrt(-2 * np.log(uniform[:, 0]))
    angle = 2 * math.pi * uniform[:, 1]
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs[:, :latent_dim]


def columns(
    outputs: Mapping[str, np.ndarray], shas: Sequence[str], fields: Sequence[str], *, seed: int
) -> dict[str, np.ndarray]:
    """Computes the columns of n rows from the model's outputs.

    Args:
      outputs: those that `model_outputs` names, float32, each with n rows.
      shas: sha256 of each record's bytes, hex.
      fields: the fields to compute.
      seed: seed of the noise in z.
    """
    values = {}
    for field in fields:
        if field == "z":
            mean, log_var = outputs["mean"], outputs["log_var"]
            epsilon = noise(shas, latent_dim=mean.shape[1], seed=seed)
            values[field] = (mean + np.exp(log_var / np.float32(2)) * epsilon).astype(np.float32)
        elif field == "elbo":
            values[field] = -(outputs["reconstruction_loss"] + outputs["kl"])
        else:
            values[field] = outputs[field]
    return values


def model_outputs(fields: Sequence[str]) -> list[str]:
    """The model's outputs that the fields are computed from."""
    derived = {"z": ("mean", "log_var"), "elbo": ("reconstruction_loss", "kl")}
    return sorted({output for field in fields for output in derived.get(field, (field,))})


def kl_per_latent(mean: np.ndarray, log_var: np.ndarray) -> np.ndarray:
    """KL(N(mean, exp(log_var)) ‖ N(0, 1)) of each latent, nats; float64 like its arguments.

    Kingma and Welling (2014), "Auto-Encoding Variational Bayes", appendix B.
    """
    mean, log_var = mean.astype(np.float64), log_var.astype(np.float64)
    return 0.5 * (mean**2 + np.expm1(log_var) - log_var)


def bernoulli_entropy(images: np.ndarray) -> np.ndarray:
    """The entropy of each image's pixels, taken as probabilities, in nats per image.

    No Bernoulli reconstruction_loss is below it: −x·log p − (1 − x)·log(1 − p) is least at p = x
    (Cover and Thomas, "Elements of Information Theory", theorem 2.6.3).

    Args:
      images: uint8 (n, H, W, C).

    Returns:
      float64 (n,).
    """
    x = np.arange(1, 255) / 255
    entropies = np.zeros(256, np.float32)  # 0 and 255 are certain.
    entropies[1:-1] = -x * np.log(x) - (1 - x) * np.log1p(-x)
    parts = [np.empty(0)]
    for first in range(0, len(images), _IMAGES_AT_ONCE):
        batch = images[first : first + _IMAGES_AT_ONCE]
        parts.append(entropies[batch.reshape(len(batch), -1)].sum(axis=1, dtype=np.float64))
    return np.concatenate(parts)


def sums(rows: Rows, floor: np.ndarray | None = None) -> dict[str, Any]:
    """Sums over a shard's rows, as JSON values; `summary.py` adds those of all shards.

    Args:
      rows: the shard's.
      floor: nats per image that no reconstruction_loss is below, float64 (n,), if known.

    Returns:
      "num_rows"; "sum" and "sum_of_squares" of each loss; for the latents, lists of sums of
      mean, of its squares and of kl; "worst": [loss, id, label] of the rows with the largest
      reconstruction_loss, in descending order; with a floor, [loss, id, label, excess] of those
      that are furthest above it.
    """
    result: dict[str, Any] = {"num_rows": len(rows.ids)}
    columns64 = {name: values.astype(np.float64) for name, values in rows.columns.items()}
    for name, values in columns64.items():
        if name not in VECTORS:
            result[name] = {"sum": float(values.sum()), "sum_of_squares": float((values**2).sum())}
    if "mean" in columns64:
        result["mean"] = columns64["mean"].sum(axis=0).tolist()
        result["mean_squared"] = (columns64["mean"] ** 2).sum(axis=0).tolist()
        if "log_var" in columns64:
            per_latent = kl_per_latent(columns64["mean"], columns64["log_var"])
            result["kl_per_latent"] = per_latent.sum(axis=0).tolist()
    if "reconstruction_loss" in columns64:
        losses = columns64["reconstruction_loss"]
        excess = losses if floor is None else losses - floor
        order = sorted(range(len(rows.ids)), key=lambda i: (-excess[i], rows.ids[i]))
        result["worst"] = [
            [float(losses[i]), rows.ids[i], int(rows.labels[i])]
            + ([] if floor is None else [float(excess[i])])
            for i in order[:_NUM_WORST]
        ]
    return result
