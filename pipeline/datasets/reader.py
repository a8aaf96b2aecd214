"""Reads a finished data set: its manifest, its shards, its records."""

import contextlib
import hashlib
import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.formats import tf_example, tfrecord
from pipeline.formats.tfrecord import Fault
from pipeline.stages import gate
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import cache, files

# What a reader does with a damaged shard.
ON_CORRUPT = ("fail", "quarantine")
_NUMBER = re.compile(r"-(\d+)-of-\d+")


def shard_name(name: str, split: str, shard: int, num_shards: int, compression: str) -> str:
    """File name of a shard, in the format of TensorFlow Datasets.

    Appended shards have the numbers `num_shards` and up.
    """
    suffix = tfrecord.suffix(compression)
    return f"{name}-{split}.tfrecord-{shard:05d}-of-{num_shards:05d}{suffix}"


def shard_number(name: str) -> int:
    """The number in a shard's file name."""
    return int(_NUMBER.findall(name)[-1])


class DamagedShard(NamedTuple):
    """A shard with unreadable records."""

    name: str  # The shard's file.
    num_records: int  # Unreadable records.
    faults: list[Fault]

    def lines(self, directory: str) -> list[dict[str, Any]]:
        """The faults as JSON objects for quarantine."""
        path = files.join(directory, self.name)
        return [
            {"where": f"{path} byte {offset}", "offset": offset, "reason": reason}
            for offset, reason in self.faults
        ]


class Shard(NamedTuple):
    """One shard in memory: n records in file order, and the faults of the file."""

    ids: list[str]
    images: np.ndarray  # (n, H, W, C) uint8
    labels: np.ndarray  # (n,) int64
    records: list[bytes]  # the serialized tf.Examples
    faults: list[Fault]  # empty unless on_corrupt is "quarantine"


