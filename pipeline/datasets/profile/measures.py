"""The metrics of a data set that --require can bound."""

import itertools
from collections.abc import Mapping
from typing import Any

from pipeline.datasets.profile.warnings import Duplicates

# Pairs of splits that should share no image.
_PAIRS = tuple(itertools.combinations(("train", "validation", "test"), 2))
NAMES = (
    *("written", "quarantined", "quarantined_share", "min_class_share", "max_class_share"),
    *("unlabelled", "outside_classes", "blank", "duplicates", "relabelled"),
    *(f"{second}_in_{first}" for first, second in _PAIRS),
)


def measures(
    splits: Mapping[str, Mapping[str, Any]], duplicates: Duplicates, records: Mapping[str, int]
) -> dict[str, float]:
    """The metrics of NAMES, as docs/preprocess.md defines them.

    Args:
      splits: split -> its `Statistics.summary`.
      duplicates: of all splits.
      records: the account of the whole set.

    Returns:
      Name -> value; without class shares if no split has both a class list and labels.
    """
    count = max(1, sum(part["num_examples"] for part in splits.values()))
    unlabelled = {split: part.get("num_unlabelled", 0) for split, part in splits.items()}
    shares = [
        num_records / num_labelled
        for split, part in splits.items()
        if (num_labelled := part["num_examples"] - unlabelled[split])
        for num_records in part["num_per_class"].values()
    ]
    shared = {pair: images.count for pair, images in duplicates.shared.items()}
    return {
        "written": records["written"],
        "quarantined": records["quarantined"],
        "quarantined_share": records["quarantined"] / max(1, records["read"]),
        **({"min_class_share": min(shares), "max_class_share": max(shares)} if shares else {}),
        "unlabelled": sum(unlabelled.values()) / count,
        "outside_classes": sum(
            sum(part["num_outside_classes"].values()) for part in splits.values()
        ),
        "blank": sum(part["num_blank"] for part in splits.values()) / count,
        "duplicates": sum(duplicates.repeated.values()) / count,
        "relabelled": duplicates.relabelled.count,
        **{f"{second}_in_{first}": shared.get((first, second), 0) for first, second in _PAIRS},
    }
