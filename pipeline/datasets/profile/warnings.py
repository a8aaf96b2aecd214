"""Where a set looks wrong: what a person would want to know before training on it."""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.datasets.profile.statistics import Statistics
from pipeline.sources.splits import in_order

_MAX_SHOWN = 3
# Mean images of two splits that vary against each other this much are negatives.
_INVERTED_CORRELATION = -0.5


@dataclasses.dataclass
class Between:
    """Images that stand in both of two splits."""

    count: int = 0  # Distinct images.
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # Pairs of ids.


class Duplicates:
    """What duplicates.jsonl says, in numbers."""

    def __init__(self):
        self.within: collections.Counter[str] = collections.Counter()  # Beyond the first of each.
        self.between: dict[tuple[str, str], Between] = collections.defaultdict(Between)
        self.entry: dict[str, Any] = {}  # The file's.

    def add(self, ids: Mapping[str, Sequence[str]]) -> None:
        """Counts in a group of equal images.

        Args:
          ids: split -> ids of those of them that it holds.
        """
        for split, found in ids.items():
            self.within[split] += len(found) - 1
        for a, b in itertools.combinations(in_order(ids), 2):
            between = self.between[a, b]
            between.count += 1
            if len(between.examples) < _MAX_SHOWN:
                between.examples.append((ids[a][0], ids[b][0]))


def find(
    statistics: Mapping[str, Statistics], duplicates: Duplicates, class_names: Sequence[str]
) -> list[str]:
    """Everything that looks wrong, a sentence each.

    Args:
      statistics: of each split.
      duplicates: of all of them.
      class_names: name of label i at place i.
    """
    warnings = []
    for split, part in statistics.items():
        if not part.num_examples:
            warnings.append(f"{split} has no images")
        missing = [name for label, name in enumerate(class_names) if not part.label_counts[label]]
        if missing and part.num_examples:
            warnings.append(f"{split} has no image of class {_shown(missing)}")
        outside = sorted(x for x in part.label_counts if not 0 <= x < len(class_names))
        if outside:
            count = sum(part.label_counts[label] for label in outside)
            warnings.append(
                f"{split} has {_images(count)} with a label outside the class list: "
                f"{_shown(outside)}"
            )
        if part.num_blank:
            warnings.append(
                f"{split} has {_images(part.num_blank)} of one value everywhere, with nothing on "
                "them"
            )
    for (a, b), found in sorted(duplicates.between.items()):
        pairs = ", ".join(f"{x} = {y}" for x, y in found.examples)
        more = ", …" if found.count > len(found.examples) else ""
        stand = "stands" if found.count == 1 else "stand"
        warnings.append(
            f"{_images(found.count)} {stand} both in {a} and in {b}: {pairs}{more}; all of them "
            "are in duplicates.jsonl"
        )
    for a, b in itertools.combinations(statistics, 2):
        if _inverted(statistics[a], statistics[b]):
            means = [statistics[split].mean_image().mean() for split in (a, b)]
            warnings.append(
                f"{a} and {b} look like negatives of each other: their mean values are "
                f"{means[0]:.0f} and {means[1]:.0f}"
            )
    return warnings


def _inverted(a: Statistics, b: Statistics) -> bool:
    """Whether one split's images are light on dark and the other's dark on light."""
    if not a.num_examples or not b.num_examples:
        return False
    x, y = a.mean_image().astype(np.float64).ravel(), b.mean_image().astype(np.float64).ravel()
    if x.std() == 0 or y.std() == 0:
        return False
    nearer_to_negative = abs(x.mean() + y.mean() - 255) < abs(x.mean() - y.mean())
    return nearer_to_negative and np.corrcoef(x, y)[0, 1] < _INVERTED_CORRELATION


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _shown(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[: 2 * _MAX_SHOWN]))
    more = len(values) - 2 * _MAX_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
