"""Where a record goes: its split, its shard and its place in the shard.

All of it is a function of the seed and the record's id, so it depends on no
runner, no worker and no other record.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

# A source without splits of its own gives this share of its records to `test`.
TEST_FRACTION = 0.1
# The split name by which a source says that it has none.
UNSPLIT = "unsplit"


def _uniform(record_id: bytes) -> float:
    """A number in [0, 1) that the id alone determines."""
    digest = hashlib.blake2b(record_id, digest_size=8, person=b"split").digest()
    # 53 bits, the precision of a float, so that the result stays below 1.
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def split_of(source_split: str, record_id: bytes, validation_fraction: float) -> str:
    """The split a record ends in.

    The seed has no say here: a set shuffled anew keeps its splits, so no
    record that was held out once is trained on later.

    Args:
      source_split: the source's split, or UNSPLIT.
      record_id: the record's id.
      validation_fraction: share of `train` that goes to `validation`.
    """
    if source_split not in ("train", UNSPLIT):
        return source_split
    uniform = _uniform(record_id)
    if uniform < validation_fraction:
        return "validation"
    if source_split == UNSPLIT and uniform >= 1 - TEST_FRACTION:
        return "test"
    return "train"


def splits_made(source_splits: Sequence[str], validation_fraction: float) -> list[str]:
    """Names of the splits that a source's splits become, in their order on disk."""
    made = list(source_splits)
    if UNSPLIT in made:
        made = ["train", "test"]
    if validation_fraction > 0 and "train" in made and "validation" not in made:
        made.insert(1, "validation")
    return made


def shard_and_order(seed: int, record_id: bytes) -> tuple[int, int]:
    """Two independent 64-bit numbers: modulo the shard count, the shard; and the sort key."""
    digest = hashlib.blake2b(
        record_id, digest_size=16, key=str(seed).encode(), person=b"shard"
    ).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def sort_order(seed: int, record_ids: Sequence[bytes]) -> np.ndarray:
    """The order of records within their shard.

    Returns:
      Positions in `record_ids`, int64 (n,), sorted by hash; equal hashes by id.
    """
    keys = [(shard_and_order(seed, record_id)[1], record_id) for record_id in record_ids]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
