"""The records that a picture of an export shows, which the files beside the picture name."""

import functools
import itertools
from collections.abc import Callable

from pipeline.embeddings import files as row_files
from pipeline.embeddings.absence import contents
from pipeline.embeddings.absence.contents import File, Reader, Records
from pipeline.storage import files

_REPORT = "report.html"
# Plot -> a part of the titles of its records in the report.
_PLOTS = {
    "plots/reconstructions.png": " above its reconstruction",
    "plots/largest_losses.png": ", reconstruction_loss ",
}
_SPRITE, _SPRITE_NAMES = "projector/sprite.png", "projector/metadata.tsv"
_SUFFIXES = (".parquet", ".tfrecord", ".id.npy", ".record_sha.npy")


def reader_of(file: File, beside: Callable[[str], File | None]) -> Reader | None:
    """The reader of a picture of records; None for another file.

    Args:
      file: any file.
      beside: takes a name below the export, and gives that file, if it exists.
    """
    name = f"{file.folder}/{file.name}"
    if name in _PLOTS:
        return functools.partial(_read_plot, part=_PLOTS[name], report=beside(_REPORT))
    if name == _SPRITE:
        return functools.partial(_read, sources=[beside(_SPRITE_NAMES)])
    if file.folder == row_files.IMAGES_DIRECTORY and file.name.endswith(".png"):
        stem = f"{row_files.ROWS_DIRECTORY}/{file.name.removesuffix('.png')}"
        rows = [beside(f"{stem}{suffix}") for suffix in _SUFFIXES]
        return functools.partial(_read, sources=rows, num_records=row_files.SHEET_PAIRS)
    return None


def _read(picture: File, *, sources: list[File | None], num_records: int | None = None) -> Records:
    """The first records of each existing source."""
    del picture  # Its pixels name nothing.
    existing = [source for source in sources if source]
    if not existing:
        raise ValueError("no file names the records of this picture")
    for source in existing:
        reader = contents.reader_of(source)
        assert reader, source
        yield from itertools.islice(reader(source), num_records)


def _read_plot(picture: File, *, part: str, report: File | None) -> Records:
    del picture
    if report is None:
        raise ValueError("no report names the records of this picture")
    for title in contents.titles(files.read_bytes(report.path).decode()):
        if part in title:
            yield from ((text, "") for text in contents.of_title(title))
