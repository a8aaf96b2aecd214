"""Statistics of an export, from the sums of its shards."""

import heapq
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.cli.errors import StageError
from pipeline.stages import manifest as manifest_lib

# The file with the sums of each shard, and the summary of all shards.
FILE = "statistics.json"
# Metrics in the model's manifest are named model.SPLIT.NAME in --require.
MODEL_PREFIX = "model."
# A latent is active if the variance of its posterior mean over the data is above this: Burda,
# Grosse and Salakhutdinov (2016), "Importance Weighted Autoencoders", section 5.2.
ACTIVE_VARIANCE = 0.01
_NUM_WORST = 32
# Columns in nats per image.
_LOSSES = ("reconstruction_loss", "kl", "elbo")


def summary(sums_by_shard: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics over all shards, as JSON values.

    Args:
      sums_by_shard: task -> the result of `rows.sums`.

    Returns:
      "num_rows"; means over the rows: "reconstruction_loss", "kl", "elbo" in nats per image,
      and their "…_variance"; "active_units" of "latent_dim"; "latents": a list of {"mean",
      "variance" of the posterior means, "kl"}; "worst": [loss, id, label, task] of the rows with
      the largest reconstruction_loss, or [loss, id, label, task, excess] of those furthest above
      their floor, in descending order. Statistics of fields that the rows lack are left out;
      without rows, all but "num_rows".
    """
    shard_sums = [sums for sums in sums_by_shard.values() if sums["num_rows"]]
    count = sum(sums["num_rows"] for sums in shard_sums)
    result: dict[str, Any] = {"num_rows": count}
    if not count:
        return result
    for name in _LOSSES:
        if name in shard_sums[0]:
            result[name] = math.fsum(sums[name]["sum"] for sums in shard_sums) / count
            mean_square = math.fsum(sums[name]["sum_of_squares"] for sums in shard_sums) / count
            result[f"{name}_variance"] = max(0.0, mean_square - result[name] ** 2)
    if "elbo" not in result and {"reconstruction_loss", "kl"} <= result.keys():
        result["elbo"] = -(result["reconstruction_loss"] + result["kl"])
    if "mean" in shard_sums[0]:
        result["latents"] = _latents(shard_sums, count)
        is_active = [latent["variance"] > ACTIVE_VARIANCE for latent in result["latents"]]
        result |= {"active_units": sum(is_active), "latent_dim": len(is_active)}
    if "worst" in shard_sums[0]:
        candidates = (
            (-(excess[0] if excess else loss), record_id, label, task, loss, excess)
            for task, sums in sums_by_shard.items()
            for loss, record_id, label, *excess in sums.get("worst", ())
        )
        worst = heapq.nsmallest(_NUM_WORST, candidates)
        result["worst"] = [
            [loss, record_id, label, task, *excess]
            for _, record_id, label, task, loss, excess in worst
        ]
    return result


def _latents(shard_sums: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, float]]:
    def means(name: str) -> list[float]:
        sums_by_latent = zip(*(sums[name] for sums in shard_sums), strict=True)
        return [math.fsum(sums) / count for sums in sums_by_latent]

    latents = []
    for mean, mean_square in zip(means("mean"), means("mean_squared"), strict=True):
        latents.append({"mean": mean, "variance": max(0.0, mean_square - mean**2)})
    if "kl_per_latent" in shard_sums[0]:
        for latent, kl in zip(latents, means("kl_per_latent"), strict=True):
            latent["kl"] = kl
    return latents


def metric_names(fields: Iterable[str]) -> list[str]:
    """The metrics in the `summary` of rows with these fields that --require can bound."""
    fields = set(fields)
    names = [name for name in _LOSSES if name in fields]
    if "elbo" not in fields and {"reconstruction_loss", "kl"} <= fields:
        names.append("elbo")
    if "mean" in fields:
        names.append("active_units")
    return names


def model_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """A model's metrics, split -> name -> value, by their names in --require."""
    return {
        f"{MODEL_PREFIX}{split}.{name}": value
        for split, split_metrics in metrics.items()
        for name, value in split_metrics.items()
        if isinstance(value, int | float)
    }


def read(directory: str, files: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The contents of an export's statistics.json: "summary" and "shards".

    Args:
      directory: the export's.
      files: entries of the export's files.

    Raises:
      StageError: the file is missing or damaged, or an earlier version made the export without.
    """
    for entry in files:
        if entry["name"] == FILE:
            return json.loads(manifest_lib.read_file(directory, entry))
    raise StageError(
        f"{directory}: has no {FILE}, so an earlier version of this program made this export; make "
        "it again with --overwrite"
    )
