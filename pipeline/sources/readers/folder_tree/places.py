"""What the directories of a folder are. All files of a directory have the same place."""

import re
from collections.abc import Iterable
from typing import NamedTuple

# Characters that end a line, move a cursor, or are no text.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# Names that a message shows.
_MAX_SHOWN = 3
# Why a file beside split directories goes to quarantine.
NO_SPLIT = "lies in no split directory, expected <split>/FILE"


class Place(NamedTuple):
    """What the files of a directory are."""

    split: str
    path: str  # Of the first file.
    class_name: str  # "" without a label.
    fault: str = ""  # Why the files go to quarantine.


class File(NamedTuple):
    """The first file of a directory."""

    path: str
    top: str  # The directory of the split; "" for a file beside these, or if there are none.
    split: str
    below: tuple[str, ...]  # Directories below the split.


def directory_of(path: str) -> str:
    """The path of a file's directory; "" if the file lies in none."""
    return path.rpartition("/")[0]


def printable(text: str) -> str:
    """A path or a name as a message shows it, on one line."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(names: Iterable[str], after: str = "") -> str:
    """The first of some names."""
    ordered = sorted(names)
    more = ["…"] if len(ordered) > _MAX_SHOWN else []
    texts = [printable(name) + after for name in ordered]
    return ", ".join(texts[:_MAX_SHOWN] + more)
