"""Image sets as random-access sources of records, one module a kind.

`--source=KIND:REST` calls the function that `_OPENERS` names for KIND with REST. A
KIND with a dot in it is the import path of such a function, so a set that none of
these reads needs no more than a function of yours that returns a `Source`; one that
can be had as arrays needs no more than an `ArraySource`.

Converting images to one shape is not done here but in conversion.py.
"""

import importlib

from pipeline.cli.errors import UsageError
from pipeline.sources.readers.arrays import ArraySource
from pipeline.sources.source import MAX_IMAGE_PIXELS, OneByOne, Source, Unreadable

__all__ = [
    "FORMS",
    "MAX_IMAGE_PIXELS",
    "ArraySource",
    "OneByOne",
    "Source",
    "Unreadable",
    "open_source",
]

_OPENERS = {
    "sample": "pipeline.sources.readers.idx.open_sample",
    "idx": "pipeline.sources.readers.idx.open_idx",
    "npz": "pipeline.sources.readers.npz.open_npz",
    "csv": "pipeline.sources.readers.csv.open_csv",
    "folder": "pipeline.sources.readers.folder.open_folder",
    "tfds": "pipeline.sources.readers.tfds.open_tfds",
}
FORMS = (
    "sample, idx:DIR, npz:FILE, csv:FILE, folder:DIR, tfds:NAME[:VERSION] or "
    "your_module.your_function:REST"
)


def open_source(
    spec: str,
    *,
    tfds_data_dir: str | None = None,
    tfds_manual_dir: str | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> Source:
    """Opens the source that a spec names.

    Args:
      spec: `KIND` or `KIND:REST`; see FORMS.
      tfds_data_dir: where tensorflow-datasets keeps prepared sets.
      tfds_manual_dir: where it finds files that it would download otherwise.
      max_image_pixels: of an image file, height × width; a larger one cannot be had.

    Raises:
      UsageError: no source of that kind.
      StageError: the source cannot be read.
    """
    kind, _, rest = spec.partition(":")
    path = kind if "." in kind else _OPENERS.get(kind, "")
    module, _, function = path.rpartition(".")
    try:
        opener = getattr(importlib.import_module(module), function)
        if not callable(opener):
            raise AttributeError(f"{kind} is no function")
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        why = f" ({error})" if "." in kind else ""
        raise UsageError(f"--source={spec}: no source {kind!r}{why}; expected {FORMS}") from error
    if kind == "tfds":
        return opener(
            rest,
            data_dir=tfds_data_dir,
            manual_dir=tfds_manual_dir,
            max_image_pixels=max_image_pixels,
        )
    if (tfds_data_dir or tfds_manual_dir) and "." not in kind:
        raise UsageError(
            f"--source={spec}: takes no --tfds_data_dir nor --tfds_manual_dir; leave them out, or "
            "name a source tfds:NAME"
        )
    if kind == "folder":
        return opener(rest, max_image_pixels=max_image_pixels)
    if max_image_pixels != MAX_IMAGE_PIXELS and "." not in kind:
        raise UsageError(
            f"--max_image_pixels={max_image_pixels}: {kind} holds no image files; leave it out, or "
            "name a source folder:DIR or tfds:NAME"
        )
    return opener(rest)
