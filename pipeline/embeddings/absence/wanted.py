"""The records to look for, and the texts that stand for them."""

import dataclasses
import functools
import re

import numpy as np

from pipeline.cli.errors import UsageError
from pipeline.datasets import index, placement
from pipeline.formats import webdataset
from pipeline.storage import files

SHA = re.compile(r"[0-9a-fA-F]{64}")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Records, by their ids or by the sha256 of their serialized tf.Examples."""

    ids: frozenset[str]
    shas: frozenset[str]  # 64 hex digits, small letters

    def __str__(self) -> str:
        num_ids = sum(record_id.lower() not in self.shas for record_id in self.ids)
        return f"{num_ids:,} ids and {len(self.shas):,} hashes"

    def match(self, record_id: str, sha: str = "") -> str:
        """The id, or else the hash, of a record that is wanted; "" for any other record."""
        if record_id in self.ids or sha in self.shas:
            return record_id or sha
        return ""

    @functools.cached_property
    def by_key(self) -> dict[str, str]:
        """Key in a WebDataset -> id."""
        return {webdataset.key(record_id): record_id for record_id in self.ids}

    @functools.cached_property
    def by_field(self) -> dict[str, str]:
        """Field of projector/metadata.tsv -> id."""
        return {
            "".join(c if c.isprintable() else "�" for c in record_id): record_id
            for record_id in self.ids
        }

    @functools.cached_property
    def _hashes(self) -> dict[int, tuple[np.ndarray, list[str]]]:
        return {}

    def by_hash(self, seed: int, hashes: np.ndarray) -> list[str]:
        """The ids whose hashes are among some hashes of a data set, uint64 (n, 2)."""
        if not self.ids:
            return []
        if seed not in self._hashes:
            ids = sorted(self.ids)
            keys = placement.id_hashes(seed, [record_id.encode() for record_id in ids])
            order = np.lexsort((keys[:, 1], keys[:, 0]))
            self._hashes[seed] = keys[order], [ids[i] for i in order.tolist()]
        ordered, ids = self._hashes[seed]
        places = index.places_in(ordered, hashes)
        return [ids[place] for place in np.unique(places[places >= 0]).tolist()]


def read(path: str, flag: str = "--absent") -> Wanted:
    """Reads a file with an id, or the sha256 of a record, in each line.

    A line of 64 hex digits may be an id, too, and counts as both.

    Args:
      path: local path or URL; UTF-8, empty lines are ignored.
      flag: the flag that names the file, for error messages.

    Raises:
      UsageError: the file cannot be read, or holds no line.
    """
    expected = "expected a text file in UTF-8 with an id, or the sha256 of a record, in each line"
    try:
        text = files.read_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag}={path}: cannot be read ({error}); {expected}") from error
    lines = {line.removesuffix("\r") for line in text.split("\n") if line.strip()}
    if not lines:
        raise UsageError(f"{flag}={path}: is empty; {expected}: write the records into it")
    return Wanted(
        frozenset(lines), frozenset(line.lower() for line in lines if SHA.fullmatch(line))
    )
