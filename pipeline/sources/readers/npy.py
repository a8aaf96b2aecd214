"""NumPy files: images and labels of each split, a file for each class, or one file alone."""

import errno
import math
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources.local_file import HEAD_BYTES, LocalFile, OpenFile
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.readers.array_layout import pairs as pairs_lib
from pipeline.sources.readers.array_layout import pixels, stored
from pipeline.sources.readers.array_layout.names import Name, parse
from pipeline.sources.source import UNLABELLED
from pipeline.sources.splits import UNSPLIT
from pipeline.storage import files

# File names that a message shows.
_MAX_SHOWN = 5
# A 2-D array with more rows, or a longer one, is not taken for a single image.
_MAX_HEIGHT, _MAX_ASPECT = 4_096, 13


class _NpyFile(stored.StoredArray):
    """An .npy file, local or a URL, plain or compressed with gzip."""

    def __init__(self, path: str):
        """Opens the file and reads the header.

        Raises:
          StageError: no such file, not an array, or of another size than its header states.
        """

        def size_of(head: bytes) -> int:
            shape, _, dtype, offset = stored.read_npy_header(head, path)
            return offset + math.prod(shape) * dtype.itemsize

        self._file = LocalFile(path, expected_size=size_of)
        self.stamp = self._file.stamp
        head = self._file.read(0, min(HEAD_BYTES, self._file.num_bytes))
        shape, is_fortran, dtype, self._offset = stored.read_npy_header(head, path)
        super().__init__(path, shape, dtype, is_fortran=is_fortran)
        self.check_numbers()
        self.check_size(self._file.num_bytes - self._offset)

    def open(self) -> tuple[OpenFile, int]:
        """The file, and the byte at which the array begins."""
        return self._file, self._offset


def open_npy(place: str, options: SourceOptions = DEFAULTS) -> arrays.ArraySource:
    """The image set in .npy files.

    Args:
      place: DIR, local or a URL, with images and labels of each split (x_train.npy, y_train.npy,
        …), or with one file for each class; DIR/BEGINNING, for the files whose names start with
        BEGINNING; or FILE with images without labels.
      options: see SourceOptions.

    Raises:
      UsageError: something that only a flag can decide.
      StageError: no such files, or arrays that are no image set, or ambiguous.
    """
    if not place:
        raise UsageError("--source=npy: names no directory; write --source=npy:DIR or npy:FILE")
    name = f"npy:{place}"
    if files.exists(place) and not files.is_dir(place):
        stem = place.rpartition("/")[2].removesuffix(".npy")
        return _parts({stem: _NpyFile(place)}, [], options, name=name)
    directory, beginning = pairs_lib.set_at(place)
    file_names, ignored = pairs_lib.files_of(directory, beginning, ".npy")
    if not file_names:
        what = "such file or directory" if directory != place else ".npy files in this directory"
        raise StageError(
            f"--source={name}: no {what}; expected at least one .npy file: name another place"
        )
    paths = {file.removesuffix(".npy"): files.join(directory, file) for file in file_names}
    names = [parse(stem) for stem in paths]
    kinds = {about.kind for about in names}
    images = [about for about in names if about.kind == "images"]
    # Without words for images and labels, names that differ by their split alone are of images.
    are_splits = kinds == {""} and _are_splits(names) and UNSPLIT not in {n.split for n in names}
    if "labels" not in kinds and not (images and _are_splits(images)) and not are_splits:
        return _classes(paths, options, name=name, ignored=ignored)
    split_names = pairs_lib.find_pairs(
        paths,
        f"--source={name}",
        options,
        place=f"npy:{directory}",
        default_kind="images" if are_splits else "",
    )
    pairs = {
        split: pairs_lib.Pair(
            _NpyFile(paths[kinds["images"]]),
            pairs_lib.open_labels(options, _NpyFile, paths[kinds["labels"]])
            if "labels" in kinds
            else None,
        )
        for split, kinds in split_names.items()
    }
    return pairs_lib.open_pairs(
        pairs,
        options,
        name=name,
        notes=pairs_lib.ignored_note(paths, split_names),
        listed={file.where: file.stamp for pair in pairs.values() for file in pair if file},
        ignored=ignored,
    )


def _are_splits(names: list[Name]) -> bool:
    """Whether names differ by their split alone."""
    return len({n.split for n in names}) == len(names) and len({n.rest for n in names}) == 1


