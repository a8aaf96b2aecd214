"""Compares the distributions of two exports: --reference."""

from collections.abc import Mapping
from typing import Any

from pipeline.embeddings import rows
from pipeline.stages import drift

# Rows of each export in the samples that are compared.
MAX_ROWS = 10_000


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
            comparison = moments | drift.kolmogorov_smirnov(*columns)
            result["latents"].append(comparison)
            tests.append((f"latent {i}", comparison))
    name = "reconstruction_loss"
    if name in current_totals and name in reference_totals:
        variance = f"{name}_variance"
        result[name] = {
            "mean": [reference_totals[name], current_totals[name]],
            "variance": [reference_totals[variance], current_totals[variance]],
        } | drift.kolmogorov_smirnov(reference_rows.columns[name], current_rows.columns[name])
        tests.append((name, result[name]))
    warnings = [drift.warning(n, test) for n, test in tests if drift.has_drifted(test, len(tests))]
    return result | {"warnings": warnings}


def observe(comparison: Mapping[str, Any]) -> None:
    """Sets the metrics of a comparison; none of {}."""
    if comparison:
        losses = [comparison[key] for key in ("reconstruction_loss",) if key in comparison]
        tests = {"latents": comparison.get("latents", ()), "reconstruction_loss": losses}
        drift.observe(tests, comparison["warnings"])
