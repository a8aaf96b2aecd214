"""Files for TensorBoard's Embedding Projector: tensors, metadata, sprite, config.

tensorboard --logdir EXPORT_DIR/projector
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.embeddings.comparison.row_sample import Sample
from pipeline.formats import png as png_lib
from pipeline.formats.tf_example import UNLABELLED

DIRECTORY = "projector"
# Limits of the projector: points for t-SNE and UMAP, pixels of a side of a sprite.
MAX_POINTS = 10_000
_MAX_SPRITE = 8_192
_MAX_SIDE = 64  # Pixels of a side of a picture; the screen shows no more detail.


class Sprite:
    """Small pictures of all points in a square grid."""

    def __init__(
        self,
        keys: Sequence[Any],
        image_shape: tuple[int, int, int],
        *,
        max_side: int = _MAX_SIDE,
    ):
        """Makes an empty sprite.

        Args:
          keys: a unique key for each point, in order.
          image_shape: of the images that `add` takes.
          max_side: pixels of the longer side of a picture, at most.
        """
        self._indices = {key: i for i, key in enumerate(keys)}
        self.missing = set(self._indices.values())  # Points without a picture.
        self.columns = math.ceil(math.sqrt(max(1, len(keys))))
        height, width, channels = image_shape
        side = min(max_side, _MAX_SPRITE // self.columns)
        scale = min(1.0, side / max(height, width))
        self.size = max(1, round(height * scale)), max(1, round(width * scale))
        shape = (self.columns * self.size[0], self.columns * self.size[1])
        self.pixels = np.zeros((*shape, 3 if channels == 3 else 1), np.uint8)

    def add(self, key: Any, image: np.ndarray) -> None:
        """Puts an image, uint8 (H, W, C), into the cell of its point; ignores unknown keys."""
        from PIL import Image

        index = self._indices.get(key)
        if index is None:
            return
        self.missing.discard(index)
        image = image if image.shape[-1] == 3 else image[..., :1]
        height, width = self.size
        if image.shape[:2] != self.size:
            picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
            small = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
            image = small.reshape(height, width, -1)
        row, column = divmod(index, self.columns)
        top, left = row * height, column * width
        self.pixels[top : top + height, left : left + width] = image

    def png(self) -> bytes:
        """The sprite as PNG."""
        return png_lib.png(self.pixels)


def files(
    sample: Sample, class_names: Mapping[int, str], sprite: Sprite | None
) -> dict[str, bytes]:
    """The files: name -> bytes.

    Args:
      sample: at most MAX_POINTS rows with means.
      class_names: label -> class name.
      sprite: a picture of each row, or None.
    """
    rows = sample.rows
    tensors = "".join(
        "\t".join(f"{x:.7g}" for x in mean) + "\n" for mean in rows.columns["mean"].tolist()
    )
    lines = ["class\tid\tlabel\n"]
    for record_id, label in zip(rows.ids, rows.labels.tolist(), strict=True):
        name = class_names.get(label, "unlabelled" if label == UNLABELLED else str(label))
        lines.append(f"{_field(name)}\t{_field(record_id)}\t{label}\n")
    config = ['embeddings {', '  tensor_name: "mean"', '  tensor_path: "tensors.tsv"',
              '  metadata_path: "metadata.tsv"']  # fmt: skip
    contents = {"tensors.tsv": tensors.encode(), "metadata.tsv": "".join(lines).encode()}
    if sprite:
        height, width = sprite.size
        config += ['  sprite {', '    image_path: "sprite.png"',
                   f"    single_image_dim: [{width}, {height}]", "  }"]  # fmt: skip
        contents["sprite.png"] = sprite.png()
    contents["projector_config.pbtxt"] = ("\n".join([*config, "}"]) + "\n").encode()
    return contents


def _field(text: str) -> str:
    """Escapes a text for a line of tab-separated fields."""
    return "".join(c if c.isprintable() else "�" for c in text)
