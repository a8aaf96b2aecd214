"""The layout of a folder of images: which directory is a split, and which names a class.

Nothing here opens a file. The layout follows from the paths alone. All files of a directory have
the same place in it, so one path stands for them.
"""

import collections
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.cli.errors import UsageError
from pipeline.sources.options import SourceOptions
from pipeline.sources.splits import (
    UNSPLIT,
    in_order,
    split_beside_train,
    split_named,
    splits_of_directories,
)

_NO_CLASS = "lies in no class directory, expected <class>/FILE or <split>/<class>/FILE"
_NO_SPLIT = "lies in no split directory, expected <split>/FILE"
# Names that a message shows, and levels of class directories.
_MAX_SHOWN = 3

Directories = tuple[str, ...]


class Place(NamedTuple):
    """What the files of a directory are."""

    split: str
    path: str  # Of the first file.
    class_name: str  # "" without a label.
    fault: str = ""  # Why the files go to quarantine.


class Layout(NamedTuple):
    """All directories of a folder."""

    places: dict[str, Place]  # Path of a directory, as of `directory_of`.
    class_names: list[str]  # In the order of the labels; no class without a file.
    notes: list[str]  # What was decided, a line each.
    choices: bytes  # For the fingerprint: what earlier versions decided otherwise.


class _File(NamedTuple):
    path: str
    top: str  # The directory of the split; "" for a file beside these, or if there are none.
    split: str
    below: Directories  # Directories below the split.


def directory_of(path: str) -> str:
    """The path of a file's directory; "" if the file lies in none."""
    return path.rpartition("/")[0]


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
    parts, skipped = _below_single_directories(parts, options.class_level or 1)
    notes = [f"reads {skipped}/, the only directory"] if skipped else []
    files = _with_splits(list(zip(paths, parts, strict=True)), options, where, notes)
    has_splits = any(file.top for file in files)
    if options.labels == "none":
        places = [
            Place(f.split, f.path, "", _NO_SPLIT if has_splits and not f.top else "") for f in files
        ]
    else:
        if has_splits:
            files = _without_passed_over(files, options.class_level, notes)
        places = _with_classes(files, options.class_level, where, notes)
    classes = sorted({place.class_name for place in places} - {""})
    choices = b"below " + os.fsencode(skipped) if skipped else b""
    if all(re.fullmatch("[0-9]+(/[0-9]+)*", name) for name in classes):
        # Class "10" is number 10 and not number 2.
        by_number = sorted(classes, key=lambda name: tuple(map(int, name.split("/"))))
        choices += b" classes by number" if by_number != classes else b""
        classes = by_number
    places_by_directory = {directory_of(place.path): place for place in places}
    return Layout(places_by_directory, classes, notes, choices + _difference(places))


def _below_single_directories(parts: list[list[str]], level: int) -> tuple[list[list[str]], str]:
    """Paths without the directories that hold all others, as an archive leaves them.

    Args:
      parts: directories and file name of each path.
      level: directories that each path keeps at least.

    Returns:
      The paths below those directories.
      The directories that are left out, with slashes; "" if there are none.
    """
    skipped = []
    while all(len(part) > level + 1 for part in parts) and len({part[0] for part in parts}) == 1:
        top = parts[0][0]
        below = set(splits_of_directories({part[1] for part in parts}).values())
        # "test images/train/…" beside "test images/test/…" is an archive, and no split.
        if split_named(top) != UNSPLIT and not below - {split_named(top)}:
            break
        skipped.append(top)
        parts = [part[1:] for part in parts]
    return parts, "/".join(skipped)


def _with_splits(
    files: list[tuple[str, list[str]]], options: SourceOptions, where: str, notes: list[str]
) -> list[_File]:
    """The split of each (path, its parts); adds to `notes` what was decided."""
    tops = {part[0] for _, part in files if len(part) > 1}
    splits = splits_of_directories(tops)
    deep = {part[0] for _, part in files if len(part) > 2}
    if splits and options.class_level and not deep:
        splits = {}  # Class directories were asked for, and no others exist.
    if splits:
        _check_one_directory_a_split(splits, deep, where, notes)
        default = in_order(splits.values())[0]
        return [
            _File(path, part[0], splits[part[0]], tuple(part[1:-1]))
            if len(part) > 1
            else _File(path, "", default, ())
            for path, part in files
        ]
    _check_mixture(tops, deep, options, where)
    if all(len(part) > 2 for _, part in files) and options.class_level in (None, 1):
        splits = splits_of_directories({part[1] for _, part in files})
    if not splits:
        return [_File(path, "", UNSPLIT, tuple(part[:-1])) for path, part in files]
    if options.class_level is None and options.labels != "none":
        _check_same_splits({(part[0], splits[part[1]]) for _, part in files}, where)
    notes.append(f"reads <class>/<split>/FILE: the classes hold {_shown(splits, '/')}")
    return [_File(path, part[1], splits[part[1]], (part[0], *part[2:-1])) for path, part in files]


