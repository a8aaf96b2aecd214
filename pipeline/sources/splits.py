"""What splits are called, in which order they stand, and which one a name says."""

import re
from collections.abc import Iterable

# The split name by which a source says that it has none.
UNSPLIT = "unsplit"
# The order of splits wherever they stand in a row.
_SPLITS = (UNSPLIT, "train", "validation", "test")


def in_order(splits: Iterable[str]) -> list[str]:
    """Names of splits in their usual order; any others after them, by name."""
    return sorted(splits, key=lambda s: (_SPLITS.index(s) if s in _SPLITS else len(_SPLITS), s))


# A word in the name of a file or directory -> the split it says.
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
    """The split that a file's or directory's name speaks of, or UNSPLIT if of none."""
    for word in re.findall(r"[a-z]+\d*[a-z]*", name.lower()):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return UNSPLIT
