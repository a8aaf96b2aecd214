"""An export in numbers: the sums of its shards added up."""

import heapq
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.cli.errors import StageError
from pipeline.stages import manifest as manifest_lib

# The file that holds the sums of each shard, and what they come to.
FILE = "statistics.json"
# A latent whose posterior mean varies less than this over the data is not in use: Burda,
# Grosse and Salakhutdinov (2016), "Importance Weighted Autoencoders", section 5.2.
ACTIVE_VARIANCE = 0.01
_NUM_WORST = 32
# Numbers of the rows in nats per image.
_LOSSES = ("reconstruction_loss", "kl", "elbo")


def summary(of_shards: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What all shards come to, as JSON values.

    Args:
      of_shards: task -> what `rows.sums` found in it.

    Returns:
      "num_rows"; means over the rows: "reconstruction_loss", "kl", "elbo" in nats per image,
      and their "…_variance";
      "active_units" of "latent_dim"; "latents": a list of {"mean", "variance" of the posterior
      means, "kl"}; "worst": [loss, id, label, task] of the largest reconstruction_loss, downwards.
      What the rows don't hold, or no row there is, is left out.
    """
    found = [sums for sums in of_shards.values() if sums["num_rows"]]
    count = sum(sums["num_rows"] for sums in found)
    made: dict[str, Any] = {"num_rows": count}
    if not count:
        return made
    for name in _LOSSES:
        if name in found[0]:
            made[name] = math.fsum(sums[name]["sum"] for sums in found) / count
            square = math.fsum(sums[name]["sum_of_squares"] for sums in found) / count
            made[f"{name}_variance"] = max(0.0, square - made[name] ** 2)
    if "elbo" not in made and {"reconstruction_loss", "kl"} <= made.keys():
        made["elbo"] = -(made["reconstruction_loss"] + made["kl"])
    if "mean" in found[0]:
        made["latents"] = _latents(found, count)
        active = [latent["variance"] > ACTIVE_VARIANCE for latent in made["latents"]]
        made |= {"active_units": sum(active), "latent_dim": len(active)}
    if "worst" in found[0]:
        every = (
            (-loss, record_id, label, task)
            for task, sums in of_shards.items()
            for loss, record_id, label in sums.get("worst", ())
        )
        made["worst"] = [[-loss, *rest] for loss, *rest in heapq.nsmallest(_NUM_WORST, every)]
    return made


def _latents(found: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, float]]:
    def means(name: str) -> list[float]:
        return [math.fsum(of) / count for of in zip(*(s[name] for s in found), strict=True)]

    latents = []
    for mean, squared in zip(means("mean"), means("mean_squared"), strict=True):
        latents.append({"mean": mean, "variance": max(0.0, squared - mean**2)})
    if "kl_per_latent" in found[0]:
        for latent, kl in zip(latents, means("kl_per_latent"), strict=True):
            latent["kl"] = kl
    return latents


def names_of_metrics(fields: Iterable[str]) -> list[str]:
    """The numbers of `summary` that rows of such fields have, and that can be required."""
    fields = set(fields)
    names = [name for name in _LOSSES if name in fields]
    if "elbo" not in fields and {"reconstruction_loss", "kl"} <= fields:
        names.append("elbo")
    return names + ["active_units"] * ("mean" in fields)


def read(directory: str, files: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The contents of an export's statistics.json: "summary" and "shards".

    Args:
      directory: the export's.
      files: entries of its files.

    Raises:
      StageError: it is missing or damaged, or the export is of a version that wrote none.
    """
    for entry in files:
        if entry["name"] == FILE:
            return json.loads(manifest_lib.read_file(directory, entry))
    raise StageError(
        f"{directory}: has no {FILE}, so an earlier version of this program made it; make it again "
        "with --overwrite"
    )
