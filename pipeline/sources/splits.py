"""Names of splits: their order, and the split that a file or a directory name states."""

import re
from collections.abc import Collection, Iterable

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


# Words in the names of directories. Each word is also a likely class, so the word states a split
# only beside a directory of train.
_WORDS_BESIDE_TRAIN = {
    "trn": "train",
    "dev": "validation",
    "tst": "test",
    "extra": "extra",
    "pred": "pred",
    "unlabeled": "unlabelled",
    "unlabelled": "unlabelled",
}


def splits_of_directories(names: Collection[str]) -> dict[str, str]:
    """The split of each of some sibling directories.

    A word of `split_named` counts in any case. Other forms, such as trn, dev, extra, trainset,
    TrainImages and train2017, count only if the directories are two splits or more, one of them
    train.

    Args:
      names: names of all directories below one directory.

    Returns:
      Name -> split; {} if a name states no split, since the directories are then classes.
    """
    splits = {name: split_named(name) for name in names}
    if UNSPLIT not in splits.values():
        return splits
    splits = {name: split_beside_train(name) for name in names}
    stated = set(splits.values())
    return splits if UNSPLIT not in stated and "train" in stated and len(stated) > 1 else {}


def split_beside_train(name: str) -> str:
    """The split that a directory's name states beside a directory of train, or UNSPLIT."""
    if (split := split_named(name)) != UNSPLIT:
        return split
    words = _SPLIT_WORDS | _WORDS_BESIDE_TRAIN
    for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name):
        split = words.get(word.lower()) or words.get(word.lower().removesuffix("set"))
        if split:
            return split
    return UNSPLIT
