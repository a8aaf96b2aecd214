"""Unreadable records: how they are listed, and how many are too many."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.cli.errors import StageError, UsageError
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import FileEntry
from pipeline.storage import files

DIRECTORY = "quarantine"
# Reasons that a message shows.
_MAX_REASONS = 3


@dataclasses.dataclass(frozen=True)
class Limit:
    """The largest number of quarantined records that a stage accepts."""

    text: str  # As the user wrote it.
    count: int | None  # Either a number of records,
    share: float | None  # or a share of all records; a share above 0 always allows one record.

    def allows(self, num_quarantined: int, num_records: int) -> bool:
        """Whether `num_quarantined` of `num_records` is within the limit."""
        if self.count is not None:
            return num_quarantined <= self.count
        # A share of a small set can be less than one record.
        return num_quarantined <= (max(1, self.share * num_records) if self.share else 0)


def parse_limit(text: str) -> Limit:
    """Parses a limit: a number of records (25) or a share (0.1% or 0.001).

    Raises:
      UsageError: the text is neither.
    """
    try:
        if text.isdecimal():
            return Limit(text, int(text), None)
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        if 0 <= share <= 1:
            return Limit(text, None, share)
    except ValueError:
        pass
    raise UsageError(
        f"--max_quarantined={text}: expected a count of records such as 25, or a share of them "
        "such as 0.1% or 0.001"
    )


DEFAULT_LIMIT = parse_limit("0.1%")


def file_name(task: str) -> str:
    """Name of the file that lists a task's quarantined records, below the stage's directory."""
    return f"{DIRECTORY}/{task}.jsonl"


def write(
    directory: str, task: str, faults: Iterable[Mapping[str, Any]], *, num_quarantined: int
) -> list[FileEntry]:
    """Writes a task's list of quarantined records, unless the list is empty.

    Args:
      directory: the stage's output directory.
      task: name of the task.
      faults: one JSON object for each fault, with "where" and "reason" among its keys.
      num_quarantined: number of records that these faults cost.

    Returns:
      The file's entry with num_quarantined, in a list; an empty list without faults.
    """
    data = to_bytes(faults)
    if not data:
        return []
    files.make_dirs(files.join(directory, DIRECTORY))
    entry = manifest_lib.write_file(directory, file_name(task), data)
    return [{**entry, "num_quarantined": num_quarantined}]


def to_bytes(faults: Iterable[Mapping[str, Any]]) -> bytes:
    """The content of a list; arguments as of `write`."""
    lines = [json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults]
    # Bytes of a path that are not UTF-8 are written as escapes.
    return "".join(lines).encode(errors="backslashreplace")


def read_all(directory: str, entries: Iterable[FileEntry]) -> Iterator[dict[str, Any]]:
    """Every fault that a stage has listed.

    Args:
      directory: the stage's output directory.
      entries: entries of the stage's files, the quarantine lists among them.
    """
    for entry in entries:
        if "num_quarantined" in entry:
            yield from map(json.loads, manifest_lib.read_file(directory, entry).splitlines())


def reasons(faults: Iterable[tuple[str, str]]) -> list[str]:
    """A phrase for each of the most frequent reasons, with one place and the number of others.

    Args:
      faults: (where, reason) of each fault.
    """
    examples: dict[str, str] = {}
    counts = collections.Counter[str]()
    for where, reason in faults:
        examples.setdefault(reason, where)
        counts[reason] += 1
    return [
        f"{examples[reason]}{f' and {count - 1:,} more' if count > 1 else ''}: {reason}"
        for reason, count in counts.most_common(_MAX_REASONS)
    ]


def check(
    limit: Limit, faults: Iterable[Mapping[str, Any]], *, num_quarantined: int, num_records: int
) -> None:
    """Refuses too many quarantined records.

    Args:
      limit: the largest accepted number.
      faults: as for `write`; the message shows the most frequent reasons.
      num_quarantined: number of quarantined records.
      num_records: number of records that the stage read.

    Raises:
      StageError: `num_quarantined` is above the limit.
    """
    if limit.allows(num_quarantined, num_records):
        return
    shown = reasons((fault["where"], fault["reason"]) for fault in faults)
    raise StageError(
        f"{num_quarantined} of {num_records} records are unreadable, "
        f"--max_quarantined={limit.text} allows fewer ({'; '.join(shown)}); run the same "
        "command with a higher --max_quarantined, which keeps the completed files, or mend the "
        "input or its flags and pass --overwrite"
    )
