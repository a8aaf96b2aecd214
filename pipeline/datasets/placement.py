"""Where a record goes: its split, its shard and its place in the shard.

All of it is a function of the seed and the record's id, so it depends on no
runner, no worker and no other record. What splits are called is in sources/splits.py.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.sources.splits import UNSPLIT, in_order

# A source without splits of its own gives this share of its records to `test`.
TEST_FRACTION = 0.1


def _hashes(empty: "hashlib._Hash", record_ids: Sequence[bytes]) -> np.ndarray:
    """uint64 (n, digest size / 8): a keyed hash of each id."""
    digests = []
    for record_id in record_ids:
        keyed = empty.copy()  # Cheaper than keying each anew.
        keyed.update(record_id)
        digests.append(keyed.digest())
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, empty.digest_size // 8)


def splits_of(
    source_split: str, record_ids: Sequence[bytes], validation_fraction: float
) -> np.ndarray:
    """The split that each record ends in.

    The seed has no say here: a set shuffled anew keeps its splits, so no
    record that was held out once is trained on later.

    Args:
      source_split: the source's split of all of them, or UNSPLIT.
      record_ids: the records' ids.
      validation_fraction: share of `train` that goes to `validation`.

    Returns:
      Names of splits, str (n,).
    """
    if source_split not in ("train", UNSPLIT):
        return np.full(len(record_ids), source_split)
    hashes = _hashes(hashlib.blake2b(digest_size=8, person=b"split"), record_ids)[:, 0]
    # 53 bits, the precision of a float, so that the result stays below 1.
    uniform = (hashes >> np.uint64(11)) / 2.0**53
    splits = np.where(uniform < validation_fraction, "validation", "train")
    if source_split == UNSPLIT:
        splits = np.where(uniform >= 1 - TEST_FRACTION, "test", splits)
    return splits


def splits_made(source_splits: Iterable[str], validation_fraction: float) -> list[str]:
    """Names of the splits that a source's splits become, in their order on disk."""
    return [
        split for split, _ in expected_sizes(dict.fromkeys(source_splits, 0), validation_fraction)
    ]


def expected_sizes(
    source_sizes: dict[str, int], validation_fraction: float
) -> list[tuple[str, float]]:
    """The splits that a source's splits become and about how many records each will hold."""
    made: dict[str, float] = {}
    for split, size in source_sizes.items():
        shares = {split: 1.0}
        if split == UNSPLIT:
            shares = {"train": 1 - TEST_FRACTION, "test": TEST_FRACTION}
        if "train" in shares and validation_fraction > 0:
            shares["validation"] = validation_fraction
            shares["train"] -= validation_fraction
        for name, share in shares.items():
            made[name] = made.get(name, 0.0) + share * size
    return [(split, made[split]) for split in in_order(made)]


def shards_and_order(seed: int, record_ids: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Two independent 64-bit numbers for each record.

    Args:
      seed: of the order, 0 ≤ seed < 2**63.
      record_ids: the records' ids.

    Returns:
      uint64 (n,): modulo the number of shards, the shard.
      uint64 (n,): the key by which records are sorted in their shard.
    """
    salt = seed.to_bytes(8, "little")
    hashes = _hashes(hashlib.blake2b(digest_size=16, salt=salt, person=b"shard"), record_ids)
    return hashes[:, 0], hashes[:, 1]


def sorted_by(keys: np.ndarray, record_ids: Sequence[bytes]) -> np.ndarray:
    """The order of records within their shard.

    Args:
      keys: uint64 (n,), from `shards_and_order`.
      record_ids: their ids, which decide between equal keys.

    Returns:
      Positions, int64 (n,).
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    if (ordered[1:] == ordered[:-1]).any():
        order = np.array(sorted(order.tolist(), key=lambda i: (keys[i], record_ids[i])), np.int64)
    return order
