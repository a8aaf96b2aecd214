"""Image sets as random-access sources of records, one module a kind.

`--source=KIND:REST` calls the function that `_OPENERS` names for KIND with REST. A KIND
that contains a dot is the import path of such a function, so users can add a kind: the
function returns a `Source`. Where the set fits in arrays, it returns an `ArraySource`.

Conversion to one image shape is in conversion.py.
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

# How a source is written -> the function that opens it.
_FORMS = {
    "sample": "pipeline.sources.readers.idx.open_sample",
    "idx:DIR": "pipeline.sources.readers.idx.open_idx",
    "npz:FILE": "pipeline.sources.readers.npz.open_npz",
    "csv:FILE": "pipeline.sources.readers.csv.open_csv",
    "folder:DIR": "pipeline.sources.readers.folder.open_folder",
    "tfds:NAME[:VERSION]": "pipeline.sources.readers.tfds.open_tfds",
}
_OPENERS = {form.partition(":")[0]: opener for form, opener in _FORMS.items()}
FORMS = f"{', '.join(_FORMS)} or your_module.your_function:REST"


def open_source(
    spec: str,
    *,
    tfds_data_dir: str | None = None,
    tfds_manual_dir: str | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    label_column: str | None = None,
) -> Source:
    """Opens the source that a spec names.

    Args:
      spec: `KIND` or `KIND:REST`; see FORMS.
      tfds_data_dir: directory of prepared sets of tensorflow-datasets.
      tfds_manual_dir: directory of original files that tensorflow-datasets does not download.
      max_image_pixels: limit on height × width of an image file; a larger one is `Unreadable`.
      label_column: of csv:FILE: name of the column with the labels, "first" or "last".

    Raises:
      UsageError: unknown kind, or a flag that does not apply to this kind.
      StageError: the source cannot be read.
    """
    kind, _, argument = spec.partition(":")
    path = kind if "." in kind else _OPENERS.get(kind, "")
    module, _, function = path.rpartition(".")
    try:
        opener = getattr(importlib.import_module(module), function)
        if not callable(opener):
            raise AttributeError(f"{kind} is not a function")
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        reason = f" ({error})" if "." in kind else ""
        raise UsageError(
            f"--source={spec}: no source {kind!r}{reason}; expected {FORMS}"
        ) from error
    if label_column is not None and kind != "csv" and "." not in kind:
        raise UsageError(
            f"--label_column={label_column}: {kind} has no columns, and the flag applies to "
            "csv:FILE only; remove it"
        )
    if kind == "tfds":
        return opener(
            argument,
            data_dir=tfds_data_dir,
            manual_dir=tfds_manual_dir,
            max_image_pixels=max_image_pixels,
        )
    if (tfds_data_dir or tfds_manual_dir) and "." not in kind:
        raise UsageError(
            f"--source={spec}: --tfds_data_dir and --tfds_manual_dir apply to tfds:NAME only; "
            "remove them"
        )
    if kind == "folder":
        return opener(argument, max_image_pixels=max_image_pixels)
    if max_image_pixels != MAX_IMAGE_PIXELS and "." not in kind:
        raise UsageError(
            f"--max_image_pixels={max_image_pixels}: {kind} holds no image files, and the flag "
            "applies to folder:DIR and tfds:NAME only; remove it"
        )
    if kind == "csv":
        return opener(argument, label_column=label_column)
    source = opener(argument)
    if not hasattr(source, "read"):
        raise UsageError(
            f"--source={spec}: {kind} returned a {type(source).__name__}; expected a Source, see "
            "pipeline/sources/source.py"
        )
    return source
