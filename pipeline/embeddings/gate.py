"""--require: bounds on numbers that an export has to keep before it is published."""

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
# Numbers of the model's manifest are asked for as model.SPLIT.NAME.
_OF_MODEL = "model."


class Requirement(NamedTuple):
    """One bound."""

    name: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.bound:g}"


def parse(text: str | None) -> list[Requirement]:
    """The bounds that a flag names, such as `elbo>-110,active_units>=8`.

    Raises:
      UsageError: something else stands there.
    """
    found = []
    for part in (text or "").split(",") if text else ():
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
        found.append(Requirement(match[1], match[2], bound))
    return found


def of_model(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """A model's metrics by the names that a requirement has for them."""
    return {
        f"{_OF_MODEL}{split}.{name}": value
        for split, of_split in metrics.items()
        for name, value in of_split.items()
        if isinstance(value, int | float)
    }


def check_names(required: Sequence[Requirement], names: Sequence[str]) -> None:
    """Raises a UsageError for a requirement of a number that there will not be."""
    for requirement in required:
        if requirement.name not in names:
            raise UsageError(
                f"--require={requirement}: no number {requirement.name!r} here; expected one of "
                f"{', '.join(names)} (those of rows need their --fields)"
            )


def check(
    required: Sequence[Requirement], metrics: Mapping[str, float], *, of_model: bool = False
) -> None:
    """Raises a StageError for a bound that is not kept; a number that there is not keeps none.

    Args:
      required: the bounds.
      metrics: name -> value.
      of_model: whether the bounds on the model's numbers are meant, or all the others.
    """
    asked = [r for r in required if r.name.startswith(_OF_MODEL) == of_model]
    failed = [f"{r} ({_found(r, metrics)})" for r in asked if not _is_kept(r, metrics)]
    if failed:
        raise StageError(
            f"--require: {', '.join(failed)} does not hold, so nothing is published and what was "
            "there stays; look at the model and the data, or change the bound and run the same "
            "command again, which computes nothing twice"
        )


def _is_kept(requirement: Requirement, metrics: Mapping[str, float]) -> bool:
    value = metrics.get(requirement.name)
    return value is not None and _OPERATORS[requirement.operator](value, requirement.bound)


def _found(requirement: Requirement, metrics: Mapping[str, float]) -> str:
    value = metrics.get(requirement.name)
    return "there is none, without rows" if value is None else f"it is {value:,.6g}"
