"""Warnings about suspicious contents of a data set, to read before training on it."""

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.datasets.profile.statistics import Statistics
from pipeline.formats.tf_example import UNLABELLED
from pipeline.sources.splits import in_order

_MAX_SHOWN = 3
# Two splits may be negatives of each other if their mean images have a lower correlation, if one
# is dark and the other light (the mean's distance from 127.5), and if chance does not make the mean
# images (the number of images).
_INVERTED_CORRELATION = -0.5
_INVERTED_DISTANCE = 32
_INVERTED_IMAGES = 20


@dataclasses.dataclass
class SharedImages:
    """Images that two splits share."""

    count: int = 0  # Distinct images.
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # Pairs of ids.


class Duplicates:
    """Counts of the images in duplicates.jsonl."""

    def __init__(self):
        self.repeated: collections.Counter[str] = collections.Counter()  # Split -> repetitions.
        self.shared: dict[tuple[str, str], SharedImages] = collections.defaultdict(SharedImages)
        self.relabelled = SharedImages()  # Images with more than one label.
        self.entry: dict[str, Any] = {}  # The manifest entry of duplicates.jsonl.

    def add(self, group: Mapping[str, Any]) -> None:
        """Adds a group of equal images, as a line of duplicates.jsonl holds them."""
        ids: Mapping[str, Sequence[str]] = group["ids"]
        if "labels" in group:
            self.relabelled.count += 1
            if len(self.relabelled.examples) < _MAX_SHOWN:
                first, second = itertools.islice(itertools.chain(*map(ids.get, in_order(ids))), 2)
                self.relabelled.examples.append((first, second))
        for split, split_ids in ids.items():
            self.repeated[split] += len(split_ids) - 1
        for a, b in itertools.combinations(in_order(ids), 2):
            shared = self.shared[a, b]
            shared.count += 1
            if len(shared.examples) < _MAX_SHOWN:
                shared.examples.append((ids[a][0], ids[b][0]))


def find(
    statistics: Mapping[str, Statistics], duplicates: Duplicates, class_names: Sequence[str]
) -> list[str]:
    """The warnings, a sentence each.

    Args:
      statistics: split -> statistics.
      duplicates: duplicate images of all splits.
      class_names: class_names[i] is the name of label i.
    """
    warnings = []
    for split, part in statistics.items():
        if not part.num_examples:
            warnings.append(f"{split} has no images")
        missing = [name for label, name in enumerate(class_names) if not part.label_counts[label]]
        if missing and part.num_examples > part.num_unlabelled:
            warnings.append(f"{split} has no image of class {_shown(missing)}")
        known = {UNLABELLED, *range(len(class_names))}
        outside = sorted(label for label in part.label_counts if label not in known)
        if outside:
            count = sum(part.label_counts[label] for label in outside)
            warnings.append(
                f"{split} has {_images(count)} with a label outside the class list: "
                f"{_shown(outside)}"
            )
        if 0 < part.num_unlabelled < part.num_examples:
            warnings.append(
                f"{split} has {_images(part.num_unlabelled)} without a label among "
                f"{part.num_examples:,}"
            )
        if part.num_blank:
            warnings.append(
                f"{split} has {_images(part.num_blank)} of one value everywhere, with nothing on "
                "them"
            )
    for (a, b), shared in sorted(duplicates.shared.items()):
        pairs = ", ".join(f"{x} = {y}" for x, y in shared.examples)
        more = ", …" if shared.count > len(shared.examples) else ""
        stand = "stands" if shared.count == 1 else "stand"
        warnings.append(
            f"{_images(shared.count)} {stand} both in {a} and in {b}: {pairs}{more}; all of them "
            "are in duplicates.jsonl"
        )
    if relabelled := duplicates.relabelled.count:
        pairs = ", ".join(f"{x} = {y}" for x, y in duplicates.relabelled.examples)
        more = ", …" if relabelled > len(duplicates.relabelled.examples) else ""
        have = "has" if relabelled == 1 else "have"
        warnings.append(
            f"{_images(relabelled)} {have} more than one label: {pairs}{more}; all of them are in "
            "duplicates.jsonl, with their labels"
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
    """Whether one split is light on dark and the other dark on light."""
    if min(a.num_examples, b.num_examples) < _INVERTED_IMAGES:
        return False
    x, y = a.mean_image().astype(np.float64).ravel(), b.mean_image().astype(np.float64).ravel()
    if x.std() == 0 or y.std() == 0:
        return False
    darker, lighter = sorted((x.mean(), y.mean()))
    is_opposite = min(127.5 - darker, lighter - 127.5) >= _INVERTED_DISTANCE
    return bool(is_opposite and np.corrcoef(x, y)[0, 1] < _INVERTED_CORRELATION)


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _shown(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[: 2 * _MAX_SHOWN]))
    more = len(values) - 2 * _MAX_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
