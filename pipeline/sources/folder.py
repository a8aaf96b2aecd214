"""Folders of image files: `train/<class>/*` or `<class>/*`."""

import collections
import concurrent.futures
import hashlib
import io
import os
import warnings

import numpy as np

from pipeline import placement, storage, trees
from pipeline.errors import StageError, UsageError
from pipeline.sources import source

# A file whose name ends in one of these is a record; what else lies around is not.
_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm"),
)
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Files read at once for the fingerprint: enough to keep an object store busy.
_NUM_THREADS = 8
# The Pillow modes of 8 bits a channel -> the mode that is stored.
_MODES = {"1": "L", "L": "L", "RGB": "RGB", "YCbCr": "RGB", "CMYK": "RGB", "HSV": "RGB"}
_NO_CLASS = "lies in no class directory, expected <class>/FILE or <split>/<class>/FILE"


def decode(data: bytes) -> np.ndarray:
    """The pixels of an image file, its first frame.

    Returns:
      uint8 (H, W, 1) for grey, (H, W, 3) for anything in colour.

    Raises:
      ValueError: no image, a damaged one, one with more than 8 bits a channel, or one that
        is transparent somewhere: what shows through is not in it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            mode = image.mode
            if mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                if image.getchannel("A").getextrema()[0] < 255:
                    raise ValueError("has transparent pixels, expected opaque ones: flatten it")
                image = image.convert("L" if mode in ("L", "LA", "La") else "RGB")
            elif mode not in _MODES:
                raise ValueError(f"is of Pillow's mode {mode}, expected 8 bits a channel")
            pixels = np.asarray(image.convert(_MODES.get(image.mode, "RGB")))
    except UnidentifiedImageError as error:
        raise ValueError(f"{len(data)} bytes that are no image") from error
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"a damaged image ({error})") from error
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


class FolderSource:
    """A source over image files; the directory a file lies in is its class."""

    def __init__(self, directory: str):
        """Lists the files.

        Raises:
          StageError: no such directory, no images, or no telling what is a class.
        """
        # What Pillow warns of is either quarantined or no matter.
        warnings.filterwarnings("ignore", module="PIL")
        self._directory = directory
        files = [p for p in trees.list_tree(directory) if p.lower().endswith(_EXTENSIONS)]
        parts = [path.split("/") for path in files]
        tops = {part[0] for part in parts if len(part) > 1}
        if not tops:
            raise StageError(
                f"--source=folder:{directory}: {len(files)} images and no directories of them; "
                "expected <class>/FILE or <split>/<class>/FILE: make a directory for each class, "
                "if only one"
            )
        splits = {top: source.split_named(top) for top in tops}
        has_splits = placement.UNSPLIT not in splits.values()
        deep = {part[0] for part in parts if len(part) > 2 and splits[part[0]] in ("train", "test")}
        if deep and not has_splits:
            others = sorted(top for top in tops if splits[top] == placement.UNSPLIT)
            raise StageError(
                f"--source=folder:{directory}: {min(deep)}/ looks like a split, {others[0]}/ like "
                "a class; expected only splits or only classes at the top: move one of them"
            )
        num_levels = 2 if has_splits else 1
        default = placement.in_order(splits.values())[0] if has_splits else placement.UNSPLIT
        records = []  # (split, path, class)
        for path, part in zip(files, parts, strict=True):
            of_class = part[num_levels - 1] if len(part) > num_levels else ""
            split = splits[part[0]] if has_splits and len(part) > 1 else default
            records.append((split, path, of_class))
        order = {split: i for i, split in enumerate(placement.in_order({r[0] for r in records}))}
        records.sort(key=lambda record: (order[record[0]], record[1]))
        classes = sorted({record[2] for record in records} - {""})
        self.class_names = [name.encode(errors="backslashreplace").decode() for name in classes]
        labels = {name: label for label, name in enumerate(classes)}
        self._paths = [record[1] for record in records]
        self._labels = np.array([labels.get(record[2], -1) for record in records], np.int64)
        self.split_sizes = dict(collections.Counter(record[0] for record in records))
        self._scanned: tuple[str, tuple[int, int, int]] | None = None

    def _scan(self) -> tuple[str, tuple[int, int, int]]:
        """Fingerprint and most frequent shape, from one reading of all files."""
        if self._scanned is None:

            def look(path: str) -> tuple[bytes, tuple[int, ...] | None]:
                try:
                    data = storage.read_bytes(storage.join(self._directory, path))
                except OSError:  # A link to nowhere; its record will be quarantined.
                    return b"", None
                try:
                    shape = _shape_from_header(data)
                except ValueError:
                    shape = None
                return hashlib.sha256(data).digest(), shape

            digest, shapes = hashlib.sha256(), collections.Counter()
            with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
                for path, (content, shape) in zip(
                    self._paths, pool.map(look, self._paths), strict=True
                ):
                    digest.update(os.fsencode(path) + b"\0" + content)
                    if shape:
                        shapes[shape] += 1
            if not shapes:
                raise StageError(
                    f"--source=folder:{self._directory}: none of its {len(self._paths)} images "
                    "can be opened; expected PNG, JPEG or another format that Pillow reads"
                )
            most = max(shapes.items(), key=lambda item: (item[1], item[0]))[0]
            self._scanned = digest.hexdigest(), most
        return self._scanned

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape that most of the images have."""
        return self._scan()[1]

    def fingerprint(self) -> str:
        """sha256 over paths and contents of all images."""
        return self._scan()[0]

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """Paths below the directory."""
        return [self._paths[index].encode(errors="backslashreplace") for index in indices]

    def where(self, index: int) -> str:
        """The file."""
        return storage.join(self._directory, self._paths[index])

    def read(self, indices: np.ndarray) -> tuple[list[np.ndarray | source.Unreadable], np.ndarray]:
        """Decodes the files at `indices`."""
        images: list[np.ndarray | source.Unreadable] = []
        for index in indices:
            if self._labels[index] < 0:
                images.append(source.Unreadable(_NO_CLASS))
                continue
            try:
                images.append(decode(storage.read_bytes(self.where(index))))
            except (ValueError, OSError) as error:
                images.append(source.Unreadable(str(error)))
        return images, self._labels[indices]


def _shape_from_header(data: bytes) -> tuple[int, int, int]:
    """The shape that `decode` would give, without decoding."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return image.height, image.width, 1 if image.mode in ("1", "L", "LA", "La") else 3
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def open_folder(directory: str) -> FolderSource:
    """The image set in a directory of image files.

    Args:
      directory: local path or URL. If all directories in it are named for splits (train,
        test, val, …) the classes lie in those, else they are the classes.

    Raises:
      StageError: no such directory, no images, or no telling what is a class.
    """
    if not directory:
        raise UsageError("--source=folder: names no directory; write --source=folder:DIR")
    if not storage.is_dir(directory):
        raise StageError(f"--source=folder:{directory}: no such directory; expected images in it")
    return FolderSource(directory.rstrip("/") or "/")
