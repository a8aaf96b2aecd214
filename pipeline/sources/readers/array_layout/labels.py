"""Labels in stored arrays: class numbers, one-hot rows, or words."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources.readers.array_layout.stored import StoredArray
from pipeline.sources.readers.arrays import MAX_LABEL, FileRows, class_names_up_to
from pipeline.sources.source import UNLABELLED

_BLOCK_BYTES = 1 << 23
_NUMBERS, _WORDS = "biuf", "US"


class Labels(NamedTuple):
    """The labels of a set."""

    by_split: dict[str, np.ndarray]  # int64 (n,) each
    class_names: list[str] | None  # None for the numbers 0 to the highest label.
    notes: list[str]


def read_labels(
    labels: Mapping[str, StoredArray], *, is_first_column: Callable[[StoredArray], bool]
) -> Labels:
    """Reads the labels of a set.

    Args:
      labels: split -> array (n,), (n, 1) or (n, K).
      is_first_column: whether the first column of an array (n, K) holds the labels, if its rows
        are not one-hot.

    Raises:
      UsageError: several labels an image, which only --labels=none passes over, or -1 and 1.
      StageError: anything else that is no label.
    """
    for array in labels.values():
        is_known = array.dtype.kind in _NUMBERS + _WORDS and array.dtype.itemsize
        if not is_known or len(array.shape) not in (1, 2):
            raise StageError(
                f"{array}; expected one integer for each image: save labels (n,), or ignore them "
                "with --labels=none"
            )
    rows = {split: array.rows("NK"[: len(array.shape)])[0] for split, array in labels.items()}
    are_words = {array.dtype.kind in _WORDS for array in labels.values()}
    if len(are_words) > 1:
        raise StageError(
            f"{' and '.join(map(str, labels.values()))}; expected words in all splits, or numbers "
            "in all: save class numbers"
        )
    if True in are_words:
        return _words(labels, rows)
    by_split, notes, num_classes = {}, [], 0
    for split, array in labels.items():
        if array.shape[1:] in ((), (1,)):
            by_split[split] = _numbers(array, rows[split])
            continue
        numbers = _one_hot(rows[split])
        if numbers is not None:
            num_classes = max(num_classes, array.shape[1])
            notes.append(f"labels are one-hot rows (n, {array.shape[1]}), read as class numbers")
        elif is_first_column(array):
            numbers = _numbers(array, rows[split])
            notes.append(f"labels are the first of {array.shape[1]} columns")
        else:
            raise UsageError(
                f"{array}; expected one integer for each image, or one-hot rows: several labels an "
                "image are not read, and --labels=none reads the images alone"
            )
        by_split[split] = numbers
    notes += _unlabelled_note(labels, by_split)
    highest = max(int(numbers.max()) for numbers in by_split.values())
    class_names = None
    if num_classes:
        where = next(iter(labels.values())).where
        class_names = class_names_up_to(max(highest, num_classes - 1), where)
    return Labels(by_split, class_names, notes)


def _numbers(array: StoredArray, rows: FileRows) -> np.ndarray:
    """Class numbers (n,) in an array (n,), or in the first column of an array (n, K)."""
    labels = np.empty(len(rows), np.int64)
    for first, block in rows.blocks(_BLOCK_BYTES):
        numbers = block.reshape(len(block), -1)[:, 0]
        if numbers.dtype.kind == "f":
            is_bad = ~np.isfinite(numbers) | (numbers != np.rint(numbers)) | (numbers < -MAX_LABEL)
            if is_bad.any():
                row = int(np.flatnonzero(is_bad)[0])
                raise StageError(
                    f"{array}: label {first + row} is {numbers[row]}; expected whole numbers: save "
                    "class numbers, or ignore labels with --labels=none"
                )
        class_names_up_to(int(numbers.max()), array.where)
        labels[first : first + len(block)] = numbers
    return labels


def _unlabelled_note(
    labels: Mapping[str, StoredArray], by_split: Mapping[str, np.ndarray]
) -> list[str]:
    """A note on labels that mean "without a label", if there are any.

    Raises:
      UsageError: these are one of two classes.
    """
    num_missing = sum(int((numbers == UNLABELLED).sum()) for numbers in by_split.values())
    if not num_missing:
        return []
    if all(np.isin(numbers, (UNLABELLED, 1)).all() for numbers in by_split.values()) and any(
        (numbers == 1).any() for numbers in by_split.values()
    ):
        raise UsageError(
            f"{next(iter(labels.values()))}: binary labels -1 and 1; expected 0 and 1, since -1 "
            'means "without a label": save (y > 0).astype(int), or ignore labels with --labels=none'
        )
    num_records = sum(map(len, by_split.values()))
    return [f"{num_missing:,} of {num_records:,} records have no label ({UNLABELLED})"]


def _one_hot(rows: FileRows) -> np.ndarray | None:
    """The place (n,) of the only 1 of each row; None if a row is not one 1 and else 0."""
    labels = np.empty(len(rows), np.int64)
    for first, block in rows.blocks(_BLOCK_BYTES):
        is_one = block == 1
        if not (is_one | (block == 0)).all() or (is_one.sum(axis=1) != 1).any():
            return None
        labels[first : first + len(block)] = is_one.argmax(axis=1)
    return labels


def _words(labels: Mapping[str, StoredArray], rows: Mapping[str, FileRows]) -> Labels:
    """Numbers of words: the words of all splits are the class names, sorted."""
    words: set[str] = set()
    for split, array in labels.items():
        if array.shape[1:] not in ((), (1,)):
            raise UsageError(
                f"{array}; expected one word for each image: --labels=none reads the images alone"
            )
        for _, block in rows[split].blocks(_BLOCK_BYTES):
            words.update(_texts(array, np.unique(block)))
            if len(words) > MAX_LABEL + 1:
                raise StageError(
                    f"{array}: more than {MAX_LABEL + 1} different words; expected names of "
                    "classes: ignore them with --labels=none"
                )
    # As of class directories: "10" comes after "2".
    are_numbers = all(re.fullmatch("[0-9]+", word) for word in words)
    class_names = sorted(words, key=lambda word: (int(word) if are_numbers else 0, word))
    numbers = {word: number for number, word in enumerate(class_names)}
    by_split = {}
    for split, array in labels.items():
        by_split[split] = np.empty(len(rows[split]), np.int64)
        for first, block in rows[split].blocks(_BLOCK_BYTES):
            block_words, places = np.unique(block.reshape(-1), return_inverse=True)
            word_numbers = np.array([numbers[word] for word in _texts(array, block_words)])
            by_split[split][first : first + len(block)] = word_numbers[places]
    return Labels(by_split, class_names, ["labels are words, numbered in their sorted order"])


def _texts(array: StoredArray, words: np.ndarray) -> list[str]:
    """Words as text that a manifest can hold."""
    texts = []
    for place in range(len(words)):
        try:
            word = words[place].item()
            text = word.decode() if isinstance(word, bytes) else word
        except (UnicodeDecodeError, SystemError, ValueError):  # No characters at all.
            word = text = ""
        if not text or not text.isprintable():
            raise StageError(
                f"{array}: the label {word!r}; expected printable names of classes: save class "
                "numbers, or ignore labels with --labels=none"
            )
        texts.append(text)
    return texts
