"""Compares the distributions of two exports: --reference."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.embeddings import rows

# Rows of each export in the samples that are compared.
MAX_ROWS = 10_000
# With many rows any difference is significant. So drift is judged by the size of the
# Kolmogorov-Smirnov statistic, the largest distance between two distribution functions.
_LARGE = 0.1
# With few rows the difference also has to be significant: at most this chance of a false alarm
# over all tests.
_CHANCE = 0.001


def compare(
    *,
    current: tuple[Mapping[str, Any], rows.Rows],
    reference: tuple[Mapping[str, Any], rows.Rows],
    same_model: bool,
) -> dict[str, Any]:
    """Compares the rows of two exports.

    Args:
      current: summary of the new export, and a sample of its rows.
      reference: the same of the reference.
      same_model: whether one model made both. Latents of two models are not comparable and
        are left out.

    Returns:
      JSON values: "latents" (a list) and "reconstruction_loss" with {"mean", "variance":
      [reference, current], "statistic": Kolmogorov-Smirnov, "p_value"}; a quantity that one of
      the exports lacks is left out. "warnings": a sentence for each quantity that has drifted.
    """
    result: dict[str, Any] = {"same_model": same_model}
    tests: list[tuple[str, dict[str, Any]]] = []
    (current_totals, current_rows), (reference_totals, reference_rows) = current, reference
    if not current_totals["num_rows"] or not reference_totals["num_rows"]:
        return result | {"warnings": ["one of the two exports has no rows to compare"]}
    if same_model and "latents" in current_totals and "latents" in reference_totals:
        result["latents"] = []
        latents = zip(reference_totals["latents"], current_totals["latents"], strict=True)
        for i, (before, after) in enumerate(latents):
            columns = reference_rows.columns["mean"][:, i], current_rows.columns["mean"][:, i]
            moments = {key: [before[key], after[key]] for key in ("mean", "variance")}
            comparison = moments | _test(*columns)
            result["latents"].append(comparison)
            tests.append((f"latent {i}", comparison))
    name = "reconstruction_loss"
    if name in current_totals and name in reference_totals:
        variance = f"{name}_variance"
        result[name] = {
            "mean": [reference_totals[name], current_totals[name]],
            "variance": [reference_totals[variance], current_totals[variance]],
        } | _test(reference_rows.columns[name], current_rows.columns[name])
        tests.append((name, result[name]))
    return result | {"warnings": _warnings(tests)}


def _test(reference: np.ndarray, current: np.ndarray) -> dict[str, float]:
    from scipy import stats

    result = stats.ks_2samp(reference, current, method="asymp")
    return {"statistic": float(result.statistic), "p_value": float(result.pvalue)}


def _warnings(tests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    return [
        f"{name} has drifted: mean {test['mean'][0]:.4g} in the reference, "
        f"{test['mean'][1]:.4g} here; variance {test['variance'][0]:.4g} and "
        f"{test['variance'][1]:.4g}; Kolmogorov-Smirnov statistic {test['statistic']:.2f}"
        for name, test in tests
        if test["statistic"] > _LARGE and test["p_value"] * len(tests) < _CHANCE
    ]
