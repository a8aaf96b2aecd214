"""Files for TensorBoard's Embedding Projector: tensors, metadata, sprite, config.

    tensorboard --logdir EXPORT_DIR/projector
    tensorboard --logdir WORKDIR/tensorboard

TensorBoard looks for the config in the directory of the log, or beside a run's events.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
    ids: Sequence[str],
    labels: np.ndarray,
    means: np.ndarray,
    *,
    class_names: Mapping[int, str],
    sprite: Sprite | None,
    directory: str = "",
) -> dict[str, bytes]:
    """The files: name -> bytes.

    Args:
      ids: n ids of records, n at most MAX_POINTS.
      labels: int64 (n,).
      means: float32 (n, latent_dim).
      class_names: label -> class name.
      sprite: a picture of each record, or None.
      directory: of the files that the config names, below the config's; ends with "/" or is empty.
    """
    tensors = "".join("\t".join(f"{x:.7g}" for x in mean) + "\n" for mean in means.tolist())
    lines = ["class\tid\tlabel\n"]
    for record_id, label in zip(ids, labels.tolist(), strict=True):
        name = class_names.get(label, "unlabelled" if label == UNLABELLED else str(label))
        lines.append(f"{_field(name)}\t{_field(record_id)}\t{label}\n")
    config = ["embeddings {", '  tensor_name: "mean"', f'  tensor_path: "{directory}tensors.tsv"',
              f'  metadata_path: "{directory}metadata.tsv"']  # fmt: skip
    contents = {
        f"{directory}tensors.tsv": tensors.encode(),
        f"{directory}metadata.tsv": "".join(lines).encode(),
    }
    if sprite:
        height, width = sprite.size
        config += ["  sprite {", f'    image_path: "{directory}sprite.png"',
                   f"    single_image_dim: [{width}, {height}]", "  }"]  # fmt: skip
        contents[f"{directory}sprite.png"] = sprite.png()
    contents["projector_config.pbtxt"] = ("\n".join([*config, "}"]) + "\n").encode()
    return contents


def _field(text: str) -> str:
    """Escapes a text for a line of tab-separated fields."""
    return "".join(c if c.isprintable() else "�" for c in text)
