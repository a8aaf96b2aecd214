"""The placement of a record: its split, its shard and its position in the shard.

Placement is a function of the seed and the record's id, independent of runner, workers and other
records. Names of splits are in sources/splits.py.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from pipeline.sources.splits import UNSPLIT, in_order

# Share of the records of a source without splits that goes to `test`.
TEST_FRACTION = 0.1


def _hashes(empty: "hashlib._Hash", record_ids: Sequence[bytes]) -> np.ndarray:
    """uint64 (n, digest size / 8): a keyed hash of each id."""
    digests = []
    for record_id in record_ids:
        keyed = empty.copy()  # Cheaper than a new keyed hash for each id.
        keyed.update(record_id)
        digests.append(keyed.digest())
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, empty.digest_size // 8)


def splits_of(
    source_split: str, record_ids: Sequence[bytes], validation_fraction: float
) -> np.ndarray:
    """The split of each record in the data set.

    The split does not depend on the seed: with another seed, no held-out record moves to train.

    Args:
      source_split: the records' split in the source, or UNSPLIT.
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


def expected_sizes(source_sizes: dict[str, int], validation_fraction: float) -> dict[str, float]:
    """The data set's splits, in their order -> expected number of records."""
    sizes: dict[str, float] = {}
    for split, size in source_sizes.items():
        shares = {split: 1.0}
        if split == UNSPLIT:
            shares = {"train": 1 - TEST_FRACTION, "test": TEST_FRACTION}
        if "train" in shares and validation_fraction > 0:
            shares["validation"] = validation_fraction
            shares["train"] -= validation_fraction
        for name, share in shares.items():
            sizes[name] = sizes.get(name, 0.0) + share * size
    return {split: sizes[split] for split in in_order(sizes)}


def id_hashes(seed: int, record_ids: Sequence[bytes]) -> np.ndarray:
    """A hash of each id, two independent 64-bit numbers.

    Args:
      seed: of the order, 0 ≤ seed < 2**63.
      record_ids: the records' ids.

    Returns:
      uint64 (n, 2): the first number, modulo the number of shards, is the record's shard; the
        second is the sort key within the shard.
    """
    salt = seed.to_bytes(8, "little")
    return _hashes(hashlib.blake2b(digest_size=16, salt=salt, person=b"shard"), record_ids)


def sorted_by(keys: np.ndarray, record_ids: Sequence[bytes]) -> np.ndarray:
    """The order of records within their shard.

    Args:
      keys: uint64 (n,), from `id_hashes`.
      record_ids: the records' ids, which break ties between equal keys.

    Returns:
      Positions, int64 (n,).
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    if (ordered[1:] == ordered[:-1]).any():
        order = np.array(sorted(order.tolist(), key=lambda i: (keys[i], record_ids[i])), np.int64)
    return order
