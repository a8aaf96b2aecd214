"""Classes of a folder: how deep they lie, and what they are called."""

import collections
import unicodedata

from pipeline.cli.errors import UsageError
from pipeline.sources.readers.folder_tree.places import (
    NO_SPLIT,
    File,
    Place,
    printable,
    shown,
)
from pipeline.sources.splits import UNSPLIT, in_order, split_beside_train

_NO_CLASS = "lies in no class directory, expected <class>/FILE or <split>/<class>/FILE"
# Levels of class directories that a message shows.
_MAX_SHOWN = 3


def with_classes(
    files: list[File], class_level: int | None, where: str, notes: list[str]
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
            f"{' below its split' if has_splits else ''}, such as {printable(files[0].path)}; "
            "expected class "
            f"directories: {f'--class_level={depth}' if depth else 'remove the flag'}"
        )
    # A split without class directories has no labels. In other splits a file without is a fault.
    labelled = {file.top for file in files if file.below}
    places = []
    for file in files:
        name, fault = "/".join(file.below[:level]), ""
        if not file.top and has_splits:
            fault = _NO_CLASS if labelled else NO_SPLIT
        elif len(file.below) < level and file.top in labelled:
            name, fault = "", _NO_CLASS
            if level > 1:
                fault = f"lies in {len(file.below)} of {level} class directories"
        places.append(Place(file.split, file.path, name, fault))
    places = _with_normal_names(places, notes)
    _note_labels(places, notes)
    names = {place.class_name for place in places} - {""}
    a_split = [name for name in names if split_beside_train(name) != UNSPLIT]
    if a_split and len(names) > 1 and not has_splits and class_level is None:
        is_read = "are read as classes" if len(a_split) > 1 else "is read as a class"
        notes.append(f"{shown(a_split, '/')} {is_read}; move away what is none")
    return places


def _one_level(files: list[File], where: str, notes: list[str]) -> int:
    """1 if directories below the classes say nothing; else raises a UsageError."""
    below = [file.below for file in files if file.below]
    deepest = max(files, key=lambda file: len(file.below))
    tails = {(file.top, file.below[1:]) for file in files if file.below}
    is_one_a_split = len(tails) == len({top for top, _ in tails})
    if len({d[0] for d in below}) > 1 and is_one_a_split or all(d[1:] == d[:1] for d in below):
        notes.append(
            "the class is the first directory: each holds a single directory, such as "
            f"{printable('/'.join(deepest.below))}/"
        )
        return 1
    readings = []
    for level in range(1, min(len(deepest.below), _MAX_SHOWN) + 1):
        names = {"/".join(d[:level]) for d in below if len(d) >= level}
        readings.append(f"--class_level={level} for {shown(names)} ({len(names):,} in all)")
    raise UsageError(
        f"{where}: images lie in up to {len(deepest.below)} directories, such as "
        f"{printable(deepest.path)}; expected the class alone: {'; '.join(readings)}; "
        "or --labels=none for no classes"
    )


def _with_normal_names(places: list[Place], notes: list[str]) -> list[Place]:
    """Gives class names that are the same text in two encodings one name."""
    spellings = collections.defaultdict(set)
    for name in {place.class_name for place in places} - {""}:
        spellings[unicodedata.normalize("NFC", name)].add(name)
    new = {old: name for name, olds in spellings.items() if len(olds) > 1 for old in olds}
    if new:
        names = shown(set(new.values()))
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
        notes.append(f"warning: class names differ only by case: {shown(alike)}")
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
        notes.append(f"{shown(names, '/')} is read as a class; --labels=none if it is none")
    train = classes.pop("train", set())
    for split in in_order(classes):
        if train and not train & classes[split]:
            notes.append(
                f"warning: no class of {split} is in train: {shown(classes[split])}; train has "
                f"{shown(train)}"
            )