def _classes(
    paths: dict[str, str], options: SourceOptions, *, name: str, ignored: dict[str, int]
) -> arrays.ArraySource:
    """The source over one file for each class.

    Args:
      paths: file name without .npy -> path or URL.
      options: see SourceOptions.
      name: name of the set in messages.
      ignored: see Source.

    Raises:
      StageError: the names are not those of classes, or each array may be one image.
    """
    where = f"--source={name}: {', '.join(list(paths)[:_MAX_SHOWN])}"
    if len(paths) == 1:
        [path] = paths.values()
        raise StageError(
            f"{where} is a single array; expected images and labels, or one file for each of "
            f"several classes: --source=npy:{path} reads it without labels"
        )
    splits = {parse(stem).split for stem in paths}
    # One of many words may be a class, such as train of Quick, Draw!.
    if UNSPLIT not in splits or len(splits) > 2:
        raise StageError(
            f"{where} name splits and classes; expected one file for each class, or images and "
            "labels of each split: save x_train.npy, y_train.npy and so on"
        )
    beginning, ending = _common_parts(list(paths))
    classes = {stem: stem[len(beginning) : len(stem) - len(ending)] for stem in paths}
    if all(re.fullmatch("[0-9]+", text) for text in classes.values()):
        stems = sorted(paths, key=lambda stem: (int(classes[stem]), stem))
    else:
        stems = sorted(paths)
    without = " and ".join(repr(_text(part)) for part in (beginning, ending) if part)
    note = f"reads one file for each of {len(paths)} classes, named after the file"
    try:
        opened = {stem: _NpyFile(paths[stem]) for stem in stems}
        _check_rows(list(opened.values()))
        return _parts(
            opened,
            [_text(classes[stem]) for stem in stems],
            options,
            name=name,
            notes=[f"{note} without {without}" if without else note],
            ignored=ignored,
        )
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise StageError(
            f"--source={name}: holds {len(paths)} arrays, more files than this process may open; "
            "expected fewer: raise the limit with ulimit -n, or save all in one .npz with labels"
        ) from error


def _check_rows(opened: list[_NpyFile]) -> None:
    """Checks that the rows of 2-D arrays are images, and not the arrays themselves.

    Raises:
      StageError: each array may be one image, such as a spectrogram.
    """
    file, shapes = opened[0], {file.shape for file in opened}
    if {len(shape) for shape in shapes} != {2}:
        return  # Arrays of other axes are checked one by one.
    num_rows, num_pixels = max(shapes)
    side = math.isqrt(num_pixels)
    if side * side != num_pixels:
        return  # Such rows are refused in any case.
    is_one_image = num_rows <= _MAX_HEIGHT and max(num_rows, num_pixels) <= _MAX_ASPECT * min(
        num_rows, num_pixels
    )
    is_flat = len({shape[1] for shape in shapes}) == 1 and side >= pixels.LEAST_SIDE
    if is_flat and (len(shapes) > 1 or not is_one_image):
        return
    raise StageError(
        f"{file}, the first of {len(opened)} files; expected images (n, H, W) of each class, and "
        f"these arrays can be one image each: save numpy.stack of all in one x.npy if so, or "
        f"x.reshape(-1, {side}, {side}) in each file if rows are images of {side}×{side}"
    )


def _common_parts(stems: list[str]) -> tuple[str, str]:
    """What all names begin and end with, whole words only."""
    beginning = re.match(r"(.*[\W_])?", os.path.commonprefix(stems), re.DOTALL)[0]
    rests = [stem[len(beginning) :][::-1] for stem in stems]
    ending = re.match(r"(.*[\W_])?", os.path.commonprefix(rests), re.DOTALL)[0][::-1]
    has_empty = any(len(stem) == len(beginning) + len(ending) for stem in stems)
    return ("", "") if has_empty else (beginning, ending)


def _parts(
    opened: dict[str, _NpyFile],
    class_names: list[str],
    options: SourceOptions,
    *,
    name: str,
    notes: Sequence[str] = (),
    ignored: Mapping[str, int] | None = None,
) -> arrays.ArraySource:
    """The source over files that are a class each, or without labels if there are no classes.

    Ids are `<file name without .npy>-<row, 7 digits>`.
    """
    images, pixel_notes = pixels.open_images(opened, dict.fromkeys(opened), options.pixel_range)
    return arrays.ArraySource(
        {
            stem: (rows, np.full(len(rows), number if class_names else UNLABELLED))
            for number, (stem, rows) in enumerate(images.items())
        },
        name=name,
        has_splits=False,
        class_names=class_names,
        listed={file.where: file.stamp for file in opened.values()},
        notes=list(dict.fromkeys([*notes, *pixel_notes])),
        ignored=ignored,
    )


def _text(name: str) -> str:
    """A file name as text that a manifest can hold."""
    return name.encode(errors="backslashreplace").decode()
