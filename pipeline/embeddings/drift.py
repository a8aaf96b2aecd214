"""How far the rows of an export lie from those of another: --reference."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.embeddings import rows

# Rows of each export that distributions are compared on.
MAX_ROWS = 10_000
# Among many rows any difference is significant, so it is told by its size: the statistic of
# Kolmogorov and Smirnov, the largest distance between two distribution functions.
_LARGE = 0.1
# Among few it also has to be more than chance gives one test of all in a thousand.
_CHANCE = 0.001


def compare(
    *,
    here: tuple[Mapping[str, Any], rows.Rows],
    reference: tuple[Mapping[str, Any], rows.Rows],
    same_model: bool,
) -> dict[str, Any]:
    """Compares the rows of two exports.

    Args:
      here: the summary of one, and a sample of its rows.
      reference: the same of the other.
      same_model: whether one model made both. Latents of two models have nothing to do with
        each other and are left out.

    Returns:
      JSON values: "latents": for each latent, and "reconstruction_loss", {"mean", "variance":
      [of the reference, here], "statistic": of Kolmogorov and Smirnov, "p_value"}; what one of
      the two does not hold is left out. "warnings": a sentence for each that differs much.
    """
    made: dict[str, Any] = {"same_model": same_model}
    tested: list[tuple[str, dict[str, Any]]] = []
    (now, sampled), (then, sampled_then) = here, reference
    if not now["num_rows"] or not then["num_rows"]:
        return made | {"warnings": ["one of the two exports has no rows to compare"]}
    if same_model and "latents" in now and "latents" in then:
        made["latents"] = []
        for i, (a, b) in enumerate(zip(then["latents"], now["latents"], strict=True)):
            columns = sampled_then.columns["mean"][:, i], sampled.columns["mean"][:, i]
            of_latent = {key: [a[key], b[key]] for key in ("mean", "variance")} | _test(*columns)
            made["latents"].append(of_latent)
            tested.append((f"latent {i}", of_latent))
    name = "reconstruction_loss"
    if name in now and name in then:
        made[name] = {
            "mean": [then[name], now[name]],
            "variance": [then[f"{name}_variance"], now[f"{name}_variance"]],
        } | _test(sampled_then.columns[name], sampled.columns[name])
        tested.append((name, made[name]))
    return made | {"warnings": _warnings(tested)}


def _test(reference: np.ndarray, here: np.ndarray) -> dict[str, float]:
    from scipy import stats

    found = stats.ks_2samp(reference, here, method="asymp")
    return {"statistic": float(found.statistic), "p_value": float(found.pvalue)}


def _warnings(tested: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    return [
        f"{name} has drifted: mean {found['mean'][0]:.4g} in the reference, "
        f"{found['mean'][1]:.4g} here; variance {found['variance'][0]:.4g} and "
        f"{found['variance'][1]:.4g}; Kolmogorov-Smirnov statistic {found['statistic']:.2f}"
        for name, found in tested
        if found["statistic"] > _LARGE and found["p_value"] * len(tested) < _CHANCE
    ]
