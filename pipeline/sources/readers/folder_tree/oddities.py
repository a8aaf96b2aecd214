"""Notes about files of a folder that may have another meaning than the one they are read with."""

import collections
import os
from collections.abc import Iterable, Mapping, Sequence

from pipeline.sources.readers.folder_tree.places import Place, directory_of, printable, shown

# With more directories, or fewer common names, equal file names are a coincidence: files of each
# class are counted from 1.
_MOST_PAIRED, _FEWEST_NAMES = 4, 3


def of_files(paths: Sequence[str], places: Mapping[str, Place]) -> list[str]:
    """Notes about images.

    Args:
      paths: of all images.
      places: path of a directory, as of `directory_of` -> its place.
    """
    notes, beside = [], collections.Counter[str]()
    first: dict[str, str] = {}  # Fault -> the first path.
    for path in paths:
        if fault := places[directory_of(path)].fault:
            beside[fault] += 1
            first.setdefault(fault, path)
    for fault, number in beside.items():
        notes.append(
            f"images that go to quarantine by their directories: {number:,}, such as "
            f"{printable(first[fault])}: {fault}"
        )
    if with_backslash := [path for path in paths if "\\" in path]:
        notes.append(
            f"warning: {len(with_backslash):,} paths hold a backslash, such as "
            f"{printable(with_backslash[0])}, as an archive from Windows leaves them, and their "
            "directories are no splits or classes; in bash, this moves them: for f in *\\\\*; do "
            't=${f//\\\\//}; mkdir -p "${t%/*}"; mv "$f" "$t"; done'
        )
    return notes + _of_pairs(paths, places)


def _of_pairs(paths: Sequence[str], places: Mapping[str, Place]) -> list[str]:
    """A warning if all classes hold the same file names, as images and their masks do."""
    names = {place.class_name for place in places.values()} - {""}
    if not 2 <= len(names) <= _MOST_PAIRED:
        return []
    sizes = collections.Counter(places[directory_of(path)].class_name for path in paths)
    least, most = min(sizes[name] for name in names), max(names, key=sizes.__getitem__)

    def stems(is_of_most: bool) -> Iterable[tuple[str, str]]:
        for path in paths:
            place = places[directory_of(path)]
            if place.class_name and (place.class_name == most) == is_of_most:
                yield place.split, os.path.splitext(path)[0].rpartition("/")[2]

    if least < _FEWEST_NAMES:
        return []
    known = set(stems(True))
    # Of 900 and 1000 numbered files, the first numbers are equal, whatever the files are.
    are_numbered = least < sizes[most]
    if any(s not in known or are_numbered and s[1].isdigit() for s in stems(False)):
        return []
    return [
        f"warning: the classes {shown(names, '/')} hold the same file names, as images and masks "
        "do; if they are no classes, name the directory to read, or --labels=none, or "
        "--class_level for other directories"
    ]


def of_directories(ignored: Iterable[str], places: Mapping[str, Place]) -> list[str]:
    """A note about directories that hold only files that are no images.

    Args:
      ignored: paths of these files.
      places: as in `of_files`.
    """
    with_images = {""}
    for directory in places:
        while directory not in with_images:
            with_images.add(directory)
            directory = directory_of(directory)
    without = set()
    for path in ignored:
        directory = directory_of(path)
        while directory not in with_images:  # The highest one stands for those below.
            if (above := directory_of(directory)) in with_images:
                without.add(directory)
            directory = above
    number = f"{len(without):,} directories hold" if len(without) > 1 else "a directory holds"
    return [f"{number} no image: {shown(without, '/')}"] if without else []
