"""Which Parquet files belong to a source, and the split of each."""

import collections
import fnmatch
import os
import re
from typing import NamedTuple

from pipeline.cli.errors import StageError
from pipeline.sources.splits import UNSPLIT, in_order, split_named
from pipeline.storage import files, stamps, trees

ENDINGS = (".parquet", ".parq", ".pq")
_MAGIC = re.compile(r"[*?[]")
_MAX_SHOWN = 3


class Listing(NamedTuple):
    """The files of a source."""

    root: str  # FILE itself, DIR, or the directories of GLOB before its first pattern.
    stamps: dict[str, str]  # Path below the root -> stamp, sorted.
    ignored: dict[str, int]  # Ending -> number of other files.
    notes: list[str]
    form: str = "GLOB"  # Or FILE, or DIR.

    def full(self, path: str) -> str:
        """The full path or URL of a listed file."""
        return self.root if self.form == "FILE" else files.join(self.root, path)


def list_files(place: str) -> Listing:
    """Lists the files of FILE, DIR or GLOB; none if nothing is there."""
    if files.is_dir(place):
        place = place.rstrip("/") or "/"
        tree = trees.read_tree(place)
        found = {p: stamp for p, stamp in tree.stamps.items() if p.lower().endswith(ENDINGS)}
        others = (os.path.splitext(path)[1].lower() for path in tree.stamps.keys() - found.keys())
        links = tree.skipped_links
        shown = ", ".join(links[:_MAX_SHOWN]) + (", …" if len(links) > _MAX_SHOWN else "")
        note = f"{len(links)} links to directories that are already listed are skipped: {shown}"
        notes = [note] if links else []
        return Listing(place, found, dict(collections.Counter(others)), notes, "DIR")
    if stamp := stamps.of_path(place):
        return Listing(place, {place.rpartition("/")[2]: stamp}, {}, [], "FILE")
    parts = place.split("/")
    number = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), None)
    if number is None:
        return Listing(place, {}, {}, [])
    root = "/".join(parts[:number]) or ("/" if number else ".")
    tree = trees.read_tree(root) if files.is_dir(root) else trees.Tree({}, [])
    found = {p: s for p, s in tree.stamps.items() if _matches(p.split("/"), parts[number:])}
    return Listing(root, found, {}, [])


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Whether a path matches a shell's pattern, both split at slashes; ** is any directories."""
    if not patterns:
        return not parts
    first, *rest = patterns
    if first == "**":
        return any(_matches(parts[number:], rest) for number in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], first) and _matches(parts[1:], rest)


def splits_of(listing: Listing, where: str) -> dict[str, str]:
    """Path -> split, in the order of the records.

    Args:
      listing: the files.
      where: the source, for messages.

    Raises:
      StageError: directories that each are a set, or files with and without a split.
    """
    splits: dict[str, str] = {}
    directories: dict[str, dict[str, None]] = {}  # Split -> directories that are no splits.
    for path in listing.stamps:
        *above, name = path.split("/")
        named = (split_named(part) for part in (name, *reversed(above)))
        splits[path] = next((split for split in named if split != UNSPLIT), UNSPLIT)
        own = "/".join(part for part in above if split_named(part) == UNSPLIT)
        directories.setdefault(splits[path], {})[own] = None
    found = set(splits.values())
    if UNSPLIT in found and len(found) > 1:
        with_split = next(path for path, split in splits.items() if split != UNSPLIT)
        without = next(path for path, split in splits.items() if split == UNSPLIT)
        raise StageError(
            f"{where}: {with_split} names a split, and {without} names none; expected train, "
            "validation or test in the name of each file or of its directory: rename or move "
            "files, or name some, as parquet:DIR/train-*.parquet"
        )
    for split, owners in directories.items():
        if len(owners) > 1 and listing.form == "DIR":
            shown = ", ".join(f"{owner or '.'}/" for owner in list(owners)[:5])
            raise StageError(
                f"{where}: {shown} all hold {'files' if split == UNSPLIT else split}; expected one "
                f"set: name its directory, as parquet:{listing.full(next(filter(None, owners)))}, "
                f"or all files of one set with parquet:{listing.full('**/*.parquet')}"
            )
    order = {split: number for number, split in enumerate(in_order(found))}
    return dict(sorted(splits.items(), key=lambda item: (order[item[1]], item[0])))


def refuse_labels_in_names(listing: Listing, where: str) -> None:
    """Refuses directories that hold the values of a column, such as label=3/, which are not read.

    Args:
      listing: the files.
      where: the source, for messages.

    Raises:
      StageError: there is such a directory.
    """
    for path in listing.stamps:
        for part in path.split("/")[:-1]:
            if "=" in part and split_named(part) == UNSPLIT:
                raise StageError(
                    f"{where}: the directory {part}/ names a column, and no column of the files "
                    "holds labels; expected labels in a column: write one file with "
                    "pandas.read_parquet(DIR).to_parquet(FILE), or ignore labels with --labels=none"
                )
