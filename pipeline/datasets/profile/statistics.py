"""Statistics of a split: exact integer counts and sums.

Integer sums do not depend on their order, so any runner gives the same statistics to the last
digit.
"""

import collections
import io
import json
import math
from typing import Any

import numpy as np

from pipeline.formats.tf_example import UNLABELLED

# Largest height or width of a mean image; larger images are sampled at every n-th pixel.
_MEAN_SIDE = 64
# Mean images are kept for the first labels only, to bound their memory.
MAX_MEAN_IMAGES = 100


class Statistics:
    """Statistics of records with one image shape; `+=` adds the statistics of other records."""

    def __init__(self, image_shape: tuple[int, ...]):
        """`image_shape` is (H, W, C)."""
        height, width, channels = image_shape
        self._step = -(-max(height, width) // _MEAN_SIDE)
        small = np.empty(image_shape, np.bool_)[:: self._step, :: self._step].shape
        self.image_shape = tuple(image_shape)
        self.label_counts: collections.Counter[int] = collections.Counter()
        self.num_blank = 0  # Images whose pixels all have one value.
        self.sums = np.zeros(channels, np.int64)
        self.squares = np.zeros(channels, np.int64)
        self.minimum, self.maximum = 255, 0
        self.image_sum = np.zeros(small, np.int64)
        self.label_sums: dict[int, np.ndarray] = {}

    def add(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Adds records.

        Args:
          images: uint8 (n, H, W, C).
          labels: int64 (n,).
        """
        if not len(images):
            return
        flat = images.reshape(len(images), -1)
        self.num_blank += int((flat == flat[:, :1]).all(axis=1).sum())
        self.minimum = min(self.minimum, int(images.min()))
        self.maximum = max(self.maximum, int(images.max()))
        for channel in range(images.shape[3]):
            values = images[..., channel].astype(np.uint16)
            self.sums[channel] += values.sum(dtype=np.int64)
            self.squares[channel] += (values * values).sum(dtype=np.int64)  # 255² fits 16 bits.
        small = images[:, :: self._step, :: self._step]
        for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
            self.label_counts[int(label)] += int(count)
            # A matrix product would use every core in each worker.
            total = small[labels == label].sum(axis=0, dtype=np.int64)
            self.image_sum += total
            if 0 <= label < MAX_MEAN_IMAGES:
                self.label_sums[int(label)] = self.label_sums.get(int(label), 0) + total

    def __iadd__(self, other: "Statistics") -> "Statistics":
        self.label_counts.update(other.label_counts)
        self.num_blank += other.num_blank
        self.sums += other.sums
        self.squares += other.squares
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        self.image_sum += other.image_sum
        for label, image in other.label_sums.items():
            self.label_sums[label] = self.label_sums.get(label, 0) + image
        return self

    def __isub__(self, other: "Statistics") -> "Statistics":
        """Takes out the statistics of records that were added; minimum and maximum stay."""
        self.label_counts -= other.label_counts  # Drops counts of 0.
        self.num_blank -= other.num_blank
        self.sums -= other.sums
        self.squares -= other.squares
        self.image_sum -= other.image_sum
        for label, image in other.label_sums.items():
            self.label_sums[label] = self.label_sums[label] - image
            if not self.label_counts[label]:
                del self.label_sums[label]
        return self

    @property
    def num_examples(self) -> int:
        """Number of records added."""
        return sum(self.label_counts.values())

    @property
    def num_unlabelled(self) -> int:
        """Number of records without a label."""
        return self.label_counts[UNLABELLED]

    def mean_image(self, label: int | None = None) -> np.ndarray | None:
        """Mean of all images, or of a label's images: uint8 (h, w, C); None if there are none."""
        count = self.num_examples if label is None else self.label_counts[label]
        total = self.image_sum if label is None else self.label_sums.get(label)
        if not count or total is None:
            return None
        return ((total + count // 2) // count).astype(np.uint8)

    def summary(self, class_names: list[str]) -> dict[str, Any]:
        """The split's entry in statistics.json.

        Args:
          class_names: class_names[i] is the name of label i; other labels are named by number.
        """
        num_values = self.num_examples * self.image_shape[0] * self.image_shape[1]
        sums, squares = self.sums.tolist(), self.squares.tolist()
        # Integers up to the last step give the same digits everywhere.
        variances = [
            max(0, num_values * square - total * total)
            for total, square in zip(sums, squares, strict=True)
        ]
        names = dict(enumerate(class_names))
        return {
            "num_examples": self.num_examples,
            "num_per_class": {name: self.label_counts[label] for label, name in names.items()},
            "num_outside_classes": {
                str(label): count
                for label, count in sorted(self.label_counts.items())
                if label not in names and label != UNLABELLED
            },
            **({"num_unlabelled": self.num_unlabelled} if self.num_unlabelled else {}),
            "mean_per_channel": [round(total / num_values, 6) for total in sums]
            if num_values
            else None,
            "std_per_channel": [
                round(math.sqrt(variance) / num_values, 6) for variance in variances
            ]
            if num_values
            else None,
            "min": self.minimum if num_values else None,
            "max": self.maximum if num_values else None,
            "num_blank": self.num_blank,
        }

    def to_bytes(self) -> bytes:
        """The serialized statistics; `from_bytes` reads them."""
        numbers = {
            "image_shape": self.image_shape,
            "label_counts": sorted(self.label_counts.items()),
            "num_blank": self.num_blank,
            "minimum": self.minimum,
            "maximum": self.maximum,
        }
        labels = sorted(self.label_sums)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            numbers=np.frombuffer(json.dumps(numbers).encode(), np.uint8),
            sums=self.sums,
            squares=self.squares,
            image_sum=self.image_sum,
            labels=np.array(labels, np.int64),
            label_sums=np.array([self.label_sums[label] for label in labels], np.int64),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Statistics":
        """Reads the output of `to_bytes`."""
        with np.load(io.BytesIO(data)) as arrays:
            numbers = json.loads(arrays["numbers"].tobytes())
            statistics = cls(numbers["image_shape"])
            statistics.label_counts.update(dict(numbers["label_counts"]))
            statistics.num_blank = numbers["num_blank"]
            statistics.minimum, statistics.maximum = numbers["minimum"], numbers["maximum"]
            statistics.sums, statistics.squares = arrays["sums"], arrays["squares"]
            statistics.image_sum = arrays["image_sum"]
            labels = arrays["labels"].tolist()
            statistics.label_sums = dict(zip(labels, arrays["label_sums"], strict=True))
        return statistics
