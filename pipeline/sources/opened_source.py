"""A source that is open in this process, and the check that its files have not changed.

The command of a job and each of its workers open the source for themselves, at different times.
All of them must see the same files: workers compare hashes, and the command checks again when the
job ends.
"""

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from pipeline import sources
from pipeline.cli.errors import SourceChanged
from pipeline.sources import memory as memory_lib
from pipeline.stages import manifest as manifest_lib

# Changed files that an error names.
_MAX_SHOWN = 3


class OpenedSource(NamedTuple):
    """A source that is open in this process."""

    spec: str  # As in --source.
    source: sources.Source
    listed: Mapping[str, str]  # File -> stamp at opening; {} if the source lists no files.
    hash: str  # Of `listed`, or of the class names if that is empty; and of the splits.
    recollection: memory_lib.Recollection  # What an earlier job found in the listed files.

    def check_unchanged(self) -> None:
        """Raises SourceChanged, which names the files that have changed since the opening."""
        if not hasattr(self.source, "listing"):
            return
        changes = _changes(self.listed, self.source.listing())
        if changes:
            num_hidden = len(changes) - _MAX_SHOWN
            raise SourceChanged(
                f"--source={self.spec}: {', '.join(changes[:_MAX_SHOWN])}"
                f"{f' and {num_hidden:,} more' if num_hidden > 0 else ''} since the job began; "
                "expected all files to stay unchanged until the job ends: run the same command "
                "again"
            )


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """A phrase for each file whose stamp differs, in the order of the names."""

    def describe(name: str) -> str:
        if name not in before:
            return f"{name} is new"
        return f"{name} was changed" if name in after else f"{name} is gone"

    names = sorted(before.keys() | after.keys())
    return [describe(name) for name in names if before.get(name) != after.get(name)]


@functools.lru_cache(maxsize=1)
def open_source_once(
    spec: str, options: sources.SourceOptions, memory_path: str | None = None
) -> OpenedSource:
    """As sources.open_source; the source opened last stays open in this process.

    Args:
      spec: as in --source.
      options: see SourceOptions.
      memory_path: path or URL of a memory of the source; see memory.py.
    """
    opened_at, key = time.time_ns(), memory_lib.key_of(spec, options)
    # A function of the user may read other files than those that its source lists.
    memory = memory_lib.read(None if "." in spec.partition(":")[0] else memory_path, key)
    source = sources.open_source(spec, options, memory)
    listed = getattr(source, "listed", None)
    if listed is None:
        listed = source.listing() if hasattr(source, "listing") else {}
    # Class names follow from the files, and for a CSV they take a pass over all rows.
    contents = sorted(listed.items()) or list(source.class_names)
    text = manifest_lib.canonical_json([contents, list(source.split_sizes.items())])
    recollection = memory_lib.Recollection(
        source, listed, memory=memory, key=key, opened_at=opened_at
    )
    return OpenedSource(spec, source, listed, hashlib.sha256(text).hexdigest(), recollection)


@contextlib.contextmanager
def reporting_source_changes(
    check_unchanged: Callable[[], None], forget_tasks: Callable[[], None]
) -> Iterator[None]:
    """If the block fails and the source has changed, raises an error that names the changes.

    Args:
      check_unchanged: `OpenedSource.check_unchanged` of the source that the block reads.
      forget_tasks: makes the next try redo all tasks. A changed file that keeps its size and time
        is not detected itself, so one detected change makes every task of this try doubtful.
    """
    try:
        yield
    except Exception as error:
        changed = error if isinstance(error, SourceChanged) else None
        try:
            check_unchanged()
        except SourceChanged as change:
            changed = change
            if str(error) != str(change):
                reason = str(error).partition(";")[0]  # Without the remedy, which `change` states.
                changed = SourceChanged(f"{change} ({reason})")
        if changed:
            forget_tasks()
        if changed in (None, error):
            raise
        raise changed from error