def _check_same_splits(pairs: set[tuple[str, str]], where: str) -> None:
    """Refuses (class, split) that are not all pairs of a class and a split."""
    splits = {split for _, split in pairs}
    held = collections.defaultdict(list)
    for top, split in sorted(pairs):
        held[top].append(split)
    less = next((top for top in held if len(held[top]) < len(splits)), None)
    if less is not None:
        raise UsageError(
            f"{where}: the splits differ between classes: {less}/ holds {_shown(held[less])} of "
            f"{_shown(splits)}; expected the same splits in each class: move files to "
            "<split>/<class>/FILE, or --class_level=1 reads these splits as they are"
        )


def _check_one_directory_a_split(
    splits: dict[str, str], deep: set[str], where: str, notes: list[str]
) -> None:
    """Notes the directories that are one split; refuses them if any has no class directory."""
    for split in in_order(set(splits.values())):
        tops = sorted(top for top in splits if splits[top] == split)
        if len(tops) > 1:
            if not deep.issuperset(tops):
                raise UsageError(
                    f"{where}: {_shown(tops, '/')} look like the same split, {split}, and have no "
                    "class directories; expected one directory for each split: rename one of them"
                    ", or --class_level=1 if all are classes"
                )
            notes.append(f"{_shown(tops, '/')} are read as one split, {split}")


def _check_mixture(tops: set[str], deep: set[str], options: SourceOptions, where: str) -> None:
    """Refuses splits beside classes. A single one without directories is a class, such as train."""
    named = {top: split_named(top) for top in sorted(tops)}
    splits = {split for split in named.values() if split != UNSPLIT}
    looks_split = [top for top in named if named[top] in ("train", "test") and top in deep]
    if options.class_level or not (looks_split or len(splits) > 1):
        return
    a_split = (looks_split or [top for top in named if named[top] != UNSPLIT])[0]
    others = [top for top in named if named[top] == UNSPLIT]
    other = next((top for top in others if split_beside_train(top) == UNSPLIT), others[0])
    raise UsageError(
        f"{where}: {a_split}/ looks like a split, {other}/ like a class; expected only splits or "
        f"only classes at the top level: move or rename one of them (train, validation and test "
        "are splits, and extra and unlabelled beside train), or --class_level=1 if all are classes"
    )


def _without_passed_over(
    files: list[_File], class_level: int | None, notes: list[str]
) -> list[_File]:
    """Files without the directories that only repeat a split, or that hold all of its classes.

    These are train/train/<class>/FILE and train/images/<class>/FILE.
    """
    level = class_level or 0
    passed: dict[str, str] = {}  # The directory of a split -> what is passed over, with slashes.
    containers: set[str] = set()  # Names that are no class, as another split shows.
    below = collections.defaultdict(list)  # The directory of a split -> directories of its files.
    for file in files:
        if file.top:
            # The name says that these directories are no classes.
            below[file.top].append(() if file.split == "unlabelled" else file.below)
    splits = {file.top: file.split for file in files}

    def only(top: str) -> str:
        """The only directory in a split's directory, or ""."""
        first = {directories[:1] for directories in below[top]}
        return "".join(first.pop()) if len(first) == 1 else ""

    def is_deep(top: str) -> bool:
        return any(len(directories) > 1 for directories in below[top])

    def pass_over(top: str, name: str) -> None:
        passed[top] = f"{passed.get(top, top)}/{name}"
        below[top] = [directories[1:] for directories in below[top]]

    for top in below:
        while (name := only(top)) and all(len(d) > level for d in below[top]):
            if name.casefold() != top.casefold() and split_beside_train(name) != splits[top]:
                break
            pass_over(top, name)
    while class_level is None and (deep := [top for top in below if is_deep(top)]):
        names = {only(top) for top in deep}
        tails = {d[1:] for top in deep for d in below[top]}
        if len(tails) == 1:  # <class>/images/FILE
            containers |= {tail[0] for tail in tails if len(tail) == 1}
            break
        if len(names) > 1 or "" in names or () in tails:
            break
        containers |= names
        for top in deep:
            pass_over(top, only(top))
    for top in below:
        if class_level is None and not is_deep(top) and only(top) in containers:
            pass_over(top, only(top))
    if passed:
        shown = ", ".join(f"{name}/" for name in sorted(passed.values()))
        notes.append(f"reads {shown}: the only directory in its split")
    rest = {top: iter(directories) for top, directories in below.items()}
    return [file._replace(below=next(rest[file.top])) if file.top else file for file in files]


