"""Shard files: their names, TFRecord framing with checksums, and a data set read back.

A TFRecord is: length (uint64), masked crc32c of the length, data, masked crc32c
of the data; all numbers little-endian. Source of the format:
tensorflow/core/lib/io/record_writer.h.
"""

import functools
import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from pipeline import examples, stage, storage
from pipeline.errors import StageError

_FRAME = struct.Struct("<QI")
_CRC = struct.Struct("<I")


def shard_name(name: str, split: str, shard: int, num_shards: int) -> str:
    """File name of a shard, as TensorFlow Datasets spells it."""
    return f"{name}-{split}.tfrecord-{shard:05d}-of-{num_shards:05d}"


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.lru_cache(maxsize=4096)
def _frame_header(length: int) -> bytes:
    packed = struct.pack("<Q", length)
    return packed + _CRC.pack(_masked_crc(packed))


def write_shard(directory: str, name: str, records: Iterable[bytes]) -> dict[str, Any]:
    """Writes a shard file atomically.

    Args:
      directory: local path or fsspec URL.
      name: the file's name.
      records: serialized tf.Examples, in order.

    Returns:
      The file's entry: name, bytes, sha256, num_examples.
    """
    digest, num_bytes, num_examples = hashlib.sha256(), 0, 0
    with storage.publishing(storage.join(directory, name)) as file:
        for record in records:
            framed = b"".join((_frame_header(len(record)), record, _CRC.pack(_masked_crc(record))))
            file.write(framed)
            digest.update(framed)
            num_bytes += len(framed)
            num_examples += 1
    return {
        "name": name,
        "bytes": num_bytes,
        "sha256": digest.hexdigest(),
        "num_examples": num_examples,
    }


def split_records(data: bytes, path: str) -> Iterator[bytes]:
    """The records in the bytes of a TFRecord file; every checksum is checked.

    Args:
      data: the whole file.
      path: its name, for error messages.

    Raises:
      StageError: the file ends inside a record, or a checksum is wrong.
    """
    offset = 0
    while offset < len(data):
        start = offset + _FRAME.size
        length, length_crc = (
            _FRAME.unpack_from(data, offset) if start <= len(data) else (len(data), -1)
        )
        end = start + length
        if length_crc == -1 or end + _CRC.size > len(data):
            raise StageError(
                f"{path}: the record at byte {offset} runs past the end of the file "
                f"({len(data)} bytes); make the data set again"
            )
        record = data[start:end]
        if _masked_crc(data[offset : offset + 8]) != length_crc or (
            _masked_crc(record) != _CRC.unpack_from(data, end)[0]
        ):
            raise StageError(
                f"{path}: the checksum of the record at byte {offset} is wrong; "
                "make the data set again"
            )
        yield record
        offset = end + _CRC.size


class Shard(NamedTuple):
    """One shard in memory: n records in file order."""

    ids: list[str]
    images: np.ndarray  # (n, H, W, C) uint8
    labels: np.ndarray  # (n,) int64
    records: list[bytes]  # the serialized tf.Examples


class Dataset:
    """A finished data set directory, opened for reading."""

    def __init__(self, directory: str):
        """Reads the manifest.

        Args:
          directory: the output directory of preprocess; local path or fsspec URL.

        Raises:
          StageError: no such directory, unfinished, or not a data set.
        """
        self.directory = directory
        self.manifest = stage.read_manifest(directory, "preprocess", "data_dir")
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

    def read_shard(self, entry: Mapping[str, Any]) -> Shard:
        """Reads a shard whole; file checksum, record checksums and counts are checked.

        Raises:
          StageError: the shard is missing or damaged.
        """
        path = storage.join(self.directory, entry["name"])
        records = list(split_records(stage.read_file(self.directory, entry), path))
        try:
            parsed = [examples.parse(record) for record in records]
        except ValueError as error:
            raise StageError(f"{path}: holds {error}; make the data set again") from error
        pixels = np.frombuffer(b"".join(record.image for record in parsed), np.uint8)
        if len(parsed) != entry["num_examples"] or pixels.size != len(parsed) * np.prod(
            self.image_shape
        ):
            raise StageError(
                f"{path}: holds {len(parsed)} records with {pixels.size} pixels; the manifest "
                f"says {entry['num_examples']} of {self.image_shape}; make the data set again"
            )
        return Shard(
            ids=[record.id.decode() for record in parsed],
            images=pixels.reshape(-1, *self.image_shape),
            labels=np.array([record.label for record in parsed], np.int64),
            records=records,
        )

    def read_images(self, split: str) -> np.ndarray:
        """All images of a split in the order of its shards, uint8 (n, H, W, C)."""
        out = np.empty((self.num_examples(split), *self.image_shape), np.uint8)
        filled = 0
        for entry in self.shards(split):
            images = self.read_shard(entry).images
            out[filled : filled + len(images)] = images
            filled += len(images)
        return out


def tfds_files(
    *,
    name: str,
    image_shape: Sequence[int],
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, bytes]:
    """The two files by which `tfds.builder_from_directory` reads the directory.

    Args:
      name: the data set's name.
      image_shape: (H, W, C).
      splits: for each split the entries of its shards, in order.

    Returns:
      File name -> contents.
    """

    def tensor(shape: Sequence[int], dtype: str, kind: str, encoding: str = "none") -> dict:
        return {
            "pythonClassName": f"tensorflow_datasets.core.features.{kind}",
            "tensor": {
                "shape": {"dimensions": [str(size) for size in shape]},
                "dtype": dtype,
                "encoding": encoding,
            },
        }

    features = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                "id": tensor((), "string", "tensor_feature.Tensor"),
                "image": tensor(image_shape, "uint8", "tensor_feature.Tensor", "bytes"),
                "label": tensor((), "int64", "scalar.Scalar"),
            }
        },
    }
    dataset_info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": split,
                "numBytes": str(sum(entry["bytes"] for entry in entries)),
                "shardLengths": [str(entry["num_examples"]) for entry in entries],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, entries in splits.items()
        ],
    }
    return {
        "dataset_info.json": (json.dumps(dataset_info, indent=2) + "\n").encode(),
        "features.json": (json.dumps(features, indent=2) + "\n").encode(),
    }
