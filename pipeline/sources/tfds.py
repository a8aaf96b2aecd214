"""Sets of tensorflow-datasets, prepared as array_record files, which are random access.

Preparing needs TensorFlow and may take minutes; reading what is prepared needs neither.
"""

import contextlib
import hashlib
import logging
import sys
from typing import Any

import numpy as np

from pipeline import command, placement
from pipeline.errors import StageError, UsageError
from pipeline.sources import arrays, source

_HASH_RECORDS = 4_096


def _prepared(builder: Any, where: str, manual_dir: str | None) -> None:
    """Prepares the builder's files unless they are there.

    Raises:
      StageError: they cannot be prepared.
    """
    import tensorflow_datasets as tfds

    if builder.is_prepared():
        return
    command.import_tensorflow()
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    print(f"preprocess: {where}: preparing in {builder.data_dir}", file=sys.stderr, flush=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Results alone go to standard output.
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
            )
    except Exception as error:  # Anything: each set downloads and parses in its own way.
        reason = " ".join(str(error).split())[:300]
        raise StageError(
            f"{where}: tensorflow-datasets could not prepare it ({type(error).__name__}: "
            f"{reason}); without access to the internet, put the original files into a directory "
            "and name it with --tfds_manual_dir"
        ) from error


class TfdsSource:
    """A source over a prepared set of tensorflow-datasets."""

    def __init__(self, name: str, *, data_dir: str | None, manual_dir: str | None):
        """Opens the set, and prepares it first where needed.

        Raises:
          StageError: no such set, it cannot be prepared, or holds no labelled images.
        """
        where = f"--source=tfds:{name}"
        for chatty in ("absl", "urllib3"):  # Advice to install OpenCV, and every retry.
            logging.getLogger(chatty).setLevel(logging.ERROR)
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError as error:
            raise StageError(
                f"{where}: tensorflow-datasets has no such set; see "
                "https://www.tensorflow.org/datasets/catalog for their names"
            ) from error
        except (AssertionError, ValueError, KeyError, RuntimeError) as error:
            raise StageError(f"{where}: {' '.join(str(error).split())[:300]}") from error
        _prepared(builder, where, manual_dir)
        features, keys = builder.info.features, builder.info.supervised_keys
        self._image, self._label = keys if keys and len(keys) == 2 else ("image", "label")
        if (
            not {self._image, self._label} <= set(getattr(features, "keys", list)())
            or not isinstance(features[self._image], tfds.features.Image)
            or not isinstance(
                features[self._label], tfds.features.ClassLabel | tfds.features.Scalar
            )
        ):
            raise StageError(
                f"{where}: holds {' '.join(str(features).split())}; expected an image and a label, "
                "a whole number"
            )
        self.class_names = list(getattr(features[self._label], "names", None) or [])
        self._shape = features[self._image].shape
        self._name = where
        sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
        splits = placement.in_order(split for split, size in sizes.items() if size)
        try:
            self._data = {split: builder.as_data_source(split) for split in splits}
        except (NotImplementedError, ValueError) as error:
            raise StageError(
                f"{where}: prepared in {builder.data_dir} in a format without random access; "
                "expected array_record: name another directory with --tfds_data_dir"
            ) from error
        self.split_sizes = {split: sizes[split] for split in splits}
        self._starts = np.cumsum([0, *self.split_sizes.values()])
        if not self.class_names:
            labels = [int(x[self._label]) for data in self._data.values() for x in data]
            self.class_names = arrays.class_names_up_to(max(labels), where)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of all images, or of the first where they differ."""
        if None in self._shape:
            return np.shape(next(iter(self._data.values()))[0][self._image])
        return tuple(self._shape)

    def fingerprint(self) -> str:
        """sha256 over the prepared records."""
        digest = hashlib.sha256()
        for split, data in self._data.items():
            digest.update(f"{split} {len(data)};".encode())
            for first in range(0, len(data), _HASH_RECORDS):
                places = range(first, min(first + _HASH_RECORDS, len(data)))
                for record in data.data_source.__getitems__(list(places)):
                    digest.update(len(record).to_bytes(8, "little"))
                    digest.update(record)
        return digest.hexdigest()

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """`<split>-<index in the split, 7 digits>`."""
        return arrays.number_ids([s.encode() for s in self._data], self._starts, indices)

    def _place(self, index: int) -> tuple[str, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return list(self._data)[number], int(index - self._starts[number])

    def where(self, index: int) -> str:
        """The set, the split, and the place in it."""
        split, place = self._place(index)
        return f"{self._name} {split}[{place}]"

    def read(self, indices: np.ndarray) -> tuple[list[np.ndarray | source.Unreadable], np.ndarray]:
        """Decodes the records at `indices`."""
        images: list[np.ndarray | source.Unreadable] = [source.Unreadable("")] * len(indices)
        labels = np.full(len(indices), -1, np.int64)
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        for number, data in enumerate(self._data.values()):
            here = np.flatnonzero(numbers == number).tolist()
            places = (indices[here] - self._starts[number]).tolist()
            for i, found in zip(here, _fetch(data, places), strict=True):
                if isinstance(found, source.Unreadable):
                    images[i] = found
                else:
                    images[i] = np.asarray(found[self._image])
                    labels[i] = int(found[self._label])
        return images, labels


def _fetch(data: Any, places: list[int]) -> list[Any]:
    """The decoded records at some places of a data source, all at once if they can be."""
    if not places:
        return []
    try:
        return list(data.__getitems__(places))
    except Exception as error:  # Decoding fails in as many ways as there are formats.
        if len(places) == 1:
            return [source.Unreadable(f"a damaged record ({error})")]
        return [found for place in places for found in _fetch(data, [place])]


def open_tfds(name: str, *, data_dir: str | None, manual_dir: str | None) -> TfdsSource:
    """The image set of that name in tensorflow-datasets.

    Args:
      name: NAME or NAME:VERSION, as in its catalog.
      data_dir: where prepared sets lie, local or a URL; tensorflow-datasets' default if None.
      manual_dir: where original files lie that would be downloaded otherwise.

    Raises:
      StageError: no such set, it cannot be prepared, or holds no labelled images.
    """
    if not name:
        raise UsageError("--source=tfds: names no set; write --source=tfds:NAME")
    return TfdsSource(name, data_dir=data_dir, manual_dir=manual_dir)
