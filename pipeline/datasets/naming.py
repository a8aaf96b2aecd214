"""The name of a data set that nobody has named; the names of its files begin with it."""

import os
import re
import unicodedata

from pipeline.sources.splits import UNSPLIT, split_named
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import tasks

MAX_BYTES = 100  # Of the 255 of a file name.
_FALLBACK = "images"
_ENDINGS = re.compile(r"(\.(npz|npy|csv|tsv|txt|parquet|parq|pq|gz|zip))+$", re.IGNORECASE)
_PATTERN = re.compile(r"[*?[]")
_VERSION = re.compile(r":[\d.*]+$")
_WORD = re.compile(r"[^\W\d_]+\d*[^\W\d_]*")


def name_of_source(source: str) -> str:
    """The name of a set, from the name of its source.

    Parts of a path that say nothing of the set are passed over: splits, dates and other numbers.
    So /data/pets/train.csv and /data/pets/2026-11-25 are both called pets.

    Args:
      source: as in --source.

    Returns:
      Lower case; an identifier of at most MAX_BYTES bytes.
    """
    kind, _, rest = source.partition(":")
    if kind == "sample":
        return "mnist"
    if kind == "tfds":
        return _cleaned(_VERSION.sub("", rest))
    if "://" in rest:
        rest = rest.partition("://")[2]
    elif rest and "." not in kind:  # A function's argument is no path, perhaps.
        rest = os.path.abspath(rest)
    parts = rest.split("/")
    if kind == "parquet":
        is_pattern = [bool(_PATTERN.search(part)) for part in parts]
        parts = parts[: [*is_pattern, True].index(True)]
    stems = (_ENDINGS.sub("", part) for part in reversed(parts))
    return _cleaned(next((stem for stem in stems if _says_something(stem)), ""))


def existing_name(directory: str) -> str | None:
    """The name of the data set, or the export, that a directory holds, finished or not.

    Args:
      directory: local path or fsspec URL.

    Raises:
      StageError: the manifest or job.json is damaged.
    """
    existing = manifest_lib.manifest_of(directory) or tasks.Tasks(directory).job()
    name = existing["made_from"].get("name") if existing else None
    return name if isinstance(name, str) and name.isidentifier() else None


def _says_something(stem: str) -> bool:
    words = _WORD.findall(stem.lower())
    return any(split_named(word) == UNSPLIT and word != "of" for word in words)


def _cleaned(text: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    text = "".join(char if f"_{char}".isidentifier() else "_" for char in text)
    text = re.sub("_+", "_", text).strip("_") or _FALLBACK
    if not text.isidentifier():  # It begins with a digit.
        text = f"{_FALLBACK}_{text}"
    return text.encode()[:MAX_BYTES].decode(errors="ignore").rstrip("_")
