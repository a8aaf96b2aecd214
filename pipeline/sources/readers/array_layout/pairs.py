"""Which arrays belong together: images and labels of a split, found by their names."""

import collections
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.readers.array_layout import labels as labels_lib
from pipeline.sources.readers.array_layout import pixels as pixels_lib
from pipeline.sources.readers.array_layout.names import parse
from pipeline.sources.readers.array_layout.stored import StoredArray
from pipeline.sources.source import UNLABELLED
from pipeline.sources.splits import UNSPLIT, in_order
from pipeline.storage import files

# Names of arrays that a note shows.
_MAX_SHOWN = 12


class Pair(NamedTuple):
    """The arrays of a split."""

    images: StoredArray
    labels: StoredArray | None


def find_pairs(
    names: Iterable[str],
    where: str,
    options: SourceOptions,
    *,
    place: str = "",
    default_kind: str = "",
) -> dict[str, dict[str, str]]:
    """Finds images and labels by name.

    Args:
      names: names of arrays; names that say neither images nor labels are passed over.
      where: the source, for messages.
      options: see SourceOptions; labels that are ignored are no reason to refuse.
      place: KIND:DIR of arrays in several files, whose names may hold further words; else "".
      default_kind: what names mean that say neither images nor labels; "" for nothing.

    Returns:
      split -> "images" or "labels" -> name, in the order of splits.

    Raises:
      StageError: two names for the same, labels without images, or a set beside its splits.
    """
    parsed = {name: parse(name) for name in names}
    parsed = {
        name: about._replace(kind=about.kind or default_kind)
        for name, about in parsed.items()
        if place or not about.rest
    }
    ranks = {
        kind: min((about.rank for about in parsed.values() if about.kind == kind), default=0)
        for kind in ("images", "labels")
    }
    names_by_split: dict[str, dict[str, str]] = {}
    for name, about in parsed.items():
        kind = about.kind
        if not kind or about.rank > ranks[kind]:
            continue
        other = names_by_split.setdefault(about.split, {}).setdefault(kind, name)
        if other == name or (kind == "labels" and options.labels == "none"):
            continue
        remedy = "save the set without the other"
        if place:
            first = parsed[other].beginning
            remedy = "name one set by the start of its file names" if first else "move one away"
            remedy += f", such as {place.rstrip('/')}/{first}" if first else ""
        raise StageError(
            f"{where}: {other} and {name} are both {kind} of {about.split}; expected one: {remedy}"
        )
    if options.labels == "none":
        names_by_split = {
            split: kinds for split, kinds in names_by_split.items() if "images" in kinds
        }
    for split, kinds in names_by_split.items():
        rests = {parsed[name].rest for name in kinds.values()}
        if options.labels != "none" and ("images" not in kinds or len(rests) > 1):
            raise StageError(
                f"{where}: {split} has {' and '.join(kinds.values())}; expected images and labels "
                "of each split, such as x_train and y_train, or train_images and train_labels: "
                "rename the arrays"
            )
    used = {split: list(kinds.values()) for split, kinds in names_by_split.items()}
    others = [name for split, kinds in used.items() if split != UNSPLIT for name in kinds]
    remedy = "save one of the two, such as the splits: a = numpy.load(FILE); numpy.savez(NEW, "
    remedy += ", ".join(f"{name}=a[{name!r}]" for name in others) + ")"
    refuse_whole_beside_splits(where, used, "move the files of one away" if place else remedy)
    return {split: names_by_split[split] for split in in_order(names_by_split)}


def refuse_whole_beside_splits(where: str, names: Mapping[str, Sequence[str]], remedy: str) -> None:
    """Refuses arrays of splits beside arrays of no split: these may be the whole set again.

    Args:
      where: the source, for messages.
      names: split -> names of its arrays.
      remedy: end of the message.

    Raises:
      StageError: there are both.
    """
    if UNSPLIT not in names or len(names) == 1:
        return
    whole = names[UNSPLIT][0]
    part = next(split_names[0] for split, split_names in names.items() if split != UNSPLIT)
    raise StageError(
        f"{where}: {whole} names no split, and {part} names one; expected a set or its splits, "
        f"since one may hold the images of the other: {remedy}"
    )


