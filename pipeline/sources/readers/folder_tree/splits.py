"""Splits of a folder: single directories on top, splits above or below classes."""

import collections

from pipeline.cli.errors import UsageError
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers.folder_tree.places import File, printable, shown
from pipeline.sources.splits import (
    UNSPLIT,
    in_order,
    split_beside_train,
    split_named,
    splits_of_directories,
)


def below_single_directories(parts: list[list[str]], level: int) -> tuple[list[list[str]], str]:
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


def with_splits(
    files: list[tuple[str, list[str]]], options: SourceOptions, where: str, notes: list[str]
) -> list[File]:
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
            File(path, part[0], splits[part[0]], tuple(part[1:-1]))
            if len(part) > 1
            else File(path, "", default, ())
            for path, part in files
        ]
    _check_mixture(tops, deep, options, where)
    if all(len(part) > 2 for _, part in files) and options.class_level in (None, 1):
        splits = splits_of_directories({part[1] for _, part in files})
    if not splits:
        return [File(path, "", UNSPLIT, tuple(part[:-1])) for path, part in files]
    if options.class_level is None and options.labels != "none":
        _check_same_splits({(part[0], splits[part[1]]) for _, part in files}, where)
    notes.append(f"reads <class>/<split>/FILE: the classes hold {shown(splits, '/')}")
    return [File(path, part[1], splits[part[1]], (part[0], *part[2:-1])) for path, part in files]


def _check_same_splits(pairs: set[tuple[str, str]], where: str) -> None:
    """Refuses (class, split) that are not all pairs of a class and a split."""
    splits = {split for _, split in pairs}
    held = collections.defaultdict(list)
    for top, split in sorted(pairs):
        held[top].append(split)
    less = next((top for top in held if len(held[top]) < len(splits)), None)
    if less is not None:
        raise UsageError(
            f"{where}: the splits differ between classes: {printable(less)}/ holds "
            f"{shown(held[less])} of {shown(splits)}; expected the same splits in each class: "
            "move files to <split>/<class>/FILE, or --class_level=1 reads these splits as they are"
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
                    f"{where}: {shown(tops, '/')} look like the same split, {split}, and have no "
                    "class directories; expected one directory for each split: rename one of them"
                    ", or --class_level=1 if all are classes"
                )
            notes.append(f"{shown(tops, '/')} are read as one split, {split}")


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
        f"{where}: {printable(a_split)}/ looks like a split, {printable(other)}/ like a class; "
        "expected only splits or only classes at the top level: move or rename one of them (train, "
        "validation and test are splits, and extra and unlabelled beside train), or "
        "--class_level=1 if all are classes"
    )


def without_passed_over(files: list[File], class_level: int | None, notes: list[str]) -> list[File]:
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
        names = ", ".join(f"{printable(name)}/" for name in sorted(passed.values()))
        notes.append(f"reads {names}: the only directory in its split")
    rest = {top: iter(directories) for top, directories in below.items()}
    return [file._replace(below=next(rest[file.top])) if file.top else file for file in files]
