"""A source as it is open in this process, and whether it is still what it was.

A job's command and its workers open a source each for itself, and one after the other. They are to
find the same: the workers compare hashes, and the command looks again when the job ends.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from pipeline import sources
from pipeline.cli.errors import SourceChanged
from pipeline.stages import manifest as manifest_lib

# Of the files that have changed, as many are named.
_MAX_SHOWN = 3


class OpenedSource(NamedTuple):
    """A source that is open in this process."""

    spec: str  # As in --source.
    source: sources.Source
    listed: Mapping[str, str]  # Its files as they were when it was opened; {} if it lists none.
    hash: str  # Of these, or where there are none, of its classes; and of its splits.

    def check_unchanged(self) -> None:
        """Raises SourceChanged, which names what changed, if the files are not as when opened."""
        if not hasattr(self.source, "listing"):
            return
        changes = _changes(self.listed, self.source.listing())
        if changes:
            more = len(changes) - _MAX_SHOWN
            raise SourceChanged(
                f"--source={self.spec}: {', '.join(changes[:_MAX_SHOWN])}"
                f"{f' and {more:,} more' if more > 0 else ''} since the job began; expected all "
                "files to stay as they are until the job ends: run the same command again"
            )


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What became of each file whose stamp is not the same, in the order of their names."""

    def change(name: str) -> str:
        if name not in before:
            return f"{name} is new"
        return f"{name} was changed" if name in after else f"{name} is gone"

    names = sorted(before.keys() | after.keys())
    return [change(name) for name in names if before.get(name) != after.get(name)]


@functools.lru_cache(maxsize=1)
def open_source_once(
    spec: str, tfds_data_dir: str | None, tfds_manual_dir: str | None, max_image_pixels: int
) -> OpenedSource:
    """As sources.open_source; the last one stays open in this process."""
    source = sources.open_source(
        spec,
        tfds_data_dir=tfds_data_dir,
        tfds_manual_dir=tfds_manual_dir,
        max_image_pixels=max_image_pixels,
    )
    listed = getattr(source, "listed", None)
    if listed is None:
        listed = source.listing() if hasattr(source, "listing") else {}
    # Classes follow from the files, and to find those of a CSV takes a look at each row.
    about = sorted(listed.items()) or list(source.class_names)
    text = manifest_lib.canonical_json([about, list(source.split_sizes.items())])
    return OpenedSource(spec, source, listed, hashlib.sha256(text).hexdigest())


@contextlib.contextmanager
def telling_changes(
    check_unchanged: Callable[[], None], forget_tasks: Callable[[], None]
) -> Iterator[None]:
    """If the block fails and the source has changed, the error says so, and what changed.

    Args:
      check_unchanged: `OpenedSource.check_unchanged`, of the source that the block reads.
      forget_tasks: makes the next try do all tasks again. Files that change and keep size and time
        show by others alone, so then no task of this try is to be believed.
    """
    try:
        yield
    except Exception as error:
        changed = error if isinstance(error, SourceChanged) else None
        try:
            check_unchanged()
        except SourceChanged as named:
            changed = named
            if str(error) != str(named):
                reason = str(error).partition(";")[0]  # The remedy is not needed twice.
                changed = SourceChanged(f"{named} ({reason})")
        if changed:
            forget_tasks()
        if changed in (None, error):
            raise
        raise changed from error
