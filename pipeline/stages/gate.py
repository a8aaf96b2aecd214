"""--require: bounds on metrics of a stage's output; output that breaks a bound is rejected.

Each stage says which metrics it has, and what becomes of rejected output.
"""

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


class Rejected(StageError):
    """A requirement does not hold."""

    def __init__(self, message: str, warnings: Sequence[str] = ()):
        """`warnings` are about the rejected output."""
        super().__init__(message)
        self.warnings = warnings


class Requirement(NamedTuple):
    """A bound on one metric."""

    name: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{self.bound:g}"


def parse(text: str | None) -> list[Requirement]:
    """Parses the value of --require, such as `written>=1000,quarantined<100`.

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
        if match is None or bound is None or bound != bound:
            raise UsageError(
                f"--require={text}: {part!r} is no bound; expected NAME, one of "
                f"{' '.join(_OPERATORS)}, and a number, such as written>=1000,quarantined<100"
            )
        requirements.append(Requirement(match[1], match[2], bound))
    return requirements


def check_names(requirements: Sequence[Requirement], names: Sequence[str], hint: str = "") -> None:
    """Raises a UsageError for a requirement on a metric that the output will not have.

    Args:
      requirements: the bounds.
      names: of the metrics.
      hint: the end of the message.
    """
    for requirement in requirements:
        if requirement.name not in names:
            raise UsageError(
                f"--require={requirement}: no metric {requirement.name!r}; expected one of "
                f"{', '.join(names)}{hint}"
            )


def failures(
    requirements: Sequence[Requirement], metrics: Mapping[str, float], lacking: str
) -> list[str]:
    """The requirements that do not hold, with the actual values.

    Args:
      requirements: the bounds; one on a missing metric does not hold.
      metrics: name -> value.
      lacking: what the output does not have if a metric is missing.
    """
    failed = []
    for requirement in requirements:
        value = metrics.get(requirement.name)
        if value is None:
            failed.append(f"{requirement} (there is none, without {lacking})")
        elif not _OPERATORS[requirement.operator](value, requirement.bound):
            failed.append(f"{requirement} (it is {value:,.6g})")
    return failed


# What to do about a data set that was rejected.
REMEDY = (
    "look at its stats.html; to accept the set as it is, run the command that made it, or an "
    "--append, with --require and bounds that hold; to make another, pass --overwrite"
)


def refuse(directory: str, manifest: Mapping[str, Any]) -> None:
    """Raises Rejected if a data set was rejected."""
    if text := rejection(directory, manifest):
        raise Rejected(
            f"{text}; expected a data set that keeps its bounds: {REMEDY}", warnings(manifest)
        )


def warnings(manifest: Mapping[str, Any]) -> list[str]:
    """The warnings about a data set, and about its drift."""
    return [*manifest["warnings"], *manifest.get("drift", {}).get("warnings", ())]


def rejection(directory: str, manifest: Mapping[str, Any]) -> str:
    """What a message says of rejected output; "" if it was not rejected."""
    reasons = manifest.get("rejected")
    return f"{directory}: was rejected by --require ({', '.join(reasons)})" if reasons else ""
