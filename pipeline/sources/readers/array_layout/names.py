"""What the name of an array says: images or labels, and of which split."""

import re
from typing import NamedTuple

from pipeline.sources.splits import UNSPLIT, split_named

# Words in the names of arrays. Those of the second line count only where no array has one of the
# first, which earlier versions knew.
_WORDS = (
    {"images": ("x", "images", "image"), "labels": ("y", "labels", "label")},
    {
        "images": ("imgs", "img", "data", "pixels"),
        "labels": ("targets", "target", "classes"),
    },
)
_ALL_WORDS = "|".join(word for words in _WORDS for group in words.values() for word in group)
_SPLITS = "training|train|validation|valid|val|testing|test"
_WORD = re.compile(r"t10k|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_GLUED = re.compile(f"({_ALL_WORDS})({_SPLITS})|({_SPLITS})({_ALL_WORDS})")


class Name(NamedTuple):
    """What the name of an array says."""

    kind: str  # "images", "labels", or "" if the name says neither.
    split: str
    rest: str  # The other words.
    rank: int  # The line of _WORDS that holds the word for the kind.
    beginning: str  # All before the words for kind and split.


def parse(name: str) -> Name:
    """What a name such as X_train, trainImages or kmnist-test-labels says."""
    words: list[tuple[str, int]] = []
    for match in _WORD.finditer(name):
        word = match[0].lower()
        glued = _GLUED.fullmatch(word)
        words += [
            (part, match.start()) for part in (filter(None, glued.groups()) if glued else [word])
        ]
    kinds = [
        (kind, rank, word)
        for rank, groups in enumerate(_WORDS)
        for kind, group in groups.items()
        for word, _ in words
        if word in group
    ]
    best = [kind for kind in kinds if kind[1] == kinds[0][1]]
    kind, rank, kind_word = best[0] if len({kind for kind, *_ in best}) == 1 else ("", 0, None)
    split_word = next((word for word, _ in words if split_named(word) != UNSPLIT), None)
    rest = [word for word, _ in words]
    for word in {kind_word, split_word} - {None}:
        rest.remove(word)
    ends = [place for word, place in words if word in (kind_word, split_word)]
    beginning = name[: min(ends, default=0)].rstrip("-_. /")
    return Name(kind, split_named(split_word or ""), " ".join(rest), rank, beginning)
