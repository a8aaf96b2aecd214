"""A finished data set's shards: their names, and what they hold read back."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.formats import tf_example, tfrecord
from pipeline.formats.tfrecord import Fault
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import cache, files

# What a reader does where a shard is damaged.
ON_CORRUPT = ("fail", "quarantine")


def shard_name(name: str, split: str, shard: int, num_shards: int, compression: str) -> str:
    """File name of a shard, as TensorFlow Datasets spells it.

    Shards of number `num_shards` and beyond are those appended to the first ones.
    """
    packed = tfrecord.suffix(compression)
    return f"{name}-{split}.tfrecord-{shard:05d}-of-{num_shards:05d}{packed}"


class Loss(NamedTuple):
    """What cannot be had of a damaged shard."""

    name: str  # The shard's file.
    num_records: int
    faults: list[Fault]

    def lines(self, directory: str) -> list[dict[str, Any]]:
        """The faults as quarantine names them."""
        path = files.join(directory, self.name)
        return [
            {"where": f"{path} byte {offset}", "offset": offset, "reason": reason}
            for offset, reason in self.faults
        ]


class Shard(NamedTuple):
    """One shard in memory: n records in file order, and what is wrong with the file."""

    ids: list[str]
    images: np.ndarray  # (n, H, W, C) uint8
    labels: np.ndarray  # (n,) int64
    records: list[bytes]  # the serialized tf.Examples
    faults: list[Fault]  # empty unless faults are to be quarantined


def parse_records(
    data: bytes, path: str, image_shape: tuple[int, ...]
) -> Iterator[tuple[int, bytes, tf_example.Record] | Fault]:
    """Every record in a shard's bytes, and every fault.

    Yields:
      (offset, serialized, parsed), or a Fault; in the order of their offsets.
    """
    num_pixels = int(np.prod(image_shape))
    for found in tfrecord.scan(data, path):
        if isinstance(found, Fault):
            yield found
            continue
        offset, serialized = found
        try:
            record = tf_example.parse(serialized)
            record.id.decode()
        except ValueError as error:
            yield Fault(offset, str(error))
            continue
        if len(record.image) != num_pixels:
            yield Fault(offset, f"an image of {len(record.image)} bytes, expected {num_pixels}")
            continue
        yield offset, serialized, record


class Dataset:
    """A finished data set directory, opened for reading."""

    def __init__(self, directory: str, *, on_corrupt: str = "fail", cache_dir: str | None = None):
        """Reads the manifest.

        Args:
          directory: the output directory of preprocess; local path or fsspec URL.
          on_corrupt: "fail" to refuse a damaged shard, "quarantine" to go on without the
            records that cannot be had and name them in `Shard.faults`.
          cache_dir: local directory that keeps shards of a URL; see storage/cache.py.

        Raises:
          UsageError: a value that there is not.
          StageError: no such directory, unfinished, or not a data set.
        """
        if on_corrupt not in ON_CORRUPT:
            raise UsageError(f"--on_corrupt={on_corrupt}: expected {' or '.join(ON_CORRUPT)}")
        cache.check(cache_dir)
        self.directory, self.on_corrupt, self._cache_dir = directory, on_corrupt, cache_dir
        self.manifest = manifest_lib.read_manifest(directory, "preprocess", "data_dir")
        self.dataset_id: str = self.manifest["dataset_id"]
        self.image_shape: tuple[int, int, int] = tuple(self.manifest["image_shape"])
        self.splits: list[str] = list(self.manifest["splits"])

    def shards(self, split: str) -> list[dict[str, Any]]:
        """The manifest's entries of a split's shards, in order.

        Raises:
          StageError: the data set has no such split.
        """
        if split not in self.splits:
            raise StageError(
                f"split {split!r}: {self.directory} has {', '.join(self.splits)}; name one of them"
            )
        return [entry for entry in self.manifest["files"] if entry.get("split") == split]

    def num_examples(self, split: str) -> int:
        """Number of records in a split."""
        return sum(entry["num_examples"] for entry in self.shards(split))

    def has_examples(self, split: str) -> bool:
        """Whether there is such a split, and a record in it."""
        return split in self.splits and self.num_examples(split) > 0

    def read_shard(self, entry: Mapping[str, Any]) -> Shard:
        """Reads a shard whole; file checksum, record checksums and counts are checked.

        Raises:
          StageError: the shard is missing or damaged, or is another than the manifest's.
        """
        faults: list[Fault] = []
        return self._shard(list(self.records(entry, faults)), faults)

    def records(
        self, entry: Mapping[str, Any], faults: list[Fault]
    ) -> Iterator[tuple[bytes, tf_example.Record]]:
        """As `read_shard`, a record at a time: the checks are over when the last one is out.

        Args:
          entry: the shard's, of the manifest.
          faults: takes what is wrong with the file, if faults are to be quarantined.

        Yields:
          (serialized, parsed) of each record that can be had, in file order.
        """
        path = files.join(self.directory, entry["name"])
        expected = entry["num_examples"]
        try:
            data = cache.read_file(manifest_lib.read_file, self.directory, entry, self._cache_dir)
            whole = True
        except StageError:
            if self.on_corrupt == "fail":
                raise
            try:
                data, whole = files.read_bytes(path), False
            except FileNotFoundError:
                faults.append(Fault(0, "the file is missing"))
                return
        num_good = 0
        for found in parse_records(data, path, self.image_shape):
            if isinstance(found, Fault):
                faults.append(found)
                continue
            num_good += 1
            if num_good <= expected:  # The rest is counted, and refused below.
                yield found[1:]
        if self.on_corrupt == "quarantine" and not faults and num_good < expected:
            reason = f"the file ends after {num_good} of {expected} records"
            faults.append(Fault(len(data), reason))
        as_promised = num_good == expected and whole and not faults
        if not as_promised and (self.on_corrupt == "fail" or not faults):
            where = f" at byte {faults[0].offset}: {faults[0].reason}" if faults else ""
            raise StageError(
                f"{path}: is not the file that the manifest names: {num_good} records, expected "
                f"{expected} with another checksum{where}; make the data set again"
            )
        if num_good > expected:
            raise StageError(
                f"{path}: holds {num_good} records, expected {expected}; make the data set again"
            )

    def digest(self, entry: Mapping[str, Any]) -> str:
        """sha256 of a shard's file as it is now; "" if there is none."""
        try:
            data = files.read_bytes(files.join(self.directory, entry["name"]))
        except FileNotFoundError:
            return ""
        return hashlib.sha256(data).hexdigest()

    def read_split(
        self, split: str, allocate: Callable[[tuple[int, ...], type], np.ndarray] = np.empty
    ) -> tuple[np.ndarray, list[Loss]]:
        """All images of a split in the order of its shards, and what cannot be had.

        Args:
          split: which one.
          allocate: (shape, dtype) -> the array to fill.

        Returns:
          uint8 (n, H, W, C).
          A loss for each damaged shard; none unless faults are to be quarantined.
        """
        out = allocate((self.num_examples(split), *self.image_shape), np.uint8)
        filled, losses = 0, []
        for entry in self.shards(split):
            shard = self.read_shard(entry)
            out[filled : filled + len(shard.ids)] = shard.images
            filled += len(shard.ids)
            if shard.faults:
                missing = entry["num_examples"] - len(shard.ids)
                losses.append(Loss(entry["name"], missing, shard.faults))
        return out[:filled], losses

    def read_images(self, split: str) -> np.ndarray:
        """All images of a split that can be had, uint8 (n, H, W, C)."""
        return self.read_split(split)[0]

    def _shard(self, good: list[tuple[bytes, tf_example.Record]], faults: list[Fault]) -> Shard:
        pixels = np.frombuffer(b"".join(record.image for _, record in good), np.uint8)
        return Shard(
            ids=[record.id.decode() for _, record in good],
            images=pixels.reshape(-1, *self.image_shape),
            labels=np.array([record.label for _, record in good], np.int64),
            records=[serialized for serialized, _ in good],
            faults=faults,
        )


def read_head(
    directory: str, entry: Mapping[str, Any], num_records: int, image_shape: tuple[int, ...]
) -> list[tf_example.Record]:
    """The first records of a shard, about so many; no more of the file is read than they take.

    Args:
      directory: the data set's.
      entry: the shard's, of the manifest.
      num_records: how many are wanted.
      image_shape: (H, W, C).
    """
    if not entry["num_examples"]:
        return []
    path = files.join(directory, entry["name"])
    num_bytes = 2 * num_records * -(-entry["bytes"] // entry["num_examples"]) + (1 << 16)
    with files.open_read(path) as file:
        head = file.read(num_bytes)
    # The cut at the end of the head is a fault, too.
    found = (f for f in parse_records(head, path, image_shape) if not isinstance(f, Fault))
    return [record for _, _, record in itertools.islice(found, num_records)]
