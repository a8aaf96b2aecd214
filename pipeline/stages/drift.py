"""--reference: how far two distributions are apart, and when that is drift."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.cli import metrics_file

# With many records any difference is significant. So drift is judged by the size of the statistic:
# Kolmogorov-Smirnov of numbers and total variation of classes, both the largest difference between
# the two shares of any interval from the smallest value up, or of any set of classes.
_LARGE = 0.1
# With few records the difference also has to be significant: at most this chance of a false alarm
# over all tests.
_CHANCE = 0.001
# Samples below this size have an exact p-value; the asymptotic one of tiny samples may be 0.
_EXACT_BELOW = 2000


def kolmogorov_smirnov(reference: np.ndarray, current: np.ndarray) -> dict[str, float]:
    """Tests whether two samples of numbers (n,) have one distribution.

    Returns:
      "statistic", from 0 to 1, and "p_value".
    """
    from scipy import stats

    is_small = max(len(reference), len(current)) < _EXACT_BELOW
    result = stats.ks_2samp(reference, current, method="exact" if is_small else "asymp")
    return {"statistic": float(result.statistic), "p_value": float(result.pvalue)}


def has_drifted(test: Mapping[str, Any], num_tests: int) -> bool:
    """Whether a test, one of `num_tests`, shows drift."""
    return bool(test["statistic"] > _LARGE and test["p_value"] * num_tests < _CHANCE)


def warning(name: str, test: Mapping[str, Any]) -> str:
    """The warning about a quantity that has drifted.

    Args:
      name: of the quantity.
      test: "mean" and "variance", both [reference, current], and "statistic".
    """
    return (
        f"{name} has drifted: mean {test['mean'][0]:.4g} in the reference, "
        f"{test['mean'][1]:.4g} here; variance {test['variance'][0]:.4g} and "
        f"{test['variance'][1]:.4g}; Kolmogorov-Smirnov statistic {test['statistic']:.2f}"
    )


def observe(tests: Mapping[str, Iterable[Mapping[str, Any]]], warnings: Sequence[str]) -> None:
    """Sets the metrics of a comparison.

    Args:
      tests: quantity -> its tests.
      warnings: of the comparison.
    """
    for quantity, quantity_tests in tests.items():
        statistics = [test["statistic"] for test in quantity_tests]
        if statistics:
            metrics_file.observe("vae_drift_statistic", max(statistics), quantity=quantity)
    metrics_file.observe("vae_drift_warnings", len(warnings))
