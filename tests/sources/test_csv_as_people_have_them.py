"""CSV files as people have them: what each column holds is read, or refused, and never guessed."""

import csv
import dataclasses
import functools
import gzip
import hashlib
import shlex
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import reader
from pipeline.sources import SourceOptions, open_source
from tests.conftest import make_shards
from tests.forked import run_command

NUM = 60
PIXELS = [f"pixel{i}" for i in range(784)]
SMALL = [f"pixel{i}" for i in range(64)]
WORDS = "zero one two three four five six seven eight nine".split()


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (NUM, 784) and labels (NUM,) of MNIST."""
    images, labels = open_source("sample").read(np.arange(NUM))
    return images.reshape(NUM, 784), labels


@functools.cache
def noise(num_pixels: int = 64) -> np.ndarray:
    """Pixels (NUM, num_pixels) without a constant column."""
    return np.random.default_rng(1).integers(0, 256, (NUM, num_pixels)).astype(np.uint8)


def write(path, rows, header=None, *, encoding="utf-8", **dialect) -> str:
    """Writes rows as csv.writer does; returns the spec."""
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, **{"lineterminator": "\n"} | dialect)
        writer.writerows(([list(header)] if header is not None else []) + [list(r) for r in rows])
    return f"csv:{path}"


@dataclasses.dataclass
class Read:
    """All records of a source, of which none is unreadable."""

    source: object
    images: np.ndarray  # (n, pixels)
    labels: np.ndarray
    ids: list[str]

    @property
    def notes(self) -> str:
        return "\n".join(self.source.notes)


def read(spec: str, **options) -> Read:
    source = open_source(spec, SourceOptions(**options))
    indices = np.arange(sum(source.split_sizes.values()))
    images, labels = source.read(indices)
    assert all(isinstance(image, np.ndarray) for image in images), images
    ids = [record_id.decode() for record_id in source.ids(indices)]
    assert len(set(ids)) == len(ids)
    return Read(source, np.array([image.reshape(-1) for image in images]), labels, ids)


def assert_holds(found: Read, pixels: np.ndarray, labels=None) -> None:
    np.testing.assert_array_equal(found.images, pixels)
    if labels is None:
        assert (found.labels == -1).all() and list(found.source.class_names) == []
    else:
        np.testing.assert_array_equal(found.labels, labels)


def refusal(error: type, spec: str, **options) -> str:
    with pytest.raises(error) as caught:
        open_source(spec, SourceOptions(**options))
    return str(caught.value)


def optdigits() -> np.ndarray:
    """UCI's optdigits: 64 pixels of which the first is 0, then the digit."""
    pixels = np.random.default_rng(2).integers(0, 17, (NUM, 64))
    pixels[:, 0] = 0
    return np.c_[pixels, np.arange(NUM) % 10]


# Which column is the label.


@pytest.mark.parametrize("column", range(3))
def test_a_label_that_is_last_without_a_header(tmp_path, column):
    classes = np.arange(NUM) % 10
    rows = [optdigits(), np.c_[noise(192), classes], np.c_[noise(), classes * 0, classes]][column]
    if column == 2:
        rows[:, 0] = 7  # One class first, and one column too many: no square.
        assert "one column more than" in refusal(StageError, write(tmp_path / "s.csv", rows))
        rows = np.delete(rows, 64, axis=1)
    spec = write(tmp_path / "set.tra", rows)
    message = refusal(UsageError, spec)
    assert "the last one" in message and "--label_column=last, or =first" in message
    assert "--label_column=last" in refusal(UsageError, spec, labels="none")
    found = read(spec, label_column="last")
    assert_holds(found, rows[:, :-1], classes)
    assert list(found.source.class_names) == [str(n) for n in range(10)]
    assert_holds(read(spec, label_column="first"), rows[:, 1:], rows[:, 0])
    assert_holds(read(spec, label_column="last", labels="none"), rows[:, :-1])


@pytest.mark.parametrize(
    "header, name",
    [
        ([*PIXELS, "digit"], "digit"),
        ([*(f"{i // 28}x{i % 28}" for i in range(784)), "Species"], "species"),
        ([*PIXELS[:300], "digit", *PIXELS[300:]], "digit"),
        ([*(f"pixel_{i}_0_r" for i in range(784)), "étiquette"], "étiquette"),
    ],
)
def test_the_one_column_that_is_no_pixel_is_the_label(tmp_path, header, name):
    pixels, labels = digits()
    place = [column.lower() for column in header].index(name)
    spec = write(tmp_path / "set.csv", np.insert(pixels, place, labels, axis=1), header)
    found = read(spec)
    assert_holds(found, pixels, labels)
    assert found.source.notes == [f"{tmp_path}/set.csv: the column {name!r} holds the labels"]
    assert_holds(read(spec, label_column=name.upper()), pixels, labels)
    assert_holds(read(spec, labels="none"), pixels)


@pytest.mark.parametrize("name", ["label", "Class", "TARGET", "y", ' "label" '])
@pytest.mark.parametrize("place", [0, 13, 784])
def test_a_label_with_a_known_name_is_read_without_a_word(tmp_path, name, place):
    pixels, labels = digits()
    header = list(np.insert(np.array(PIXELS, object), place, name))
    spec = write(tmp_path / "set.csv", np.insert(pixels, place, labels, axis=1), header)
    found = read(spec)
    assert_holds(found, pixels, labels)
    assert not found.notes


