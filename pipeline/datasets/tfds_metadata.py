"""The files by which `tfds.builder_from_directory` reads a data set directory."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.datasets.reader import shard_number

_CLASSES = "label.labels.txt"  # tensorflow-datasets derives the name from the feature's.
NAMES = ("dataset_info.json", "features.json", _CLASSES)


def tfds_files(
    *,
    name: str,
    image_shape: Sequence[int],
    class_names: Sequence[str],
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    num_shards: Mapping[str, int],
) -> dict[str, bytes]:
    """The files of NAMES; without classes no label.labels.txt.

    With `as_supervised=True` tensorflow-datasets reads (image, label) of every set; the label is -1
    for a record without one.

    Args:
      name: the data set's name.
      image_shape: (H, W, C).
      class_names: class_names[i] is the name of label i.
      splits: split -> manifest entries of its shards, in order.
      num_shards: split -> number of shards in the file names, without appended shards.

    Returns:
      File name -> contents.
    """

    def feature(kind: str, key: str, content: Mapping[str, Any]) -> dict[str, Any]:
        return {"pythonClassName": f"tensorflow_datasets.core.features.{kind}", key: content}

    def tensor(shape: Sequence[int], dtype: str, encoding: str) -> dict[str, Any]:
        dimensions = {"dimensions": [str(size) for size in shape]}
        content = {"shape": dimensions, "dtype": dtype, "encoding": encoding}
        return feature("tensor_feature.Tensor", "tensor", content)

    num_classes = {"numClasses": str(len(class_names))}
    by_name = {
        "id": tensor((), "string", "none"),
        "image": tensor(image_shape, "uint8", "bytes"),
        "label": feature("class_label_feature.ClassLabel", "classLabel", num_classes),
    }
    features = feature("features_dict.FeaturesDict", "featuresDict", {"features": by_name})

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
        "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
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
    contents = {
        "dataset_info.json": (json.dumps(dataset_info, indent=2) + "\n").encode(),
        "features.json": (json.dumps(features, indent=2) + "\n").encode(),
    }
    if class_names:
        contents[_CLASSES] = "".join(f"{_line(name)}\n" for name in class_names).encode()
    return contents


def _line(class_name: str) -> str:
    """A class name as tensorflow-datasets reads it back from a line.

    It strips each line, drops empty ones and refuses a set with two equal names. A name that would
    not survive becomes JSON text, as does a name that looks like that. So names stay distinct.
    """
    is_line = class_name.splitlines() == [class_name] == [class_name.strip()]
    is_plain = is_line and class_name[0] != '"'
    try:
        class_name.encode()
    except UnicodeEncodeError:  # Half a character, which JSON can hold.
        is_plain = False
    return class_name if is_plain else json.dumps(class_name)
