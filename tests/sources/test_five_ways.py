"""The same digits as IDX, npz, CSV, folder and Parquet: same pixels and labels in each split."""

import collections
import csv
import io

import numpy as np
import pytest
from PIL import Image

from pipeline.sources import open_source
from tests.conftest import make_shards, write_idx
from tests.sources.test_sources import records_in

NUM_TRAIN, NUM_TEST = 240, 60


def digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> images (n, 28, 28) and labels (n,) of the embedded digits."""
    images, labels = open_source("sample").read(np.arange(NUM_TRAIN + NUM_TEST))
    images, labels = images[..., 0], labels.astype(np.uint8)
    return {
        "train": (images[:NUM_TRAIN], labels[:NUM_TRAIN]),
        "test": (images[NUM_TRAIN:], labels[NUM_TRAIN:]),
    }


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def as_idx(directory) -> str:
    for split, (images, labels) in digits().items():
        write_idx(directory / f"{split}-images-idx3-ubyte", images)
        write_idx(directory / f"{split}-labels-idx1-ubyte", labels)
    return f"idx:{directory}"


def as_npz(directory) -> str:
    arrays = {}
    for split, (images, labels) in digits().items():
        arrays |= {f"x_{split}": images, f"y_{split}": labels}
    np.savez_compressed(directory / "set.npz", **arrays)
    return f"npz:{directory}/set.npz"


def as_csv(directory) -> str:
    for split, (images, labels) in digits().items():
        with open(directory / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["label", *(f"pixel{i}" for i in range(28 * 28))])
            writer.writerows(np.c_[labels, images.reshape(len(images), -1)].tolist())
    return f"csv:{directory}"


def as_folder(directory) -> str:
    for split, (images, labels) in digits().items():
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = directory / split / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    return f"folder:{directory}"


def as_parquet(directory) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, (images, labels) in digits().items():
        column = pa.array([{"bytes": png(image), "path": None} for image in images], kind)
        table = pa.table({"image": column, "label": pa.array(labels.tolist(), pa.int64())})
        pq.write_table(table, directory / f"{split}-00000-of-00001.parquet")
    return f"parquet:{directory}"


@pytest.mark.parametrize("make", [as_idx, as_npz, as_csv, as_folder, as_parquet])
def test_the_same_pixels_and_labels_are_in_the_same_splits(tmp_path, make):
    (tmp_path / "set").mkdir()
    manifest = make_shards(
        make(tmp_path / "set"), tmp_path / "out", validation_fraction=0, num_shards=1
    )
    assert manifest["class_names"] == list("0123456789")
    expected = {
        split: collections.Counter(
            (image.tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True)
        )
        for split, (images, labels) in digits().items()
    }
    found = records_in(tmp_path / "out")
    assert {
        split: collections.Counter(record[1:] for record in records)
        for split, records in found.items()
    } == expected
