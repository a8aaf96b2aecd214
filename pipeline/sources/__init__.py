"""Image sets as random-access sources of records, one module a kind.

`--source=KIND:REST` calls the function that `_OPENERS` names for KIND with REST and the options.
A KIND that contains a dot is the import path of a function that takes REST alone, so users can
add a kind: the function returns a `Source`. Where the set fits in arrays, it returns an
`ArraySource`.

Conversion to one image shape is in conversion.py.
"""

import importlib

from pipeline.cli import signed_urls
from pipeline.cli.errors import UsageError
from pipeline.sources.memory import Memory
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers.arrays import ArraySource
from pipeline.sources.source import MAX_IMAGE_PIXELS, OneByOne, Source, Unreadable

__all__ = [
    "FORMS",
    "MAX_IMAGE_PIXELS",
    "ArraySource",
    "OneByOne",
    "Source",
    "SourceOptions",
    "Unreadable",
    "open_source",
]

# How a source is written -> the function that opens it.
_FORMS = {
    "sample": "pipeline.sources.readers.idx.open_sample",
    "idx:DIR": "pipeline.sources.readers.idx.open_idx",
    "npz:FILE_OR_DIR": "pipeline.sources.readers.npz.open_npz",
    "npy:FILE_OR_DIR": "pipeline.sources.readers.npy.open_npy",
    "csv:FILE_OR_DIR": "pipeline.sources.readers.csv.open_csv",
    "folder:DIR": "pipeline.sources.readers.folder.open_folder",
    "parquet:FILE_DIR_OR_GLOB": "pipeline.sources.readers.parquet.open_parquet",
    "tfds:NAME[:VERSION]": "pipeline.sources.readers.tfds.open_tfds",
}
# These read several files, and a signed URL gives one file.
_DIRECTORIES = ("folder", "idx")
# These read of unchanged files no more than is asked for.
_REMEMBERING = ("folder", "csv", "parquet")
_OPENERS = {form.partition(":")[0]: opener for form, opener in _FORMS.items()}
# What the API makes of arrays; no command can name them.
_OPENERS["arrays"] = "pipeline.sources.readers.array_layout.in_memory.open_arrays"
FORMS = f"{', '.join(_FORMS)} or your_module.your_function:REST"


def open_source(
    spec: str, options: SourceOptions = DEFAULTS, memory: Memory | None = None
) -> Source:
    """Opens the source that a spec names.

    Args:
      spec: `KIND` or `KIND:REST`; see FORMS.
      options: how the source is read.
      memory: what an earlier job found in the source's files.

    Raises:
      UsageError: unknown kind, or an option or a signed URL that does not apply to this kind.
      StageError: the source cannot be read.
    """
    spec = signed_urls.remember(spec)
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
    options.check_apply(kind)
    if kind in _DIRECTORIES and signed_urls.full(argument) != argument:
        raise UsageError(
            f"--source={spec}: is a signed URL, which gives one file; {kind} reads a directory; "
            "expected npz, npy, csv or parquet: name another source, or a URL without query string"
        )
    if kind in _REMEMBERING:
        return opener(argument, options, memory)
    if "." not in kind:
        return opener(argument, options)
    source = opener(signed_urls.full(argument))
    if not hasattr(source, "read"):
        raise UsageError(
            f"--source={spec}: {kind} returned a {type(source).__name__}; expected a Source, see "
            "pipeline/sources/source.py"
        )
    return source
