"""Which arrays belong together: images and labels of a split, found by their names."""

import collections
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.readers.array_layout import labels as labels_lib
from pipeline.sources.readers.array_layout import pixels as pixels_lib
from pipeline.sources.readers.array_layout.stored import StoredArray
from pipeline.sources.source import UNLABELLED
from pipeline.sources.splits import UNSPLIT, in_order, split_named
from pipeline.storage import files

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


# Names of arrays that a note shows.
_MAX_SHOWN = 12


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
    best = [found for found in kinds if found[1] == kinds[0][1]]
    kind, rank, kind_word = best[0] if len({found[0] for found in best}) == 1 else ("", 0, None)
    split_word = next((word for word, _ in words if split_named(word) != UNSPLIT), None)
    rest = [word for word, _ in words]
    for word in {kind_word, split_word} - {None}:
        rest.remove(word)
    ends = [place for word, place in words if word in (kind_word, split_word)]
    beginning = name[: min(ends, default=0)].rstrip("-_. /")
    return Name(kind, split_named(split_word or ""), " ".join(rest), rank, beginning)


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
    found: dict[str, dict[str, str]] = {}
    for name, about in parsed.items():
        kind = about.kind
        if not kind or about.rank > ranks[kind]:
            continue
        other = found.setdefault(about.split, {}).setdefault(kind, name)
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
        found = {split: kinds for split, kinds in found.items() if "images" in kinds}
    for split, kinds in found.items():
        rests = {parsed[name].rest for name in kinds.values()}
        if options.labels != "none" and ("images" not in kinds or len(rests) > 1):
            raise StageError(
                f"{where}: {split} has {' and '.join(kinds.values())}; expected images and labels "
                "of each split, such as x_train and y_train, or train_images and train_labels: "
                "rename the arrays"
            )
    used = {split: list(kinds.values()) for split, kinds in found.items()}
    others = [name for split, kinds in used.items() if split != UNSPLIT for name in kinds]
    remedy = "save one of the two, such as the splits: a = numpy.load(FILE); numpy.savez(NEW, "
    remedy += ", ".join(f"{name}=a[{name!r}]" for name in others) + ")"
    refuse_whole_beside_splits(where, used, "move the files of one away" if place else remedy)
    return {split: found[split] for split in in_order(found)}


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
    part = next(found[0] for split, found in names.items() if split != UNSPLIT)
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
    found = labels_lib.Labels({}, None, [])
    if labelled and options.labels != "none":
        found = labels_lib.read_labels(labelled, is_first_column=is_first_column)
    splits = {
        split: (rows, found.of_split.get(split, np.full(len(rows), UNLABELLED)))
        for split, rows in images.items()
    }
    unlabelled = [split for split in splits if split not in found.of_split]
    if found.of_split and unlabelled:
        found.notes.append(f"{', '.join(unlabelled)} has no labels")
    return arrays.ArraySource(
        splits,
        class_names=found.class_names,
        notes=list(dict.fromkeys([*notes, *pixel_notes, *found.notes])),
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


def ignored_note(names: Iterable[str], found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A note on the arrays that are not read, if there are any.

    Args:
      names: names of all arrays.
      found: see find_pairs.
    """
    used = {name for kinds in found.values() for name in kinds.values()}
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
    found, others = [], collections.Counter()
    for name in files.list_names(directory):
        has_ending = name.endswith(ending)
        # On an object store each question takes a request, and there may be many arrays.
        is_file = ending and has_ending and files.is_url(directory)
        if not name.startswith(beginning):
            continue
        if not is_file and files.is_dir(files.join(directory, name)):
            continue
        if has_ending:
            found.append(name)
        else:
            others[os.path.splitext(name)[1].lower()] += 1
    return found, dict(others)
