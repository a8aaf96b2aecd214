"""--require: bounds on metrics that must hold before an export is published."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.cli.errors import StageError, UsageError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"\s*([\w.]+)\s*(>=|<=|==|>|<)\s*(\S+)\s*")
# Metrics in the model's manifest are named model.SPLIT.NAME.
_MODEL_PREFIX = "model."


class Rejected(StageError):
    """A requirement does not hold: readers of --latest do not get this export."""

    reasons: list[str]  # The bounds that do not hold, with the values.


class Requirement(NamedTuple):
    """A bound on one metric."""

    name: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.bound:g}"


def parse(text: str | None) -> list[Requirement]:
    """Parses the value of --require, such as `elbo>-110,active_units>=8`.

    Raises:
      UsageError: the text is malformed.
    """
    if not text:
        return []
    requirements = []
    for part in text.split(","):
        match = _FORM.fullmatch(part)
        try:
            bound = float(match[3]) if match else None
        except ValueError:
            bound = None
        if bound is None or bound != bound:
            raise UsageError(
                f"--require={text}: {part!r} is no bound; expected NAME, one of "
                f"{' '.join(_OPERATORS)}, and a number, such as elbo>-110,active_units>=8"
            )
        requirements.append(Requirement(match[1], match[2], bound))
    return requirements


def model_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """A model's metrics, split -> name -> value, by their names in requirements."""
    return {
        f"{_MODEL_PREFIX}{split}.{name}": value
        for split, split_metrics in metrics.items()
        for name, value in split_metrics.items()
        if isinstance(value, int | float)
    }


def check_names(requirements: Sequence[Requirement], names: Sequence[str]) -> None:
    """Raises a UsageError for a requirement on a metric that this export will not have."""
    for requirement in requirements:
        if requirement.name not in names:
            raise UsageError(
                f"--require={requirement}: no metric {requirement.name!r} in this export; expected "
                f"one of {', '.join(names)} (metrics of rows need the fields they are made of, see "
                "--fields)"
            )


def check(
    requirements: Sequence[Requirement], metrics: Mapping[str, float], *, on_model: bool = False
) -> None:
    """Raises Rejected unless the requirements hold; one on a missing metric does not hold.

    Args:
      requirements: the bounds.
      metrics: name -> value.
      on_model: whether to check the requirements on the model's metrics, or all the others.
    """
    checked = [r for r in requirements if r.name.startswith(_MODEL_PREFIX) == on_model]
    failed = [f"{r} ({_actual(r, metrics)})" for r in checked if not _holds(r, metrics)]
    if failed:
        error = Rejected(
            f"--require: {', '.join(failed)} does not hold, so the export is rejected, and "
            "--latest stays where it is; look at the model and the data"
        )
        error.reasons = failed
        raise error


def _holds(requirement: Requirement, metrics: Mapping[str, float]) -> bool:
    value = metrics.get(requirement.name)
    return value is not None and _OPERATORS[requirement.operator](value, requirement.bound)


def _actual(requirement: Requirement, metrics: Mapping[str, float]) -> str:
    value = metrics.get(requirement.name)
    return "there is none, without rows" if value is None else f"it is {value:,.6g}"
