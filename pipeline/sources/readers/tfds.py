"""Sets of tensorflow-datasets, prepared as array_record files, which allow random access.

Preparing needs TensorFlow and can take minutes; reading prepared files needs neither.
"""

import contextlib
import hashlib
import io
import logging
import sys
from typing import Any

import numpy as np

from pipeline.cli import quiet
from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import image_file, source
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.splits import in_order
from pipeline.storage import files, trees

_HASH_RECORDS = 4_096


def _prepare(builder: Any, where: str, manual_dir: str | None) -> None:
    """Prepares the builder's files unless they exist.

    Raises:
      StageError: tensorflow-datasets cannot prepare the files.
    """
    import tensorflow_datasets as tfds

    if builder.is_prepared():
        return
    quiet.import_tensorflow()
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    print(f"preprocess: {where}: preparing in {builder.data_dir}", file=sys.stderr, flush=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Standard output is for results only.
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
            )
    except Exception as error:  # Each set has its own download and parser.
        reason = " ".join(str(error).split())[:300]
        raise StageError(
            f"{where}: tensorflow-datasets could not prepare it ({type(error).__name__}: "
            f"{reason}); without internet access, put the original files into a directory and name "
            "it with --tfds_manual_dir"
        ) from error


class TfdsSource:
    """A source over a prepared set of tensorflow-datasets."""

    def __init__(
        self,
        name: str,
        *,
        data_dir: str | None,
        manual_dir: str | None,
        max_pixels: int = source.MAX_IMAGE_PIXELS,
        is_labelled: bool = True,
        allow_namespace: bool = False,
    ):
        """Opens the set, and prepares it first if necessary.

        Raises:
          UsageError: labels that are no integers, or a namespace that is not allowed.
          StageError: no such set, it cannot be prepared, or it holds no images.
        """
        where = f"--source=tfds:{name}"
        for name_of_log in ("absl", "urllib3"):  # Advice to install OpenCV, and every retry.
            logging.getLogger(name_of_log).setLevel(logging.ERROR)
        import tensorflow_datasets as tfds

        try:
            # The parser of tfds.builder, so that both agree on what is a namespace.
            namespace = tfds.core.naming.parse_builder_name_kwargs(name)[0].namespace
            if namespace and not allow_namespace:
                raise UsageError(
                    f"{where}: is a community set of the namespace {namespace!r}, whose code "
                    "tensorflow-datasets loads from elsewhere and runs; expected a set of "
                    "tensorflow-datasets itself, or --allow_tfds_namespace if you trust that code"
                )
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        except tfds.core.registered.DatasetNotFoundError as error:
            raise StageError(
                f"{where}: tensorflow-datasets has no such set; see "
                "https://www.tensorflow.org/datasets/catalog for the names"
            ) from error
        except (AssertionError, ValueError, KeyError, RuntimeError) as error:
            raise StageError(f"{where}: {' '.join(str(error).split())[:300]}") from error
        _prepare(builder, where, manual_dir)
        self._directory, self._max_pixels = str(builder.data_dir), max_pixels
        self.listed = self.listing()
        features, keys = builder.info.features, builder.info.supervised_keys
        self._image, label = keys if keys and len(keys) == 2 else ("image", "label")
        names = set(getattr(features, "keys", list)())
        if self._image not in names or not isinstance(features[self._image], tfds.features.Image):
            raise StageError(f"{where}: holds {' '.join(str(features).split())}; expected an image")
        self.notes: list[str] = []
        self._label = label if is_labelled and label in names - {self._image} else None
        if self._label:
            is_refused = not isinstance(
                features[label], tfds.features.ClassLabel | tfds.features.Scalar
            )
        else:  # A feature of another name may hold labels.
            is_refused = is_labelled and any(
                isinstance(features[name], tfds.features.ClassLabel) for name in names
            )
        if is_refused:
            raise UsageError(
                f"{where}: holds {' '.join(str(features).split())}; expected an image and an "
                "integer label: --labels=none reads the images alone"
            )
        if is_labelled and not self._label:
            shown = ", ".join(sorted(names))
            self.notes.append(f"none of the features holds labels: {shown}")
        self.class_names: list[str] = []
        if self._label:
            self.class_names += getattr(features[label], "names", None) or []
        self._image_feature = features[self._image]
        self._name = where
        sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
        splits = in_order(split for split, size in sizes.items() if size)
        try:
            # Images stay encoded: their headers are checked before they are decoded.
            stored = {self._image: tfds.decode.SkipDecoding()}
            self._data = {s: builder.as_data_source(s, decoders=stored) for s in splits}
        except (NotImplementedError, ValueError) as error:
            raise StageError(
                f"{where}: prepared in {builder.data_dir} in a format without random access; "
                "expected array_record: name another directory with --tfds_data_dir"
            ) from error
        self.split_sizes = {split: sizes[split] for split in splits}
        self._starts = np.cumsum([0, *self.split_sizes.values()])
        if self._label and not self.class_names:
            labels = [int(x[self._label]) for data in self._data.values() for x in data]
            self.class_names = arrays.class_names_up_to(max(labels), where)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of all images, or of the first image if shapes differ."""
        shape = self._image_feature.shape
        if None not in shape:
            return tuple(shape)
        first = self._decoded(next(iter(self._data.values()))[0][self._image])
        if isinstance(first, source.Unreadable):
            raise StageError(
                f"{self._name}: its first image is unreadable ({first.reason}); expected an image "
                "that shows the shape of the set's images"
            )
        return np.shape(first)

    def listing(self) -> dict[str, str]:
        """Name -> current stamp of each prepared file."""
        try:
            return trees.read_tree(self._directory).stamps
        except FileNotFoundError:
            return {}

    def fingerprint(self) -> str:
        """sha256 over the prepared records."""
        digest = hashlib.sha256()
        for split, data in self._data.items():
            digest.update(f"{split} {len(data)};".encode())
            for first in range(0, len(data), _HASH_RECORDS):
                rows = range(first, min(first + _HASH_RECORDS, len(data)))
                for record in data.data_source.__getitems__(list(rows)):
                    digest.update(len(record).to_bytes(8, "little"))
                    digest.update(record)
        return digest.hexdigest()

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """`<split>-<index in the split, 7 digits>`."""
        return arrays.number_ids([s.encode() for s in self._data], self._starts, indices)

    def _row(self, index: int) -> tuple[str, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return list(self._data)[number], int(index - self._starts[number])

    def where(self, index: int) -> str:
        """The set, the split, and the index in the split."""
        split, row = self._row(index)
        return f"{self._name} {split}[{row}]"

    def read(self, indices: np.ndarray) -> tuple[source.OneByOne, np.ndarray]:
        """Reads the records at `indices`; images are decoded on access."""
        stored: list[bytes | source.Unreadable] = [b""] * len(indices)
        labels = np.full(len(indices), source.UNLABELLED, np.int64)
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        for number, data in enumerate(self._data.values()):
            positions = np.flatnonzero(numbers == number).tolist()
            rows = (indices[positions] - self._starts[number]).tolist()
            for i, record in zip(positions, _fetch(data, rows), strict=True):
                if isinstance(record, source.Unreadable):
                    stored[i] = record
                else:
                    stored[i] = record[self._image]
                    if self._label:
                        labels[i] = int(record[self._label])
        # A library opens and reads the files, so only their stamps can be checked here. For a URL,
        # that would take requests for each read.
        if not files.is_url(self._directory) and self.listing() != self.listed:
            raise source.changed(self._directory)
        return source.OneByOne(lambda i: self._decoded(stored[i]), len(indices)), labels

    def _decoded(self, stored: bytes | source.Unreadable) -> np.ndarray | source.Unreadable:
        """Decodes an image file's bytes with tensorflow-datasets."""
        if isinstance(stored, source.Unreadable):
            return stored
        try:
            image_file.shape_of(io.BytesIO(stored), self._max_pixels)
            return np.asarray(self._image_feature.decode_example_np(stored))
        except Exception as error:  # Each format fails in its own way.
            return source.Unreadable(f"a damaged record ({error})")


def _fetch(data: Any, rows: list[int]) -> list[Any]:
    """The records at some rows of a data source: all in one call, or one by one if that fails."""
    if not rows:
        return []
    try:
        return list(data.__getitems__(rows))
    except Exception as error:  # Each format fails in its own way.
        if len(rows) == 1:
            return [source.Unreadable(f"a damaged record ({error})")]
        return [record for row in rows for record in _fetch(data, [row])]


def open_tfds(name: str, options: SourceOptions = DEFAULTS) -> TfdsSource:
    """The image set of that name in tensorflow-datasets.

    Args:
      name: NAME or NAME:VERSION, as in the catalog of tensorflow-datasets.
      options: see SourceOptions.

    Raises:
      UsageError: labels that are no integers, or a namespace that is not allowed.
      StageError: no such set, it cannot be prepared, or it holds no images.
    """
    if not name:
        raise UsageError("--source=tfds: names no set; write --source=tfds:NAME")
    return TfdsSource(
        name,
        data_dir=options.tfds_data_dir,
        manual_dir=options.tfds_manual_dir,
        max_pixels=options.max_image_pixels,
        is_labelled=options.labels != "none",
        allow_namespace=options.allow_tfds_namespace,
    )