@pytest.mark.parametrize(
    "header, told",
    [
        (SMALL, "no column holds labels, so the images have no labels"),
        ([f"p_{i}" for i in range(64)], "no column holds labels, so the images have no labels"),
        (range(64), "all 64 columns are pixels, so the images have no labels"),
        (None, "all 64 columns are pixels, so the images have no labels"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_of_pixels_alone_has_no_labels(tmp_path, header, told, channels):
    pixels = noise(64 * channels)
    if header is None:
        told = f"all {64 * channels} columns are pixels, so the images have no labels"
    elif channels == 3:
        header = [
            f"{name}_{c}" if header is SMALL else f"{name}{c}" for name in header for c in "rgb"
        ]
        told = "no column holds labels, so the images have no labels"
    spec = write(tmp_path / "test.csv", pixels, header)
    found = read(spec)
    assert_holds(found, pixels)
    assert found.source.image_shape == (8, 8, channels) and told in found.notes
    assert_holds(read(spec, labels="none"), pixels)
    assert "none of labels" in refusal(UsageError, spec, label_column="last")


@pytest.mark.parametrize(
    "header, rows, told",
    [
        (range(65), "label", "numbers the columns, and the first column holds the labels"),
        (["", *range(65)], "index", "numbers the columns, and the column '0' holds the labels"),
        (range(1, 66), "label", "numbers the columns, and the first column holds the labels"),
        (["label", *range(64)], "label", ""),
        ([*range(64), "label"], "last", ""),
        (["id", *range(64)], "id", "the column 'id' holds the ids"),
    ],
)
def test_a_line_of_numbers_is_a_header(tmp_path, header, rows, told):
    labels = None if rows == "id" else np.arange(NUM) % 7
    columns = {
        "label": lambda: np.c_[labels, noise()],
        "last": lambda: np.c_[noise(), labels],
        "index": lambda: np.c_[np.arange(NUM), labels, noise()],
        "id": lambda: np.c_[np.arange(NUM) + 500, noise()],
    }[rows]()
    found = read(write(tmp_path / "set.csv", columns, header))
    assert_holds(found, noise(), labels)
    assert told in found.notes
    assert (found.ids[3] == "unsplit-0000003") == (rows in ("label", "last"))


def test_a_row_that_pandas_took_for_a_header(tmp_path):
    header = ["0", *(f"0.{i}" for i in range(1, 65))]
    found = read(write(tmp_path / "set.csv", np.c_[np.arange(NUM) % 7, noise()], header))
    assert_holds(found, noise(), np.arange(NUM) % 7)
    assert "the first line is a row that pandas took for a header, and is not read" in found.notes


@pytest.mark.parametrize("first", [["cat", 0, 1, 2, 3], [1, 2, 3, 4, 5]])
def test_a_short_run_is_an_image_and_no_header(tmp_path, first):
    other = "dog" if first[0] == "cat" else 0
    rows = [first, *([other, *row] for row in noise(4).tolist())]
    found = read(write(tmp_path / "set.csv", rows))
    np.testing.assert_array_equal(found.images, [row[1:] for row in rows])
    assert found.labels[0] != found.labels[1] and not found.notes


@pytest.mark.parametrize(
    "header, rows, message",
    [
        (["fold", "digit", *SMALL], 2, "names 'fold', 'digit' beside pixels; expected one column"),
        ([f"p{i}" for i in range(65)], 1, "names pixels only ('p0', 'p1', "),
        (["label", *SMALL, "label"], 2, "names 'label' (column 1) and 'label' (column 66); exp"),
        (["class", *SMALL, "y"], 2, "names 'class' (column 1) and 'y' (column 66); expected one"),
        (["key", *SMALL], 0, "the column 'key' differs in all 60 rows looked at; expected labels"),
        (None, 0, "the first column differs in all 60 rows looked at, as an id does; expected"),
        (["étiquette", "fold", *SMALL], 2, "is not UTF-8: convert it with iconv -f LATIN1 -t UTF"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path, header, rows, message):
    labels = np.arange(NUM) % 5
    columns = np.c_[noise(), labels] if rows == 2 else noise()
    columns = np.c_[labels if rows else np.arange(NUM), columns]
    encoding = "latin-1" if header and header[0] == "étiquette" else "utf-8"
    spec = write(tmp_path / "set.csv", columns, header, encoding=encoding)
    assert message in refusal(UsageError, spec)
    if header and header[0] in ("fold", "key", "label", "étiquette"):
        assert read(spec, labels="none").labels[0] == -1
    if header and header[0] == "fold":
        found = read(spec, label_column="digit")
        assert "neither label, id nor pixel are not read: 'fold'" in found.notes


@pytest.mark.parametrize(
    "column, header, message",
    [
        ("digit", ["label", *SMALL], "has the columns 'label', 'pixel0', 'pixel1'"),
        ("digit", None, "has no header; expected the name of a column, first or last"),
    ],
)
def test_a_requested_column_that_no_file_has(tmp_path, column, header, message):
    spec = write(tmp_path / "set.csv", np.c_[np.arange(NUM) % 5, noise()], header)
    assert message in refusal(UsageError, spec, label_column=column)


# Ids.


@pytest.mark.parametrize(
    "header, values",
    [
        (["id", *PIXELS], [str(i) for i in range(NUM)]),
        (["ImageId", *PIXELS], [f"{i:05}" for i in range(NUM)]),
        (["", *PIXELS], [str(i) for i in range(NUM)]),
        (["filename", *PIXELS], [f"img/{i}, é.png" for i in range(NUM)]),
    ],
)
def test_an_id_column_holds_ids_and_no_labels(tmp_path, header, values):
    pixels, _ = digits()
    spec = write(
        tmp_path / "test.csv", [[v, *p] for v, p in zip(values, pixels, strict=True)], header
    )
    found = read(spec)
    assert_holds(found, pixels)
    assert found.ids == [f"unsplit-{value}" for value in values]
    assert "holds the ids" in found.notes and "the images have no labels" in found.notes
    if header[0] == "id":  # Asked for, the column is the label.
        assert_holds(read(spec, label_column="id"), pixels, np.arange(NUM))


@pytest.mark.parametrize(
    "header, ids",
    [
        (["", "label", *PIXELS], 0),
        (["Unnamed: 0", "label", *PIXELS], 0),
        (["index", "label", *PIXELS], 0),
        (["label", "sample_id", *PIXELS], 1),
    ],
)
def test_an_id_column_beside_the_label(tmp_path, header, ids):
    pixels, labels = digits()
    numbers = np.arange(NUM) + 1000
    columns = np.c_[numbers, labels, pixels] if ids == 0 else np.c_[labels, numbers, pixels]
    found = read(write(tmp_path / "set.csv", columns, header))
    assert_holds(found, pixels, labels)
    assert found.ids == [f"unsplit-{number}" for number in numbers]


def test_an_id_goes_before_an_index_and_a_line_says_so(tmp_path):
    pixels, labels = digits()
    columns = np.c_[np.arange(NUM), np.arange(NUM) + 1000, labels, pixels]
    found = read(write(tmp_path / "set.csv", columns, ["", "id", "label", *PIXELS]))
    assert_holds(found, pixels, labels)
    assert found.ids[0] == "unsplit-1000"
    assert "the column 'id' holds the ids" in found.notes
    assert "not read: 'nameless'" in found.notes


@pytest.mark.parametrize("header", [["id"], ["id", "label"], ["", "id"]])
def test_an_id_that_repeats_is_refused_and_a_flag_decides(tmp_path, header):
    pixels, labels = digits()
    ids = np.arange(NUM) % 30
    ids[29] = 0  # Lines 2 and 31.
    extra = {"id": ids, "label": labels, "": np.arange(NUM)}
    columns = np.c_[tuple(extra[name] for name in header) + (pixels,)]
    spec = write(tmp_path / "set.csv", columns, [*header, *PIXELS])
    message = refusal(UsageError, spec)
    assert "the column 'id' holds '0' in lines 2 and 31, and is named like an id" in message
    assert "--label_column=id" in message and "--labels=none" in message
    assert_holds(
        read(spec, label_column="id")
        if header != ["id", "label"]
        else read(spec, label_column="label"),
        pixels,
        labels if "label" in header else ids,
    )
    found = read(spec, labels="none")
    assert_holds(found, pixels)
    assert "in lines 2 and 31, so it holds no ids" in found.notes
    assert found.ids[5] == ("unsplit-5" if header[0] == "" else "unsplit-0000005")


def test_a_row_with_other_columns_has_an_id_too(tmp_path):
    pixels, labels = digits()
    path = tmp_path / "set.csv"
    write(path, np.c_[np.arange(NUM), labels, pixels], ["id", "label", *PIXELS])
    path.write_text(path.read_text() + "7,1\n")
    source = open_source(f"csv:{path}")
    assert source.ids(np.arange(NUM - 1, NUM + 1)) == [b"unsplit-59", b"unsplit-0000060"]
    [image], _ = source.read(np.array([NUM]))
    assert image.reason == "2 columns, expected 786"
    path.write_text(path.read_text().replace("\n3,", "\n0000060,"))
    assert "holds '0000060' in lines 5 and 62" in refusal(UsageError, f"csv:{path}")


# How numbers and words are written.


def as_written(kind: str, tmp_path) -> str:
    pixels, labels = digits()
    rows, header = np.c_[labels, pixels], ["label", *PIXELS]
    path = tmp_path / "set.csv"
    if kind == "savetxt":
        np.savetxt(path, rows, delimiter=",")
    elif kind == "floats":
        return write(path, rows.astype(float), header)
    elif kind == "a float label":
        return write(
            path, [[f"{label}.0", *row] for label, row in zip(labels, pixels, strict=True)], header
        )
    elif kind == "all in quotes":
        return write(path, rows, header, quoting=csv.QUOTE_ALL)
    else:  # As OpenML has it.
        rows = [[*row, str(label)] for label, row in zip(labels, pixels.tolist(), strict=True)]
        return write(path, rows, [*PIXELS, "class"], quoting=csv.QUOTE_NONNUMERIC)
    return f"csv:{path}"


@pytest.mark.parametrize(
    "kind", ["savetxt", "floats", "a float label", "all in quotes", "the label in quotes"]
)
def test_whole_numbers_are_read_however_they_are_written(tmp_path, kind):
    pixels, labels = digits()
    found = read(as_written(kind, tmp_path))
    assert_holds(found, pixels, labels)
    assert list(found.source.class_names) == [str(n) for n in range(10)]
    assert not found.notes


@pytest.mark.parametrize(
    "text, value",
    [("5", 5), ("5.", 5), ("5.0", 5), ('"5"', 5), ("1e2", 100), ("2.5e+01", 25), (" 7 ", 7)]
    + [("-0.0", 0), ("255.000", 255), (".0", 0), ('" 3 "', 3)]
    + [(text, None) for text in ("", "5.5", "+5", "1_0", "nan", "inf", "1e400", "256", "-1", '"5')]
    + [(text, None) for text in ("e5", "0x5", "5 5", "٣", "1e", "--1", "True")],
)
def test_each_way_to_write_a_pixel(tmp_path, text, value):
    rows = [["1", *["0"] * 63, "9"] for _ in range(NUM)]
    path = tmp_path / "set.csv"
    lines = [",".join(row) for row in rows]
    lines[7] = ",".join(["1", *["0"] * 30, text, *["0"] * 32, "9"])
    path.write_text("\n".join([",".join(["label", *SMALL]), *lines]))
    source = open_source(f"csv:{path}")
    images, labels = source.read(np.arange(NUM))
    if value is None:
        assert images[7].reason == f"pixel 30 is {text.strip()!r}, expected a whole number 0 to 255"
    else:
        assert images[7].reshape(-1)[30] == value and images[7].reshape(-1)[63] == 9
    assert labels[7] == 1 and isinstance(images[8], np.ndarray)


@pytest.mark.parametrize("header", [["label", *PIXELS], [*PIXELS, "label"], None])
def test_words_are_class_names(tmp_path, header):
    pixels, labels = digits()
    is_last = header is not None and header[-1] == "label"
    rows = [
        [*row, WORDS[label]] if is_last else [WORDS[label], *row]
        for label, row in zip(labels, pixels.tolist(), strict=True)
    ]
    found = read(write(tmp_path / "set.csv", rows, header))
    names = list(found.source.class_names)
    assert names == sorted({WORDS[label] for label in labels})
    assert_holds(found, pixels, [names.index(WORDS[label]) for label in labels])


@pytest.mark.parametrize(
    "names, expected",
    [
        (["10", "9", "b"], ["9", "10", "b"]),
        (["a, b", 'c "d"', "é_1"], ["a, b", 'c "d"', "é_1"]),
        ([*"0123456789ABCDEF"], [*"0123456789ABCDEF"]),
        (["5.0", "x"], ["5", "x"]),
    ],
)
@pytest.mark.parametrize("header", [["label", *(f"pixel {i}, {i}" for i in range(64))], None])
def test_class_names_keep_what_they_hold(tmp_path, names, expected, header):
    rows = [[names[i % len(names)], *row] for i, row in enumerate(noise().tolist())]
    found = read(write(tmp_path / "set.csv", rows, header))
    assert list(found.source.class_names) == expected
    shown = [name.replace("5.0", "5") for name in names]
    assert_holds(found, noise(), [expected.index(shown[i % len(names)]) for i in range(NUM)])


def test_words_that_are_last_without_a_header_are_the_labels(tmp_path):
    rows = [[*row, "ab"[i % 2]] for i, row in enumerate(noise().tolist())]
    spec = write(tmp_path / "set.csv", rows)
    found = read(spec)
    assert_holds(found, noise(), np.arange(NUM) % 2)
    assert "column 65 holds words, which are the labels" in found.notes
    assert_holds(read(spec, labels="none"), noise())
    spec = write(tmp_path / "two.csv", [["c", *row[1:]] for row in rows])
    assert "the columns 1, 65 hold words" in refusal(UsageError, spec)


def test_a_few_words_among_numbers_are_faults(tmp_path):
    pixels, labels = digits()
    rows = [
        ["five" if i == 4 else label, *p]
        for i, (label, p) in enumerate(zip(labels, pixels.tolist(), strict=True))
    ]
    source = open_source(write(tmp_path / "set.csv", rows, ["label", *PIXELS]))
    images, _ = source.read(np.arange(NUM))
    assert images[4].reason == "label 'five', expected a whole number up to 65535"
    assert source.where(4) == f"{tmp_path}/set.csv line 6"
    assert list(source.class_names) == [str(n) for n in range(10)]


def test_a_bad_row_names_no_class(tmp_path):
    rows = [["ab"[i % 2], *row] for i, row in enumerate(noise().tolist())]
    rows[3][0], rows[3][5] = "c", "x"
    rows[4] = ["d", 1]
    rows[5][0] = ""
    source = open_source(write(tmp_path / "set.csv", rows, ["label", *SMALL]))
    assert list(source.class_names) == ["a", "b"]
    images, _ = source.read(np.arange(NUM))
    assert images[3].reason == "label 'c', expected a class name"
    assert images[4].reason == "2 columns, expected 65"
    assert images[5].reason == "label '', expected a class name"


# Files that are no CSV, or another one.


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_are_read_and_said(tmp_path, separator):
    pixels, labels = digits()
    rows = [
        [f"{label}{separator}x" if label else "0", *row]
        for label, row in zip(labels, pixels.tolist(), strict=True)
    ]
    found = read(
        write(tmp_path / "a.csv", np.c_[labels, pixels], ["label", *PIXELS], delimiter=separator)
    )
    assert_holds(found, pixels, labels)
    assert f"columns are separated by {separator!r}" in found.notes
    found = read(write(tmp_path / "b.csv", rows, ["label", *PIXELS], delimiter=separator))
    np.testing.assert_array_equal(found.images, pixels)
    assert set(found.source.class_names) == {row[0] for row in rows}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_end_as_each_system_ends_them(tmp_path, end, mark, last):
    pixels, labels = digits()
    path = tmp_path / "set.csv"
    lines = [",".join(map(str, row)) for row in np.c_[labels, pixels].tolist()]
    text = mark + end.join([",".join(["label", *PIXELS]), "", *lines]) + (end if last else "")
    path.write_bytes(text.encode())
    found = read(f"csv:{path}")
    assert_holds(found, pixels, labels)
    assert found.source.where(0) == f"{path} line 3"


def remedied(message: str, path) -> None:
    """Runs the command that a message ends with, in the directory of the file."""
    starts = [message.rfind(start) for start in ("iconv -f", "sed -E", "python -c")]
    command = message[max(starts) :].replace("python -c", f"{shlex.quote(sys.executable)} -c")
    subprocess.run(command, shell=True, check=True, cwd=path.parent)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_named_with_the_remedy(tmp_path, encoding):
    pixels, labels = digits()
    path = tmp_path / "a 'set.csv"
    message = refusal(
        StageError, write(path, np.c_[labels, pixels], ["label", *PIXELS], encoding=encoding)
    )
    assert "UTF-" in message and "expected text in UTF-8: convert it with iconv" in message
    remedied(message, path)
    assert_holds(read(f"csv:{tmp_path}/utf8.csv"), pixels, labels)


def test_words_that_are_not_utf8_are_refused(tmp_path):
    rows = [["éa"[i % 2], *row] for i, row in enumerate(noise().tolist())]
    spec = write(tmp_path / "set.csv", rows, ["label", *SMALL], encoding="latin-1")
    with pytest.raises(StageError, match=r"b'\\xe9' is not UTF-8; convert the file.*iconv"):
        _ = open_source(spec).class_names


def test_spaces_and_packed_files_are_refused_with_the_remedy(tmp_path):
    pixels, labels = digits()
    spec = write(tmp_path / "set.csv", np.c_[labels, pixels], ["label", *PIXELS], delimiter=" ")
    message = refusal(StageError, spec)
    assert "the first line has 1 column(s); expected a label and pixels, separated by" in message
    remedied(message, tmp_path / "set.csv")
    assert_holds(read(f"csv:{tmp_path}/commas.csv"), pixels, labels)
    text = (tmp_path / "commas.csv").read_bytes()
    (tmp_path / "set.csv").write_bytes(b"PK\x03\x04" + text)
    assert "is a packed file; expected text" in refusal(StageError, spec)
    (tmp_path / "set.csv").write_bytes(gzip.compress(text))  # Known by its first bytes.
    assert_holds(read(spec), pixels, labels)


@pytest.mark.parametrize("header, place", [(["label", *SMALL], 0), (None, 0), ([*SMALL, "y"], 64)])
@pytest.mark.parametrize("scale, low", [(1, 0), (2, -1), (65_535, 0)])
def test_pixels_of_another_range_are_refused_with_the_line_to_run(
    tmp_path, header, place, scale, low
):
    labels = np.arange(NUM) % 5
    values = noise() / 255 * scale + low
    values[0] = np.linspace(low, low + scale, 64)  # The lowest and the highest.
    rows = np.insert(values.round(6), place, labels, axis=1).tolist()
    for row, label in zip(rows, labels.tolist(), strict=True):
        row[place] = label
    path = tmp_path / "set.csv"
    message = refusal(StageError, write(path, rows, header))
    assert f"pixels are {low:g} to {low + scale:g}; scale them: python -c" in message
    assert f"{NUM} of {NUM} rows looked at cannot be read" in message
    if (scale, place) == (1, 64) or (scale, header) == (65_535, None):
        remedied(message, path)
        found = read(f"csv:{tmp_path}/new.csv")
        np.testing.assert_array_equal(found.labels, labels)
        np.testing.assert_array_equal(found.images[1:], noise()[1:])


def test_decimal_commas_are_refused_with_the_line_to_run(tmp_path):
    labels = np.arange(NUM) % 5
    rows = [[f"{value},0" for value in row] for row in np.c_[labels, noise()].tolist()]
    message = refusal(StageError, write(tmp_path / "s.csv", rows, ["label", *SMALL], delimiter=";"))
    assert "write decimals with points" in message
    remedied(message, tmp_path / "s.csv")
    assert_holds(read(f"csv:{tmp_path}/new.csv"), noise(), labels)


def test_pixels_in_one_field_are_refused_with_the_line_to_run(tmp_path):
    labels = np.arange(NUM) % 5
    rows = [
        [n, " ".join(map(str, row)), "Training"] for n, row in zip(labels, noise(), strict=True)
    ]
    message = refusal(StageError, write(tmp_path / "fer.csv", rows, ["emotion", "pixels", "Usage"]))
    assert "the column 'pixels' holds 64 numbers in one field" in message
    remedied(message, tmp_path / "fer.csv")
    assert_holds(read(f"csv:{tmp_path}/new.csv", label_column="emotion"), noise(), labels)


def test_zeros_and_ones_are_read_with_a_warning(tmp_path):
    rows = np.c_[np.arange(NUM) % 5, noise() > 127].astype(int)
    found = read(write(tmp_path / "set.csv", rows, ["label", *SMALL]))
    assert_holds(found, rows[:, 1:], rows[:, 0])
    assert (
        "pixels are 0 and 1 in all 60 rows looked at, and are stored so, nearly black"
        in found.notes
    )
    assert "* 255).round()" in found.notes


@pytest.mark.parametrize(
    "row, message",
    [
        (["1", *["x"] * 64], "line 2 has 'x' as pixel 0; expected whole numbers 0 to 255: "),
        (["1", *["0"] * 65], "line 2 has 66 columns; expected 65, as in the first line: "),
        (["0.5", *["0"] * 64], "line 2 has the label '0.5', expected a whole number"),
        (["", *["0"] * 64], "line 2 has the label '', expected a whole number"),
    ],
)
def test_a_file_whose_rows_are_all_bad_is_refused_at_the_start(tmp_path, row, message):
    spec = write(tmp_path / "set.csv", [row] * NUM, ["label", *SMALL])
    refused = refusal(StageError, spec)
    assert message in refused and "60 of 60 rows looked at cannot be read: name the" in refused
    # A tenth of good rows, and the bad ones go to quarantine one by one.
    spec = write(tmp_path / "some.csv", [row] * 54 + [["1", *["0"] * 64]] * 6, ["label", *SMALL])
    images, _ = open_source(spec).read(np.arange(NUM))
    assert sum(isinstance(image, np.ndarray) for image in images) == 6


# Directories.


def competition(directory, *, name: str = "label", test_ids: bool = False) -> str:
    pixels, labels = digits()
    directory.mkdir()
    write(directory / "train.csv", np.c_[labels, pixels][:40], [name, *PIXELS])
    if test_ids:
        write(directory / "test.csv", np.c_[np.arange(20), pixels[40:]], ["id", *PIXELS])
    else:
        write(directory / "test.csv", pixels[40:], PIXELS)
    write(directory / "sample_submission.csv", [(i, 0) for i in range(20)], ["ImageId", "Label"])
    return f"csv:{directory}"


@pytest.mark.parametrize(
    "name, test_ids, options",
    [
        ("label", False, {}),
        ("label", True, {}),
        ("digit", True, {}),
        ("digit", False, {"label_column": "digit"}),
        ("digit", True, {"label_column": "first"}),
    ],
)
def test_a_competition(tmp_path, name, test_ids, options):
    pixels, labels = digits()
    found = read(competition(tmp_path / "set", name=name, test_ids=test_ids), **options)
    assert found.source.split_sizes == {"train": 40, "test": 20}
    np.testing.assert_array_equal(found.images, pixels)
    assert found.labels.tolist() == [*labels[:40], *[-1] * 20]
    assert found.source.ignored == {".csv": 1}
    assert (
        "sample_submission.csv is not read: its 2 columns (imageid, label) hold no" in found.notes
    )
    assert (
        f"{tmp_path}/set/test.csv: " in found.notes and "so the images have no lab" in found.notes
    )
    assert found.ids[39] == "train-0000039"
    assert found.ids[40:42] == (
        ["test-0", "test-1"] if test_ids else ["test-0000000", "test-0000001"]
    )


def test_a_competition_as_shards(tmp_path):
    manifest = make_shards(
        competition(tmp_path / "set", test_ids=True),
        tmp_path / "out",
        num_shards=1,
        validation_fraction=0,
    )
    assert manifest["splits"] == {"train": 40, "test": 20}
    assert manifest["records"] == {
        "read": 60,
        "written": 60,
        "quarantined": 0,
        "ignored": {".csv": 1},
    }
    dataset = reader.Dataset(str(tmp_path / "out"))
    pixels, labels = digits()
    for split, first in (("train", 0), ("test", 40)):
        [entry] = dataset.shards(split)
        shard = dataset.read_shard(entry)
        for record_id, image, label in zip(shard.ids, shard.images, shard.labels, strict=True):
            row = first + int(str(record_id).split("-")[1])
            np.testing.assert_array_equal(image.reshape(-1), pixels[row])
            assert label == (labels[row] if split == "train" else -1)


def test_other_files_of_a_directory_are_counted(tmp_path):
    pixels, labels = digits()
    competition(tmp_path / "set")
    for name in ("README.md", "a.txt", "b.TXT", "images.zip", "LICENSE", ".hidden"):
        (tmp_path / "set" / name).write_text("x")
    (tmp_path / "set" / "train.csv.d").mkdir()
    write(tmp_path / "set" / "val.tsv", np.c_[labels, pixels], ["label", *PIXELS], delimiter="\t")
    found = read(f"csv:{tmp_path}/set")
    assert found.source.split_sizes == {"train": 40, "validation": 60, "test": 20}
    assert found.source.ignored == {".csv": 1, ".md": 1, ".txt": 2, ".zip": 1, "": 1}
    assert "directories are not read: train.csv.d" in found.notes
    write(tmp_path / "set" / "validation.csv", np.c_[labels, pixels], ["label", *PIXELS])
    message = refusal(StageError, f"csv:{tmp_path}/set")
    assert (
        "val.tsv and validation.csv belong to the same split" in message
        or "validation.csv and val.tsv belong" in message
    )
    assert "name one file" in message


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the first line has 0 column(s)"),
        ("\n\n", "the first line has 0 column(s)"),
        (",".join(["label", *SMALL]), "holds a header but no rows"),
    ],
)
def test_files_without_rows(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    assert message in refusal(StageError, f"csv:{tmp_path}/train.csv")
    assert message in refusal(StageError, f"csv:{tmp_path}")


def test_a_directory_without_images(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert "no .csv or .tsv files" in refusal(StageError, f"csv:{tmp_path}")
    write(tmp_path / "sub.csv", [(1, 2)], ["ImageId", "Label"])
    assert "sub.csv is not read" in refusal(StageError, f"csv:{tmp_path}")
    message = refusal(StageError, f"csv:{tmp_path}/sub.csv")
    assert "holds the columns 'imageid', 'label' and no pixels" in message


# The order of pixel columns.

SIDE = range(8)
CELLS = [(y, x) for y in SIDE for x in SIDE]
COLOURS = ["r", "g", "b"]
# The names of 8×8 pixels, row by row and channels last; the image has the pixels in this order.
NAMED = {
    "counted": SMALL,
    "counted from 1": [f"p.{i + 1:02}" for i in range(64)],
    "cells": [f"{y + 1}x{x + 1}" for y, x in CELLS],
    "rgb counted": [f"{c}{i}" for i in range(64) for c in COLOURS],
    "rgb counted through": [f"{'rgb'[i % 3]}_{i}" for i in range(192)],
    "rgb cells": [f"pixel_{y}_{x}_{c}" for y, x in CELLS for c in ("Red", "green", "blue")],
    "rgb numbers": [f"pixel_{y}_{x}_{c}" for y, x in CELLS for c in range(3)],
    "rgb numbers first": [f"{c}_{y}_{x}" for y, x in CELLS for c in range(3)],
}


def written_as(order: str, names: list[str]) -> list[int]:
    """Places of names in the order that a file has."""
    channels = len(names) // 64
    places = np.arange(len(names))
    return {
        "text": lambda: sorted(places.tolist(), key=lambda place: names[place]),
        "reverse": lambda: places[::-1].tolist(),
        "by column": lambda: places.reshape(8, 8, channels).swapaxes(0, 1).ravel().tolist(),
        "by channel": lambda: places.reshape(64, channels).T.ravel().tolist(),
        "shuffled": lambda: np.random.default_rng(3).permutation(places).tolist(),
    }[order]()


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("order", ["text", "reverse", "by column", "by channel", "shuffled"])
def test_pixels_are_read_in_the_order_of_their_names(tmp_path, kind, order):
    names, labels = NAMED[kind], np.arange(NUM) % 5
    pixels, places = noise(len(names)), written_as(order, names)
    columns = np.c_[pixels[:, places], labels]
    found = read(write(tmp_path / "set.csv", columns, [*(names[p] for p in places), "label"]))
    assert_holds(found, pixels, labels)
    is_changed = places != sorted(places)
    told = f"are read in the order of their names ({names[0].lower()!r}, {names[1].lower()!r}, "
    assert (told in found.notes) == is_changed
    before = plain_fingerprint(tmp_path / "set.csv", NUM)
    assert (found.source.fingerprint() != before) == is_changed
    if kind == "cells" and is_changed:
        assert "the first number is the row" in found.notes


@pytest.mark.parametrize(
    "names, told",
    [
        ([f"p{i * i}" for i in reversed(range(64))], "an order that their numbers do not tell"),
        ([f"p{i}" for i in range(63)] + ["p5"], "an order that their numbers do not tell"),
        ([f"{y}_{x}" for x in range(16) for y in range(4)], "an order that their numbers do not"),
        ([f"x{x}y{y}" for x, y in np.random.default_rng(1).permutation(CELLS)], "do not tell"),
        ([f"{c}{i}" for i in range(16) for c in "rgba"], "columns of 4 kinds ('r0', 'g0', 'b0', "),
        ([f"class_{i}" for i in range(16)] + SMALL[:48], "64 columns of 2 kinds ('class_0', 'pix"),
        (["mean", *SMALL[:63]], "64 columns of 2 kinds ('mean', 'pixel0') would be the pixels"),
    ],
)
def test_names_that_tell_no_order_are_refused(tmp_path, names, told):
    labels = np.arange(NUM) % 5
    spec = write(tmp_path / "set.csv", np.c_[labels, noise()], ["label", *names])
    message = refusal(StageError, spec)
    assert told in message
    if "p5" in names or "mean" in names:
        remedied(message, tmp_path / "set.csv")
        assert_holds(read(f"csv:{tmp_path}/new.csv"), noise(), labels)


@pytest.mark.parametrize("first", ["x", "y"])
def test_columns_and_rows_in_either_order_are_as_in_the_file(tmp_path, first):
    cells = CELLS if first == "x" else [cell[::-1] for cell in CELLS]
    names = [f"x{x}y{y}" for x, y in cells]
    found = read(write(tmp_path / "set.csv", np.c_[np.arange(NUM) % 5, noise()], ["y", *names]))
    assert_holds(found, noise(), np.arange(NUM) % 5)
    assert found.source.fingerprint() == plain_fingerprint(tmp_path / "set.csv", NUM)


def test_all_files_of_a_set_have_one_order(tmp_path):
    pixels, order = noise(), written_as("text", SMALL)
    names = [SMALL[place] for place in order]
    write(tmp_path / "train.csv", pixels[:, order], names)
    write(tmp_path / "test.csv", pixels, SMALL)
    np.testing.assert_array_equal(read(f"csv:{tmp_path}").images, np.r_[pixels, pixels])
    write(tmp_path / "test.csv", pixels[:, order])
    assert "are not in the same order" in refusal(StageError, f"csv:{tmp_path}")
    for name, cells in (("train", CELLS), ("test", [cell[::-1] for cell in CELLS])):
        write(tmp_path / f"{name}.csv", pixels, [f"x{x}y{y}" for x, y in cells])
    assert "are not in the same order" in refusal(StageError, f"csv:{tmp_path}")


@pytest.mark.parametrize("header", [None, range(192), [f"p{i}" for i in range(192)]])
def test_rgb_whose_channels_no_name_tells_is_read_with_a_warning(tmp_path, header):
    found = read(write(tmp_path / "set.csv", noise(192), header))
    assert_holds(found, noise(192))
    assert "warning: images are RGB of 8×8, and no name tells the channels" in found.notes
    assert "reshape(-1, 3, 8, 8).transpose(0, 2, 3, 1)" in found.notes


# Labels.


@pytest.mark.parametrize("num_rows", [15, 40, 1000])
@pytest.mark.parametrize("classes", [range(3), range(1, 11), range(100)])
@pytest.mark.parametrize("is_numbered", [True, False])
def test_labels_that_look_like_labels_in_the_last_column(tmp_path, num_rows, classes, is_numbered):
    pixels = np.random.default_rng(4).integers(0, 256, (num_rows, 64))
    labels = np.arange(num_rows) % len(classes) + classes[0]
    header = range(65) if is_numbered else None
    spec = write(tmp_path / "set.csv", np.c_[pixels, labels], header)
    if num_rows <= len(classes):  # No label repeats, so nothing tells.
        return
    assert "--label_column=last, or =first" in refusal(UsageError, spec)
    assert_holds(read(spec, label_column="last"), pixels, labels)
    spec = write(tmp_path / "first.csv", np.c_[labels, pixels], header)
    assert_holds(read(spec), pixels, labels)


@pytest.mark.parametrize("num_rows", [12, 60, 600])
@pytest.mark.parametrize("classes", [2, 10, 26, 47, 62, 100])
@pytest.mark.parametrize("edge", ["black", "nearly black", "dark", "noise"])
def test_labels_first_stay_so_whatever_the_edge(tmp_path, num_rows, classes, edge):
    generator = np.random.default_rng(5)
    pixels = generator.integers(0, 256, (num_rows, 64))
    is_lit = generator.random(num_rows) < 0.05
    pixels[:, 63] = {
        "black": 0,
        "nearly black": is_lit * pixels[:, 63] % 3,
        "dark": is_lit * pixels[:, 63],
        "noise": pixels[:, 63],
    }[edge]
    labels = generator.integers(0, classes, num_rows)
    found = read(write(tmp_path / "set.csv", np.c_[labels, pixels]))
    assert_holds(found, pixels, labels)


@pytest.mark.parametrize("labels", [[-1, 3, 0], [-1], [-1, 1], [-1, 0, 1], [-1.0, 1]])
def test_records_without_a_label_are_counted(tmp_path, labels):
    column = [labels[i % len(labels)] for i in range(NUM)]
    rows = [[label, *row] for label, row in zip(column, noise().tolist(), strict=True)]
    spec = write(tmp_path / "set.csv", rows, ["label", *SMALL])
    if set(labels) == {-1, 1}:
        with pytest.raises(UsageError, match="the labels are -1 and 1") as caught:
            _ = open_source(spec).class_names
        remedied(str(caught.value), tmp_path / "set.csv")
        new = read(f"csv:{tmp_path}/new.csv")
        np.testing.assert_array_equal(new.labels, [max(label, 0) for label in column])
        assert_holds(read(spec, labels="none"), noise())
        return
    found = read(spec)
    assert list(found.source.class_names) == [str(n) for n in range(max(labels) + 1)]
    assert f"{NUM // len(labels)} of {NUM} records have no label (-1)" in found.notes


@pytest.mark.parametrize("missing", ["NA", "nan", "NaN", "n/a", "NULL", ""])
@pytest.mark.parametrize("names", [["0", "1"], ["cat", "dog"]])
def test_a_missing_label_is_a_fault_and_no_class(tmp_path, missing, names):
    rows = [[names[i % 2], *row] for i, row in enumerate(noise().tolist())]
    for row in rows[::4]:
        row[0] = missing
    source = open_source(write(tmp_path / "set.csv", rows, ["label", *SMALL]))
    assert list(source.class_names) == names
    images, _ = source.read(np.arange(NUM))
    faults = [place for place, image in enumerate(images) if not isinstance(image, np.ndarray)]
    assert faults == list(range(0, NUM, 4))
    assert f"label {missing!r}, expected" in images[0].reason


@pytest.mark.parametrize("num_words", [NUM, 5])
def test_words_in_one_file_and_numbers_in_another(tmp_path, num_words):
    rows = noise().tolist()
    write(tmp_path / "train.csv", [[i % 2, *r] for i, r in enumerate(rows)], ["label", *SMALL])
    words = [["cat", *row] for row in rows[:num_words]]
    write(tmp_path / "test.csv", words, ["label", *SMALL])
    spec = f"csv:{tmp_path}"
    with pytest.raises(StageError, match="test.csv: labels are words, and those of .*train.csv"):
        _ = open_source(spec).class_names
    assert (read(spec, labels="none").labels == -1).all()
    # Numbers that are classes beside words are those classes.
    words = [["01b"[i % 3], *row] for i, row in enumerate(rows)]
    write(tmp_path / "test.csv", words, ["label", *SMALL])
    assert list(read(spec).source.class_names) == ["0", "1", "b"]


@pytest.mark.parametrize("highest, told", [(2, True), (16, True), (17, False)])
def test_dark_pixels_are_read_with_a_warning(tmp_path, highest, told):
    rows = np.c_[np.arange(NUM) % 5, noise() % (highest + 1)]
    found = read(write(tmp_path / "set.csv", rows, ["label", *SMALL]))
    assert_holds(found, rows[:, 1:], rows[:, 0])
    warning = f"warning: pixels are at most {highest} of 255 in all {NUM} rows looked at, nearly"
    assert (warning in found.notes) == told
    if told:
        remedied(found.notes, tmp_path / "set.csv")
        scaled = np.rint(rows[:, 1:] * 15.9375)
        assert_holds(read(f"csv:{tmp_path}/new.csv"), scaled, rows[:, 0])


# Files of a directory, and greedy files.


@pytest.mark.parametrize("name", ["all.csv", "mnist.csv", "Dig-MNIST.csv", "train1.csv"])
def test_a_file_without_a_split_beside_one_with_a_split_is_refused(tmp_path, name):
    rows = np.c_[np.arange(NUM) % 5, noise()]
    for file in (name, "test.csv"):
        write(tmp_path / file, rows, ["label", *SMALL])
    message = refusal(StageError, f"csv:{tmp_path}")
    assert f"{name} states no split" in message and f"beside {tmp_path}/test.csv" in message
    assert "name one file, or move the file away" in message
    (tmp_path / "test.csv").unlink()
    assert read(f"csv:{tmp_path}").source.split_sizes == {"unsplit": NUM}


def test_long_lines_and_empty_lines_take_little_memory(tmp_path):
    path = tmp_path / "set.csv"
    path.write_bytes(b"1," * (1 << 24))
    tracemalloc.start()
    try:
        assert "the first line is longer than 16,777,216 bytes" in refusal(
            StageError, f"csv:{path}"
        )
        path.write_bytes(b"1," * (9 << 19))
        assert "4718593 columns; expected at most 4194304" in refusal(StageError, f"csv:{path}")
        lines = [",".join(map(str, row)) for row in np.c_[np.arange(NUM) % 5, noise()].tolist()]
        text = "\n".join([",".join(["label", *SMALL]), *lines[:30], "\n" * (1 << 25), *lines[30:]])
        path.write_bytes((text + "\n" + "1," * (1 << 24) + "\n\r\n").encode())
        del text
        tracemalloc.reset_peak()
        source = open_source(f"csv:{path}")
        images, labels = source.read(np.arange(NUM + 1))
        assert list(source.class_names) == [*"01234"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal([image.reshape(-1) for image in images[:NUM]], noise())
    assert images[NUM].reason == "8388609 columns, expected 65" and labels[7] == 2
    assert source.where(30) == f"{path} line {32 + (1 << 25) + 1}"
    assert peak < 250e6


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("at", [-2, -1, 0, 1])
def test_lines_at_the_end_of_a_block(tmp_path, end, at):
    head = ",".join(["label", *SMALL]).encode() + end
    rows = [b",".join(b"%d" % value for value in [i, *noise()[i]]) + end for i in range(4)]
    blanks = end * (((1 << 22) + at - len(head + rows[0])) // len(end))
    (tmp_path / "set.csv").write_bytes(head + rows[0] + blanks + rows[1] + end + rows[2] + rows[3])
    found = read(f"csv:{tmp_path}/set.csv")
    assert_holds(found, noise()[:4], range(4))
    num_blanks = len(blanks) // len(end)
    assert found.source.where(1).endswith(f"line {3 + num_blanks}")
    assert found.source.where(2).endswith(f"line {5 + num_blanks}")


# Whole sets.


def test_sets_as_they_are_published(tmp_path):
    pixels, labels = digits()
    # Sign-language MNIST: no label 9.
    signs = np.arange(NUM) % 24
    signs[signs >= 9] += 1
    found = read(
        write(
            tmp_path / "sign_mnist_train.csv",
            np.c_[signs, pixels],
            ["label", *(f"pixel{i + 1}" for i in range(784))],
        )
    )
    assert_holds(found, pixels, signs)
    assert list(found.source.class_names) == [str(n) for n in range(25)]
    # A_Z handwritten data: no header, sorted by class; a blank image.
    letters = np.arange(NUM) * 26 // NUM
    blank = np.where(np.arange(NUM)[:, None] == 7, 0, pixels)
    found = read(write(tmp_path / "A_Z Handwritten Data.csv", np.c_[letters, blank]))
    assert_holds(found, blank, letters)
    assert len(found.source.class_names) == 26 and not found.notes


@pytest.mark.parametrize("seed", range(24))
def test_any_table_gives_its_images_back(tmp_path, seed):
    generator = np.random.default_rng(seed)
    pick = generator.choice
    channels = int(pick([1, 3]))
    pixels = noise(25 * channels)
    names = WORDS[:4] if pick([True, False]) else ["0", "1", "2", "3"]
    columns = {f"p{i}": pixels[:, i].tolist() for i in range(pixels.shape[1])}
    if pick([True, False]):
        columns = {name: [f"{value}.0" for value in values] for name, values in columns.items()}
    extra = {"label": [names[i % 4] for i in range(NUM)]}
    if pick([True, False]):
        extra["id"] = [f"n°{i}" for i in range(NUM)]
    items = list(columns.items())
    for item in extra.items():
        items.insert(int(generator.integers(0, len(items) + 1)), item)
    spec = write(
        tmp_path / "set.csv",
        zip(*[values for _, values in items], strict=True),
        [name for name, _ in items],
        delimiter=str(pick([",", ";", "\t", "|"])),
        lineterminator=str(pick(["\n", "\r\n", "\r"])),
        quoting=int(pick([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])),
        encoding=str(pick(["utf-8", "utf-8-sig"])),
    )
    found = read(spec)
    classes = list(found.source.class_names)
    assert classes == sorted(names) and found.source.image_shape == (5, 5, channels)
    assert_holds(found, pixels, [classes.index(name) for name in extra["label"]])
    assert found.ids[7] == ("unsplit-n°7" if "id" in extra else "unsplit-0000007")
    assert_holds(read(spec, labels="none"), pixels)


# Fingerprints, and the command.


def plain_fingerprint(path, num_rows: int) -> str:
    """As an earlier version takes the fingerprint of a file."""
    return hashlib.sha256(f"unsplit {num_rows};".encode() + path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "header, label, change, stays",
    [
        (None, 0, None, True),
        (["label", *SMALL], 0, None, True),
        ([*SMALL, "label"], 64, None, True),
        (["digit", *SMALL], 0, None, True),
        (["label", *SMALL], 0, "256", True),
        (["label", *SMALL], 0, "1.5", True),
        (["label", *SMALL], 0, "+1", True),
        (["label", *SMALL], 0, " 1", True),
        (["label", *SMALL], 0, "\t1", True),
        (["label", *SMALL], 0, "x", True),
        (["label", *SMALL], 0, "1.0", False),
        (["label", *SMALL], 0, '"1"', False),
        ([*SMALL, "digit"], 64, None, False),
        (range(65), 0, None, False),
        (SMALL, None, None, False),
        (["id", *SMALL], "id", None, False),
        # 7×7 pixels, of which the id was the first; 4×4 of RGB are left.
        (["id", "label", *SMALL[:48]], "id and label", None, False),
    ],
)
def test_the_fingerprint_changes_only_where_records_do(tmp_path, header, label, change, stays):
    rows = noise().astype(object)
    if change:
        rows[5, 3] = change
    if label == "id":
        rows = np.insert(rows, 0, np.arange(NUM), axis=1)
    elif label == "id and label":
        rows = np.c_[np.arange(NUM), np.arange(NUM) % 10, rows[:, :48]]
    elif label is not None:
        rows = np.insert(rows, label, np.arange(NUM) % 10, axis=1)
    path = tmp_path / "set.csv"
    lines = [",".join(map(str, row)) for row in ([list(header)] if header else []) + rows.tolist()]
    path.write_text("\n".join(lines) + "\n")
    num_rows = NUM + (header == range(65))  # A header of numbers was an image.
    before = plain_fingerprint(path, num_rows)
    assert (open_source(f"csv:{path}").fingerprint() == before) == stays


def test_a_label_column_enters_the_id_only_where_it_is_set(tmp_path):
    source = write(tmp_path / "set.csv", np.c_[np.arange(NUM) % 9, noise()])
    manifests = [
        make_shards(source, tmp_path / name, num_shards=1, label_column=column)
        for name, column in (("unset", None), ("first", "first"))
    ]
    made_from = [manifest["made_from"]["source"] for manifest in manifests]
    assert "label_column" not in made_from[0] and made_from[1]["label_column"] == "first"


def test_a_label_column_is_of_a_csv_alone():
    message = refusal(UsageError, "sample", label_column="last")
    assert "applies to csv:… and parquet:… only, and the source is sample" in message


def test_the_command_refuses_with_status_2(tmp_path):
    spec = write(tmp_path / "b.csv", optdigits())
    flags = ["--num_shards=1", f"--output_dir={tmp_path}/no"]
    done = run_command("pipeline.preprocess", f"--source={spec}", *flags, check=False)
    assert done.returncode == 2 and "--label_column=last" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "no").exists()
