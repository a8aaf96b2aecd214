"""Notes about files of a folder that may have another meaning than the one they are read with."""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence

from pipeline.sources.readers.folder_tree.places import Place, directory_of, printable, shown

# Names, without digits and signs, of directories that hold images and what belongs to each image.
_PARTS = {
    *("annotation", "annotations", "depth", "edges", "groundtruth", "gt", "hr"),
    *("image", "images", "img", "imgs", "input", "inputs", "jpegimages"),
    *("label", "labels", "lr", "mask", "masks", "original", "originals"),
    *(
        "photo",
        "photos",
        "picture",
        "pictures",
        "segmentation",
        "segmentationclass",
        "segmentationobject",
    ),
    *("segmentations", "target", "targets"),
}


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
    return notes + _of_parts(places)


def _of_parts(places: Mapping[str, Place]) -> list[str]:
    """A warning if all classes are named like the parts of one set, as images and masks are."""
    names = {place.class_name for place in places.values()} - {""}
    parts = {re.sub("[^a-z]", "", name.casefold()) for name in names}
    if len(names) < 2 or not parts <= _PARTS:
        return []
    return [
        f"warning: {shown(names, '/')} are read as classes, and are named like the parts of one "
        "set; if they are no classes, name the directory to read, or --labels=none"
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