def open_pairs(
    pairs: Mapping[str, Pair],
    options: SourceOptions,
    *,
    is_first_column: Callable[[StoredArray], bool] = lambda labels: False,
    notes: Iterable[str] = (),
    **about,
) -> arrays.ArraySource:
    """A source over the arrays of each split.

    Args:
      pairs: split -> its arrays, in the order of splits.
      options: see SourceOptions.
      is_first_column: see labels.read_labels.
      notes: what was decided before.
      **about: more arguments of ArraySource.

    Raises:
      UsageError: something that only a flag can decide.
      StageError: an array that is ambiguous, or no images or labels.
    """
    stored = {split: pair.labels for split, pair in pairs.items()}
    if options.labels == "none":
        # They count the images if they fit, and are no reason to refuse the images.
        stored = {
            split: labels
            if labels and labels.shape[:1] in {pairs[split].images.shape[i:][:1] for i in (0, -1)}
            else None
            for split, labels in stored.items()
        }
    else:
        check_labelled(pairs)
    images, pixel_notes = pixels_lib.open_images(
        {split: pair.images for split, pair in pairs.items()}, stored, options.pixel_range
    )
    labelled = {split: labels for split, labels in stored.items() if labels}
    opened_labels = labels_lib.Labels({}, None, [])
    if labelled and options.labels != "none":
        opened_labels = labels_lib.read_labels(labelled, is_first_column=is_first_column)
    splits = {
        split: (rows, opened_labels.by_split.get(split, np.full(len(rows), UNLABELLED)))
        for split, rows in images.items()
    }
    unlabelled = [split for split in splits if split not in opened_labels.by_split]
    if opened_labels.by_split and unlabelled:
        opened_labels.notes.append(f"{', '.join(unlabelled)} has no labels")
    return arrays.ArraySource(
        splits,
        class_names=opened_labels.class_names,
        notes=list(dict.fromkeys([*notes, *pixel_notes, *opened_labels.notes])),
        **about,
    )


def check_labelled(pairs: Mapping[str, Pair]) -> None:
    """Checks that no labels are forgotten: only a test split has none beside labelled splits.

    Raises:
      StageError: another split has no labels.
    """
    if not any(pair.labels for pair in pairs.values()):
        return
    for split, (images, labels) in pairs.items():
        if labels is None and split != "test":
            raise StageError(
                f"{images}: {split} has no labels beside other splits that have; expected images "
                "and labels of each split but test: add the labels, or ignore all with "
                "--labels=none"
            )


def open_labels(
    options: SourceOptions, read_header: Callable[..., StoredArray], *args
) -> StoredArray | None:
    """`read_header(*args)`; None if that fails and labels are ignored."""
    try:
        return read_header(*args)
    except StageError:
        if options.labels == "none":
            return None
        raise


def ignored_note(
    names: Iterable[str], names_by_split: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """A note on the arrays that are not read, if there are any.

    Args:
      names: names of all arrays.
      names_by_split: see find_pairs.
    """
    used = {name for kinds in names_by_split.values() for name in kinds.values()}
    others = [name for name in names if name not in used]
    shown = ", ".join(others[:_MAX_SHOWN]) + (", …" if len(others) > _MAX_SHOWN else "")
    return [f"ignores the array{'s' if len(others) > 1 else ''} {shown}"] if others else []


def set_at(place: str) -> tuple[str, str]:
    """(directory, beginning of file names) that DIR or DIR/BEGINNING names."""
    if files.is_dir(place):
        return place, ""
    directory, _, beginning = place.rpartition("/")
    return directory or ".", beginning


def files_of(directory: str, beginning: str, ending: str) -> tuple[list[str], dict[str, int]]:
    """The files of a directory whose names begin and end so.

    Args:
      directory: local path or URL.
      beginning: of the names.
      ending: of the names, such as ".npy"; "" for any.

    Returns:
      Their names.
      Ending -> number of the other files whose names begin so.
    """
    matching, others = [], collections.Counter()
    for name in files.list_names(directory):
        has_ending = name.endswith(ending)
        # On an object store each question takes a request, and there may be many arrays.
        is_file = ending and has_ending and files.is_url(directory)
        if not name.startswith(beginning):
            continue
        if not is_file and files.is_dir(files.join(directory, name)):
            continue
        if has_ending:
            matching.append(name)
        else:
            others[os.path.splitext(name)[1].lower()] += 1
    return matching, dict(others)
