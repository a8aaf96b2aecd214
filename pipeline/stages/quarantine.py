"""Records that could not be had: how they are named, and how many of them are too many."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.cli.errors import StageError, UsageError
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files

DIRECTORY = "quarantine"


class Limit(NamedTuple):
    """How many quarantined records a stage bears."""

    text: str  # As the user wrote it.
    count: int | None  # So many,
    share: float | None  # or this share of all, but no fewer than one if it is above 0.

    def allows(self, num_quarantined: int, num_records: int) -> bool:
        """Whether so many of so many records may be quarantined."""
        if self.count is not None:
            return num_quarantined <= self.count
        # A share of a small set is less than a record, and only 0 means none.
        return num_quarantined <= (max(1, self.share * num_records) if self.share else 0)


def parse_limit(text: str) -> Limit:
    """The limit that a flag says: a count (25) or a share (0.1% or 0.001).

    Raises:
      UsageError: it says neither.
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
    """Where a task names its quarantined records, below the stage's directory."""
    return f"{DIRECTORY}/{task}.jsonl"


def write(
    directory: str, task: str, faults: Iterable[Mapping[str, Any]], *, num_quarantined: int
) -> list[dict[str, Any]]:
    """Writes a task's file of quarantined records, if there are any.

    Args:
      directory: the stage's output directory.
      task: name of the task.
      faults: one JSON object for each fault, its place and its reason among the rest.
      num_quarantined: how many records these faults cost.

    Returns:
      The file's entry with num_quarantined, in a list; an empty list if there is no fault.
    """
    lines = [json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults]
    if not lines:
        return []
    files.make_dirs(files.join(directory, DIRECTORY))
    # A path of bytes that are no UTF-8 has them written out.
    data = "".join(lines).encode(errors="backslashreplace")
    entry = manifest_lib.write_file(directory, file_name(task), data)
    return [{**entry, "num_quarantined": num_quarantined}]


def read_all(directory: str, entries: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every fault that a stage has named.

    Args:
      directory: the stage's output directory.
      entries: of the stage's files, those of quarantine among them.
    """
    for entry in entries:
        if "num_quarantined" in entry:
            yield from map(json.loads, manifest_lib.read_file(directory, entry).splitlines())


def check(
    limit: Limit, faults: Iterable[Mapping[str, Any]], *, num_quarantined: int, num_records: int
) -> None:
    """Refuses too many quarantined records.

    Args:
      limit: how many are borne.
      faults: as `write` takes them; the first are shown.
      num_quarantined: records that are quarantined.
      num_records: all records that the stage read.

    Raises:
      StageError: more than the limit.
    """
    if limit.allows(num_quarantined, num_records):
        return
    shown = [f"{fault['where']}: {fault['reason']}" for fault in itertools.islice(faults, 3)]
    raise StageError(
        f"{num_quarantined} of {num_records} records cannot be had, --max_quarantined={limit.text} "
        f"allows fewer ({'; '.join(shown)}); run the same command with a higher --max_quarantined, "
        "which keeps what is done, or mend the input and pass --overwrite"
    )