def parse_records(
    data: bytes, path: str, image_shape: tuple[int, ...]
) -> Iterator[tuple[int, bytes, tf_example.Record] | Fault]:
    """Parses a shard's bytes into records and faults.

    Yields:
      (offset, serialized, parsed), or a Fault; in the order of offsets.
    """
    num_pixels = int(np.prod(image_shape))
    for item in tfrecord.scan(data, path):
        if isinstance(item, Fault):
            yield item
            continue
        offset, serialized = item
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

    def __init__(
        self,
        directory: str,
        *,
        on_corrupt: str = "fail",
        cache_dir: str | None = None,
        allow_rejected: bool = False,
    ):
        """Reads the manifest.

        Args:
          directory: the output directory of preprocess; local path or fsspec URL.
          on_corrupt: "fail" to refuse a damaged shard, "quarantine" to skip unreadable records
            and list them in `Shard.faults`.
          cache_dir: local directory that keeps the shards of a URL; see storage/cache.py.
          allow_rejected: whether to open a data set that --require has rejected.

        Raises:
          UsageError: on_corrupt is neither.
          gate.Rejected: the data set was rejected.
          StageError: no such directory, unfinished, or not a data set.
        """
        if on_corrupt not in ON_CORRUPT:
            raise UsageError(f"--on_corrupt={on_corrupt}: expected {' or '.join(ON_CORRUPT)}")
        cache.check(cache_dir)
        self.directory, self.on_corrupt, self._cache_dir = directory, on_corrupt, cache_dir
        self.manifest = manifest_lib.read_manifest(directory, "preprocess", "--data_dir")
        if not allow_rejected:
            gate.refuse(directory, self.manifest)
        self.dataset_id: str = self.manifest["dataset_id"]
        self.image_shape: tuple[int, int, int] = tuple(self.manifest["image_shape"])
        self.splits: list[str] = list(self.manifest["splits"])

    def shards(self, split: str) -> list[dict[str, Any]]:
        """The manifest entries of a split's shards, in order.

        Raises:
          UsageError: the data set has no such split.
        """
        if split not in self.splits:
            raise UsageError(
                f"--split={split}: {self.directory} has {', '.join(self.splits)}; name one of them"
            )
        return [entry for entry in self.manifest["files"] if entry.get("split") == split]

    def num_examples(self, split: str) -> int:
        """Number of records in a split."""
        return sum(entry["num_examples"] for entry in self.shards(split))

    def has_examples(self, split: str) -> bool:
        """Whether the split exists and holds a record."""
        return split in self.splits and self.num_examples(split) > 0

    def read_shard(self, entry: Mapping[str, Any]) -> Shard:
        """Reads a shard, and checks the file's sha256, the records' checksums and their number.

        Raises:
          StageError: the shard is missing, damaged, or not the file in the manifest.
        """
        faults: list[Fault] = []
        return self._shard(list(self.records(entry, faults)), faults)

    def records(
        self, entry: Mapping[str, Any], faults: list[Fault]
    ) -> Iterator[tuple[bytes, tf_example.Record]]:
        """As `read_shard`, record by record; the checks end after the last record.

        Args:
          entry: the shard's manifest entry.
          faults: receives the file's faults if on_corrupt is "quarantine".

        Yields:
          (serialized, parsed) of each readable record, in file order.
        """
        path = files.join(self.directory, entry["name"])
        expected = entry["num_examples"]
        try:
            data = cache.read_file(manifest_lib.read_file, self.directory, entry, self._cache_dir)
            is_intact = True
        except StageError:
            self._refuse_outdated(entry)
            if self.on_corrupt == "fail":
                raise
            try:
                data, is_intact = files.read_bytes(path), False
            except FileNotFoundError:
                faults.append(Fault(0, "the file is missing"))
                return
        num_good = 0
        for item in parse_records(data, path, self.image_shape):
            if isinstance(item, Fault):
                faults.append(item)
                continue
            num_good += 1
            if num_good <= expected:  # Further records are counted, and refused below.
                yield item[1:]
        if self.on_corrupt == "quarantine" and not faults and num_good < expected:
            reason = f"the file ends after {num_good} of {expected} records"
            faults.append(Fault(len(data), reason))
        matches_manifest = num_good == expected and is_intact and not faults
        if not matches_manifest and (self.on_corrupt == "fail" or not faults):
            where = f" at byte {faults[0].offset}: {faults[0].reason}" if faults else ""
            raise StageError(
                f"{path}: is not the file in the manifest: {num_good} records, expected {expected} "
                f"and another checksum{where}; create the data set again"
            )
        if num_good > expected:
            raise StageError(
                f"{path}: holds {num_good} records, expected {expected}; create the data set again"
            )

    def _refuse_outdated(self, entry: Mapping[str, Any]) -> None:
        """Raises a StageError if the manifest, read again, does not name a shard any more."""
        manifest = manifest_lib.read_manifest(self.directory, "preprocess", "--data_dir")
        if all(entry["name"] != current["name"] for current in manifest["files"]):
            raise StageError(
                f"{files.join(self.directory, entry['name'])}: records were removed or replaced "
                f"since this job has read the manifest: the data set is {manifest['dataset_id']} "
                f"now, and was {self.dataset_id}; run the same command again"
            )

    def digest(self, entry: Mapping[str, Any]) -> str:
        """sha256 of a shard's current file; "" if the file is missing."""
        try:
            data = files.read_bytes(files.join(self.directory, entry["name"]))
        except FileNotFoundError:
            return ""
        return hashlib.sha256(data).hexdigest()

    def read_split(
        self, split: str, allocate: Callable[[tuple[int, ...], type], np.ndarray] = np.empty
    ) -> tuple[np.ndarray, list[DamagedShard]]:
        """All readable images of a split in the order of its shards, and the damaged shards.

        Args:
          split: name of the split.
          allocate: (shape, dtype) -> the array to fill.

        Returns:
          uint8 (n, H, W, C).
          The damaged shards; empty unless on_corrupt is "quarantine".
        """
        images = allocate((self.num_examples(split), *self.image_shape), np.uint8)
        num_images, damaged_shards = 0, []
        for entry in self.shards(split):
            shard = self.read_shard(entry)
            images[num_images : num_images + len(shard.ids)] = shard.images
            num_images += len(shard.ids)
            if shard.faults:
                num_lost = entry["num_examples"] - len(shard.ids)
                damaged_shards.append(DamagedShard(entry["name"], num_lost, shard.faults))
        return images[:num_images], damaged_shards

    def read_images(self, split: str) -> np.ndarray:
        """All readable images of a split, uint8 (n, H, W, C)."""
        return self.read_split(split)[0]

    def read_head(self, split: str, num_records: int) -> list[tf_example.Record]:
        """The first readable records of a split, a random sample since hashes order a shard.

        Args:
          split: name of the split.
          num_records: the most records to read.
        """
        records: list[tf_example.Record] = []
        for entry in self.shards(split):
            if num_left := num_records - len(records):
                with contextlib.suppress(FileNotFoundError):  # A damaged shard may be skipped.
                    records += read_head(self.directory, entry, num_left, self.image_shape)
        return records

    def _shard(self, records: list[tuple[bytes, tf_example.Record]], faults: list[Fault]) -> Shard:
        pixels = np.frombuffer(b"".join(record.image for _, record in records), np.uint8)
        return Shard(
            ids=[record.id.decode() for _, record in records],
            images=pixels.reshape(-1, *self.image_shape),
            labels=np.array([record.label for _, record in records], np.int64),
            records=[serialized for serialized, _ in records],
            faults=faults,
        )


