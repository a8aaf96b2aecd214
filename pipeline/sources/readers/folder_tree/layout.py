"""The layout of a folder of images: which directory is a split, and which names a class.

Nothing here opens a file. The layout follows from the paths alone. All files of a directory have
the same place in it, so one path stands for them.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.sources.options import SourceOptions
from pipeline.sources.readers.folder_tree.classes import with_classes
from pipeline.sources.readers.folder_tree.places import (
    NO_SPLIT,
    Place,
    directory_of,
    printable,
)
from pipeline.sources.readers.folder_tree.splits import (
    below_single_directories,
    with_splits,
    without_passed_over,
)
from pipeline.sources.splits import UNSPLIT, in_order, split_named


class Layout(NamedTuple):
    """All directories of a folder."""

    places: dict[str, Place]  # Path of a directory, as of `directory_of`.
    class_names: list[str]  # In the order of the labels; no class without a file.
    notes: list[str]  # What was decided, a line each.
    choices: bytes  # For the fingerprint: what earlier versions decided otherwise.


def find_layout(paths: Iterable[str], options: SourceOptions, where: str) -> Layout:
    """Finds splits and classes.

    Args:
      paths: of all images, at least one, in order.
      options: `labels` and `class_level` say how to read class directories.
      where: the source, for messages.

    Raises:
      UsageError: the directories have more than one meaning.
    """
    first: dict[str, str] = {}  # Directory -> its first file.
    for path in paths:
        first.setdefault(directory_of(path), path)
    paths = list(first.values())
    parts = [path.split("/") for path in paths]
    parts, skipped = below_single_directories(parts, options.class_level or 1)
    notes = [f"reads {printable(skipped)}/, the only directory"] if skipped else []
    files = with_splits(list(zip(paths, parts, strict=True)), options, where, notes)
    has_splits = any(file.top for file in files)
    if options.labels == "none":
        places = [
            Place(f.split, f.path, "", NO_SPLIT if has_splits and not f.top else "") for f in files
        ]
    else:
        if has_splits:
            files = without_passed_over(files, options.class_level, notes)
        places = with_classes(files, options.class_level, where, notes)
    classes = sorted({place.class_name for place in places} - {""})
    choices = b"below " + os.fsencode(skipped) if skipped else b""
    if all(re.fullmatch("[0-9]+(/[0-9]+)*", name) for name in classes):
        # Class "10" is number 10 and not number 2.
        by_number = sorted(classes, key=lambda name: tuple(map(int, name.split("/"))))
        choices += b" classes by number" if by_number != classes else b""
        classes = by_number
    places_by_directory = {directory_of(place.path): place for place in places}
    return Layout(places_by_directory, classes, notes, choices + _difference(places))


def _difference(places: list[Place]) -> bytes:
    """A digest of the places if an earlier version read the same files otherwise, else b"".

    A set that an earlier version made of the same records so keeps its fingerprint.
    """
    read = [(place.split, place.class_name, bool(place.fault)) for place in places]
    if read == _read_earlier([place.path for place in places]):
        return b""
    digest = hashlib.sha256()
    for split, class_name, is_fault in read:
        digest.update(os.fsencode(f"{split}\0{class_name}\0{is_fault:d}\0"))
    return b" read as " + digest.digest()


def _read_earlier(paths: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Split, class, and whether it is a fault, of each path in earlier versions.

    The first directory below the split was the class, and a file without was a fault.
    """
    parts = [path.split("/") for path in paths]
    while all(len(part) > 2 for part in parts) and len({part[0] for part in parts}) == 1:
        if split_named(parts[0][0]) != UNSPLIT:
            break
        parts = [part[1:] for part in parts]
    splits = {part[0]: split_named(part[0]) for part in parts if len(part) > 1}
    has_splits = UNSPLIT not in splits.values()
    default = in_order(splits.values())[0] if splits and has_splits else UNSPLIT
    read = []
    for part in parts:
        split = splits[part[0]] if has_splits and len(part) > 1 else default
        class_name = "".join(part[1:-1][:1] if has_splits else part[:-1][:1])
        read.append((split, class_name, not class_name))
    return read
