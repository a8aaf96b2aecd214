"""Names of splits: their order, and the split that a file name states."""

import re
from collections.abc import Iterable

# The split name of a source without splits.
UNSPLIT = "unsplit"
# The order of splits in every list.
_SPLIT_ORDER = (UNSPLIT, "train", "validation", "test")


def in_order(splits: Iterable[str]) -> list[str]:
    """Names of splits in their usual order, then all other names in alphabetical order."""

    def key(split: str) -> tuple[int, str]:
        is_usual = split in _SPLIT_ORDER
        return _SPLIT_ORDER.index(split) if is_usual else len(_SPLIT_ORDER), split

    return sorted(splits, key=key)


# A word in the name of a file or directory -> its split.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
    "t10k": "test",
}


def split_named(name: str) -> str:
    """The split that the name of a file or directory contains, or UNSPLIT."""
    for word in re.findall(r"[a-z]+\d*[a-z]*", name.lower()):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return UNSPLIT