def read_head(
    directory: str, entry: Mapping[str, Any], num_records: int, image_shape: tuple[int, ...]
) -> list[tf_example.Record]:
    """The first records of a shard, without reading the whole file.

    Args:
      directory: the data set's directory.
      entry: the shard's manifest entry.
      num_records: requested number of records; records of unequal size may make it fewer.
      image_shape: (H, W, C).
    """
    if not entry["num_examples"]:
        return []
    path = files.join(directory, entry["name"])
    num_bytes = 2 * num_records * -(-entry["bytes"] // entry["num_examples"]) + (1 << 16)
    with files.open_read(path) as file:
        head = file.read(num_bytes)
    # The record cut off at the end of the head is a fault, too.
    items = parse_records(head, path, image_shape)
    parsed = (item for item in items if not isinstance(item, Fault))
    return [record for _, _, record in itertools.islice(parsed, num_records)]


# Bytes that a range read of a store fetches: below as many a record, the whole file is read.
_RANGE_BYTES = 1 << 20


def read_records(
    directory: str, entry: Mapping[str, Any], offsets: Sequence[int]
) -> Iterator[tf_example.Record]:
    """Records of a shard at places that the shard's index gives, and not the whole file.

    Args:
      directory: the data set's directory.
      entry: the shard's manifest entry.
      offsets: of the records' frames in the unpacked file.

    Raises:
      StageError: no record is there.
    """
    path = files.join(directory, entry["name"])
    is_packed = tfrecord.is_packed(entry["name"])
    if is_packed or files.is_url(path) and len(offsets) * _RANGE_BYTES > entry["bytes"]:
        file: BinaryIO = io.BytesIO(tfrecord.unpacked(files.read_bytes(path), entry["name"]))
    else:
        file = files.open_read(path)
    with file:
        for offset in offsets:
            try:
                yield tf_example.parse(tfrecord.read_at(file, int(offset)))
            except ValueError as error:
                raise StageError(
                    f"{path} byte {offset}: {error}; expected the record that the index names: "
                    "find the fault with python -m pipeline.verify"
                ) from error


def read_ids(directory: str, entry: Mapping[str, Any], offsets: np.ndarray) -> list[str]:
    """The ids of `read_records`."""
    if not len(offsets):
        return []
    return [record.id.decode() for record in read_records(directory, entry, offsets.tolist())]
