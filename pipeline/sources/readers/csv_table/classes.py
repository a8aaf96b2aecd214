"""The classes of a set of CSV files: labels are numbers, or words, in all files."""

import collections
import re
from collections.abc import Sequence

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import source
from pipeline.sources.readers import arrays
from pipeline.sources.readers.csv_table import fields, sample
from pipeline.sources.readers.csv_table.table import Table

# A share of labels. Fewer labels that are words are faults among numbers.
_LEAST_WORDS = 0.1


def are_words(tables: Sequence[Table]) -> bool:
    """Whether the labels of a set are words.

    Args:
      tables: the files that have labels.

    Raises:
      StageError: one file has words, and the others have so many numbers.
    """
    num_labels = sum(table.num_labels for table in tables)
    if sum(table.num_words for table in tables) > _LEAST_WORDS * num_labels:
        return True
    for table in tables:
        if table.num_words > _LEAST_WORDS * table.num_labels:
            raise _of_two_kinds(table, min(tables, key=lambda t: t.num_words))
    return False


def of_numbers(tables: Sequence[Table]) -> tuple[list[str], set[str], str]:
    """The classes 0 to the highest label.

    Args:
      tables: the files that have labels, which are numbers.

    Returns:
      Names of the classes.
      Paths of files in which more rows are read than an earlier version read.
      What is said of records with the label -1; "" if no record has the label.

    Raises:
      UsageError: the labels are -1 and 1, so that -1 is a class.
      StageError: too many classes.
    """
    counts, highest, read_now = collections.Counter(), [], set()
    for table in tables:
        of_table = collections.Counter()
        for field, is_new in table.labels(are_words=False):
            label = fields.label_of(field)
            if label is not None:
                of_table[label] += 1
                if is_new:
                    read_now.add(table.path)
        counts.update(of_table)
        highest.append((max(of_table, default=-1), table.path))
    if set(counts) == {-1, 1}:
        table = tables[0]
        code = f"c = t.columns[{table.columns.label}]; t[c] = t[c].replace(-1, 0)"
        raise UsageError(
            f"{table.path}: the labels are -1 and 1, and -1 means no label; expected the "
            f"classes 0 and 1: ignore labels with --labels=none, or replace -1: "
            f"{sample.pandas_edit(table.head, table.separator, code)}"
        )
    note, num_unlabelled = "", counts[source.UNLABELLED]
    if num_unlabelled:
        note = f"{num_unlabelled:,} of {counts.total():,} records have no label (-1)"
    return arrays.class_names_up_to(*max(highest)) if highest else [], read_now, note


def of_words(tables: Sequence[Table]) -> list[str]:
    """Names of the classes of labels that are words; tells the tables their numbers.

    Args:
      tables: the files that have labels.

    Raises:
      StageError: a name is not UTF-8, too many names, or one file has words and another one
        numbers.
    """
    names_by_table = [
        (
            table,
            {
                fields.name_of(field)
                for field, _ in table.labels(are_words=True)
                if not fields.is_missing(field)
            },
        )
        for table in tables
    ]
    worded = [(table, names) for table, names in names_by_table if table.num_words]
    among_words = set().union(*(names for _, names in worded))
    for table, names in names_by_table:
        if not names <= among_words:  # Numbers may be classes beside words: 7 beside b.
            raise _of_two_kinds(worded[0][0], table)
    names = _sorted(tables[0].path, among_words)
    numbers = {name: number for number, name in enumerate(names)}
    for table in tables:
        table.classes = numbers
    return names


def _sorted(path: str, names: set[str]) -> list[str]:
    """Class names, numbers first and by number; raises as `of_words`."""
    shown = f"{path}: labels are words"
    if len(names) > arrays.MAX_LABEL + 1:
        raise StageError(
            f"{shown}, and {len(names)} of them differ; expected at most "
            f"{arrays.MAX_LABEL + 1} classes: name another column with --label_column"
        )
    bad = next((name for name in names if not _is_text(name)), None)
    if bad is not None:
        raise StageError(
            f"{shown}, and {bad.encode(errors='surrogateescape')!r} is not UTF-8; convert the "
            "file, for example with iconv -f LATIN1 -t UTF-8 FILE > NEW.csv"
        )
    is_number = {name: bool(re.fullmatch(r"-?\d+", name)) for name in names}
    return sorted(names, key=lambda n: (not is_number[n], int(n) if is_number[n] else 0, n))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Bytes that are not UTF-8 were decoded as surrogates.
        return False
    return True


def _of_two_kinds(words: Table, numbers: Table) -> StageError:
    return StageError(
        f"{words.path}: labels are words, and those of {numbers.path} are numbers; expected the "
        "same classes in all files: write words in both, or ignore labels with --labels=none"
    )
