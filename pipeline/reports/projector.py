"""A bundle for TensorBoard's Embedding Projector: tensors, metadata, sprite, config.

tensorboard --logdir EXPORT_DIR/projector
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.embeddings.row_sample import Sample
from pipeline.formats import png as png_lib

DIRECTORY = "projector"
# The projector's limits: points that it takes for t-SNE and UMAP, pixels a side of a sprite.
MAX_POINTS = 10_000
_MAX_SPRITE = 8_192
_MAX_SIDE = 64  # Pixels a side of a picture; more cannot be told on the screen.


class Sprite:
    """Small pictures of points, in rows of as many as there are rows."""

    def __init__(self, keys: Sequence[Any], image_shape: tuple[int, int, int]):
        """Takes what names the points, in order, and the images' shape."""
        self._places = {key: place for place, key in enumerate(keys)}
        self._columns = math.ceil(math.sqrt(max(1, len(keys))))
        height, width, channels = image_shape
        side = min(_MAX_SIDE, _MAX_SPRITE // self._columns)
        scale = min(1.0, side / max(height, width))
        self.size = max(1, round(height * scale)), max(1, round(width * scale))
        shape = (self._columns * self.size[0], self._columns * self.size[1])
        self._pixels = np.zeros((*shape, 3 if channels == 3 else 1), np.uint8)

    def add(self, key: Any, image: np.ndarray) -> None:
        """Puts an image, uint8 (H, W, C), where its point is; nothing if there is none."""
        from PIL import Image

        place = self._places.get(key)
        if place is None:
            return
        image = image if image.shape[-1] == 3 else image[..., :1]
        height, width = self.size
        if image.shape[:2] != self.size:
            picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
            small = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
            image = small.reshape(height, width, -1)
        row, column = divmod(place, self._columns)
        top, left = row * height, column * width
        self._pixels[top : top + height, left : left + width] = image

    def png(self) -> bytes:
        """The sprite."""
        return png_lib.png(self._pixels)


def files(sample: Sample, names: Mapping[int, str], sprite: Sprite | None) -> dict[str, bytes]:
    """The bundle's files: name -> bytes.

    Args:
      sample: at most MAX_POINTS rows with means.
      names: label -> class name.
      sprite: with a picture for each row, if there are pictures.
    """
    rows = sample.rows
    tensors = "".join(
        "\t".join(f"{x:.7g}" for x in mean) + "\n" for mean in rows.columns["mean"].tolist()
    )
    lines = ["class\tid\tlabel\n"]
    for record_id, label in zip(rows.ids, rows.labels.tolist(), strict=True):
        name = names.get(label, str(label))
        lines.append(f"{_field(name)}\t{_field(record_id)}\t{label}\n")
    config = ['embeddings {', '  tensor_name: "mean"', '  tensor_path: "tensors.tsv"',
              '  metadata_path: "metadata.tsv"']  # fmt: skip
    made = {"tensors.tsv": tensors.encode(), "metadata.tsv": "".join(lines).encode()}
    if sprite:
        height, width = sprite.size
        config += ['  sprite {', '    image_path: "sprite.png"',
                   f"    single_image_dim: [{width}, {height}]", "  }"]  # fmt: skip
        made["sprite.png"] = sprite.png()
    made["projector_config.pbtxt"] = ("\n".join([*config, "}"]) + "\n").encode()
    return made


def _field(text: str) -> str:
    """A text from outside in a line of tab-separated fields."""
    return "".join(c if c.isprintable() else "�" for c in text)
