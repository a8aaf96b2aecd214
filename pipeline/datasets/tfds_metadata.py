"""The two files by which `tfds.builder_from_directory` reads a data set directory."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.datasets.reader import shard_number


def tfds_files(
    *,
    name: str,
    image_shape: Sequence[int],
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    num_shards: Mapping[str, int],
) -> dict[str, bytes]:
    """`dataset_info.json` and `features.json`.

    Args:
      name: the data set's name.
      image_shape: (H, W, C).
      splits: split -> manifest entries of its shards, in order.
      num_shards: split -> number of shards in the file names, without appended shards.

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

    def lengths(entries: Sequence[Mapping[str, Any]]) -> list[str]:
        """By number; a number whose shard was written again has no file, and no record."""
        by_number = {shard_number(entry["name"]): entry["num_examples"] for entry in entries}
        return [str(by_number.get(number, 0)) for number in range(max(by_number) + 1)]

    def template(split: str, entries: Sequence[Mapping[str, Any]]) -> str:
        number = "{SHARD_X_OF_Y}"
        if len(lengths(entries)) != num_shards[split]:
            number = f"{{SHARD_INDEX}}-of-{num_shards[split]:05d}"
        return "{DATASET}-{SPLIT}.{FILEFORMAT}-" + number

    dataset_info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": split,
                "numBytes": str(sum(entry["bytes"] for entry in entries)),
                "shardLengths": lengths(entries),
                "filepathTemplate": template(split, entries),
            }
            for split, entries in splits.items()
        ],
    }
    return {
        "dataset_info.json": (json.dumps(dataset_info, indent=2) + "\n").encode(),
        "features.json": (json.dumps(features, indent=2) + "\n").encode(),
    }