def _with_classes(
    files: list[_File], class_level: int | None, where: str, notes: list[str]
) -> list[Place]:
    """The places, each with a class, without a label, or with a fault."""
    has_splits = any(file.top for file in files)
    depth = max(len(file.below) for file in files)
    if class_level is None and depth > 1:
        class_level = _one_level(files, where, notes)
    level = class_level or 1
    if class_level and depth < level:
        raise UsageError(
            f"{where}: --class_level={level}: no image lies so deep"
            f"{' below its split' if has_splits else ''}, such as {files[0].path}; expected class "
            f"directories: {f'--class_level={depth}' if depth else 'remove the flag'}"
        )
    # A split without class directories has no labels. In other splits a file without is a fault.
    labelled = {file.top for file in files if file.below}
    places = []
    for file in files:
        name, fault = "/".join(file.below[:level]), ""
        if not file.top and has_splits:
            fault = _NO_CLASS if labelled else _NO_SPLIT
        elif len(file.below) < level and file.top in labelled:
            name, fault = "", _NO_CLASS
            if level > 1:
                fault = f"lies in {len(file.below)} of {level} class directories"
        places.append(Place(file.split, file.path, name, fault))
    places = _with_normal_names(places, notes)
    _note_labels(places, notes)
    return places


def _one_level(files: list[_File], where: str, notes: list[str]) -> int:
    """1 if directories below the classes say nothing; else raises a UsageError."""
    below = [file.below for file in files if file.below]
    deepest = max(files, key=lambda file: len(file.below))
    tails = {(file.top, file.below[1:]) for file in files if file.below}
    is_one_a_split = len(tails) == len({top for top, _ in tails})
    if len({d[0] for d in below}) > 1 and is_one_a_split or all(d[1:] == d[:1] for d in below):
        notes.append(
            "the class is the first directory: each holds a single directory, such as "
            f"{'/'.join(deepest.below)}/"
        )
        return 1
    readings = []
    for level in range(1, min(len(deepest.below), _MAX_SHOWN) + 1):
        names = {"/".join(d[:level]) for d in below if len(d) >= level}
        readings.append(f"--class_level={level} for {_shown(names)} ({len(names):,} in all)")
    raise UsageError(
        f"{where}: images lie in up to {len(deepest.below)} directories, such as {deepest.path}; "
        f"expected the class alone: {'; '.join(readings)}; or --labels=none for no classes"
    )


def _with_normal_names(places: list[Place], notes: list[str]) -> list[Place]:
    """Gives class names that are the same text in two encodings one name."""
    spellings = collections.defaultdict(set)
    for name in {place.class_name for place in places} - {""}:
        spellings[unicodedata.normalize("NFC", name)].add(name)
    new = {old: name for name, olds in spellings.items() if len(olds) > 1 for old in olds}
    if new:
        names = _shown(set(new.values()))
        notes.append(f"class names that Unicode encodes in two ways are one class: {names}")
        places = [
            place._replace(class_name=new.get(place.class_name, place.class_name))
            for place in places
        ]
    cases = collections.defaultdict(set)
    for name in spellings:
        cases[name.casefold()].add(name)
    alike = [name for names in cases.values() if len(names) > 1 for name in names]
    if alike:
        notes.append(f"warning: class names differ only by case: {_shown(alike)}")
    return places


def _note_labels(places: list[Place], notes: list[str]) -> None:
    """Notes splits without labels, a single class, and splits without a common class."""
    classes = collections.defaultdict(set)  # Split -> its classes.
    unlabelled = set()
    for place in places:
        if place.class_name:
            classes[place.split].add(place.class_name)
        elif not place.fault:
            unlabelled.add(place.split)
    if not classes:
        return
    for split in in_order(unlabelled):
        notes.append(f"{split} has no class directories: its images have no labels")
    names = set().union(*classes.values())
    if len(names) == 1:
        notes.append(f"{_shown(names, '/')} is read as a class; --labels=none if it is none")
    train = classes.pop("train", set())
    for split in in_order(classes):
        if train and not train & classes[split]:
            notes.append(
                f"warning: no class of {split} is in train: {_shown(classes[split])}; train has "
                f"{_shown(train)}"
            )


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


def _shown(names: Iterable[str], after: str = "") -> str:
    """The first of some names."""
    ordered = sorted(names)
    more = ["…"] if len(ordered) > _MAX_SHOWN else []
    shown = [name.encode(errors="backslashreplace").decode() + after for name in ordered]
    return ", ".join(shown[:_MAX_SHOWN] + more)
