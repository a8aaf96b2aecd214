"""Parquet files as the hubs and people write them: the same pixels, labels and splits come out."""

import io
import json
import os
import subprocess
import sys

import fsspec
import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies
from PIL import Image

from pipeline.cli.errors import SourceChanged, StageError, UsageError
from pipeline.datasets import reader
from pipeline.sources import SourceOptions, Unreadable, conversion, open_source
from tests.conftest import REPOSITORY, blobs, make_shards

IMAGES, LABELS = blobs(num_train=30)["train"]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = list("abcdefghij")


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PNGS = [png(image) for image in IMAGES]
HUB = pa.array([{"bytes": data, "path": None} for data in PNGS], STRUCT)
CLASS_LABEL = {"_type": "ClassLabel", "names": NAMES}


def write(path, features=None, *, rows=slice(None), **columns) -> str:
    """Writes a table, with the hubs' metadata if `features` are given; its spec."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = columns.pop("settings", {"row_group_size": 7})
    table = pa.table(columns)
    table = table.slice(rows.start or 0, (rows.stop or len(table)) - (rows.start or 0))
    if features is not None:
        about = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path, **settings)
    return f"parquet:{path}"


def hub(path, rows=slice(None), **features) -> str:
    """A file as the hubs publish them."""
    features = {"image": {"_type": "Image"}, "label": CLASS_LABEL} | features
    return write(path, features, rows=rows, image=HUB, label=LABELS.astype(np.int64))


def read(spec: str, **options):
    """The source; its images, or reasons; its labels."""
    source = open_source(spec, SourceOptions(**options))
    images, labels = source.read(np.arange(sum(source.split_sizes.values())))
    return source, [i.reason if isinstance(i, Unreadable) else i for i in images], labels.tolist()


def assert_are_the_blobs(images, expected=IMAGES):
    assert len(images) == len(expected)
    for image, pixels in zip(images, expected, strict=True):
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, pixels.reshape(*pixels.shape[:2], -1))


# Columns of images.


def nested(images, value_type, *, large=False) -> pa.Array:
    """Images as lists of lists."""
    list_type = value_type
    for _ in images[0].shape:
        list_type = pa.large_list(list_type) if large else pa.list_(list_type)
    return pa.array([image.tolist() for image in images], list_type)


def fixed(images, value_type=None) -> pa.Array:
    """Images as lists of a fixed size in lists of a fixed size."""
    array = pa.array(np.concatenate([image.ravel() for image in images]), value_type)
    for size in images[0].shape[::-1]:
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


SQUARES = [np.ascontiguousarray(image[:8]) for image in IMAGES]
COLOURS = [np.dstack([image, 255 - image, image // 2]) for image in IMAGES]


@pytest.mark.parametrize(
    "column, expected",
    [
        (HUB, IMAGES),
        (pa.array(PNGS, pa.binary()), IMAGES),
        (pa.array(PNGS, pa.large_binary()), IMAGES),
        (pa.array(PNGS, pa.binary_view()), IMAGES),
        (pa.array([d.ljust(1000, b"\0") for d in PNGS], pa.binary(1000)), IMAGES),
        (pa.array([{"bytes": data} for data in PNGS]), IMAGES),
        (nested(IMAGES, pa.uint8()), IMAGES),
        (nested(IMAGES, pa.int64(), large=True), IMAGES),
        (nested([image[..., None] for image in IMAGES], pa.int16()), IMAGES),
        (nested(COLOURS, pa.uint8()), COLOURS),
        (pa.array([image.ravel().tolist() for image in SQUARES], pa.list_(pa.int64())), SQUARES),
        (fixed([image.ravel() for image in SQUARES]), SQUARES),
        (fixed(COLOURS, pa.int32()), COLOURS),
        (pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(IMAGES)), IMAGES),
        (pa.array([png(image) for image in COLOURS]), COLOURS),
    ],
    ids=lambda value: str(value.type)[:40] if isinstance(value, pa.Array | pa.ChunkedArray) else "",
)
@pytest.mark.parametrize("name", ["image", "jpg"])
def test_images_are_found_by_their_type(tmp_path, column, expected, name):
    if expected is SQUARES:  # Flat lists, which only a name makes pixels.
        name = {"jpg": "Pixels"}.get(name, name)
    spec = write(tmp_path / "set.parquet", **{"label": LABELS, name: column})
    source, images, labels = read(spec)
    assert_are_the_blobs(images, expected)
    assert labels == LABELS.tolist() and source.class_names == [str(i) for i in range(10)]
    assert source.image_shape == images[0].shape and source.split_sizes == {"unsplit": 30}
    assert source.notes[0].startswith(f"the column {name!r} holds the images (")


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(data=strategies.data())
def test_whatever_the_shapes_and_row_groups(tmp_path_factory, data):
    side = strategies.integers(1, 4)
    shapes = data.draw(strategies.lists(strategies.tuples(side, side), min_size=1, max_size=12))
    generator = np.random.default_rng(len(shapes))
    images = [generator.integers(0, 256, shape, np.uint8) for shape in shapes]
    path = tmp_path_factory.mktemp("any") / "set.parquet"
    as_files = data.draw(strategies.booleans())
    column = pa.array([png(image) for image in images]) if as_files else nested(images, pa.uint8())
    settings = {
        "row_group_size": data.draw(strategies.integers(1, 12)),
        "compression": data.draw(strategies.sampled_from(["none", "snappy", "zstd", "gzip"])),
        "data_page_version": data.draw(strategies.sampled_from(["1.0", "2.0"])),
        "use_dictionary": data.draw(strategies.booleans()),
    }
    source = open_source(write(path, settings=settings, image=column))
    order = np.array(data.draw(strategies.permutations(range(len(images)))))
    read_images, _ = source.read(order)
    assert_are_the_blobs(list(read_images), [images[i] for i in order])


def test_images_of_several_shapes_are_said(tmp_path):
    images = [*IMAGES[:20], *(image[:6] for image in IMAGES[20:])]
    for name, column in (
        ("files", pa.array([png(i) for i in images])),
        ("lists", nested(images, pa.uint8())),
    ):
        source = open_source(write(tmp_path / f"{name}.parquet", image=column))
        assert source.image_shape == (12, 8, 1)
        assert source.notes[-1] == "images are of 2 shapes: 12×8×1 (20), 6×8×1 (10)"


def test_two_columns_of_images_are_not_guessed_between(tmp_path):
    spec = write(tmp_path / "set.parquet", image=HUB, label=LABELS, mask=HUB)
    with pytest.raises(StageError, match=r"'image', 'mask' may all hold .*drop_columns\(\['mask'"):
        open_source(spec)
    # The metadata names the one that is no mask; an embedding is no image beside files.
    features = {"image": {"_type": "Image"}, "mask": {"_type": "Audio"}}
    vectors = pa.array([[1, 2, 3, 4]] * 30, pa.list_(pa.int64()))
    spec = write(tmp_path / "other.parquet", features, image=HUB, mask=HUB, vector=vectors)
    assert_are_the_blobs(read(spec)[1])


@pytest.mark.parametrize(
    "column, message",
    [
        (nested(IMAGES, pa.float32()), r"'image' \(list<.*float.*whole numbers 0 to 255 in lists"),
        (pa.array(["http://host/a.png"] * 30), r"'image' \(string\).* expected a column of image"),
        (
            pa.array([[0] * 3072] * 30, pa.list_(pa.uint8())),
            r"none of its 30 images .*which may be 3×32×32 or 32×32×3; .*transpose\(1, 2, 0\)",
        ),
        (pa.array([[0] * 783] * 30, pa.list_(pa.uint8())), "783 pixels, which is no square"),
        (nested([i.transpose(2, 0, 1) for i in COLOURS], pa.uint8()), "3×12×8 numbers, expected"),
        (pa.array([b"no image"] * 30), "set.parquet#0: 8 bytes that are no image"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, column, message):
    with pytest.raises(StageError, match=message):
        _ = open_source(write(tmp_path / "set.parquet", image=column, label=LABELS)).image_shape


def test_rows_without_an_image_are_quarantined(tmp_path):
    structs = HUB.to_pylist()
    structs[1], structs[2] = None, {"bytes": None, "path": "images/2.png"}
    structs[3] = {"bytes": None, "path": None}
    structs[4] = {"bytes": PNGS[4][:60], "path": "4.png"}
    structs[5] = {"bytes": PNGS[5] + b"\0" * 1_050_000, "path": "5.png"}
    spec = write(tmp_path / "a.parquet", image=pa.array(structs, STRUCT), label=LABELS)
    _, images, labels = read(spec, max_image_pixels=96)
    assert images[1] == images[3] == "no image (null)"
    assert images[2].startswith("no image, only the path 'images/2.png': write the bytes")
    assert "damaged image" in images[4] and "bytes, expected at most 1,048,960" in images[5]
    assert_are_the_blobs([images[0], *images[6:]], [IMAGES[0], *IMAGES[6:]])
    assert labels == LABELS.tolist()
    lists = [image.tolist() for image in IMAGES]
    lists[1], lists[2] = None, [[0, 1], [2]]
    lists[3], lists[4], lists[5], lists[6] = [[0]], [[0, None]], [], [[], []]
    _, images, _ = read(write(tmp_path / "b.parquet", image=pa.array(lists)))
    assert images[1] == "no image (null)" and "different lengths" in images[2]
    assert images[3].shape == (1, 1, 1) and "null, expected whole" in images[4]
    assert images[5] == images[6] == "a list without pixels"
    assert_are_the_blobs([images[0], *images[7:]], [IMAGES[0], *IMAGES[7:]])


def test_transparent_and_large_images_as_the_flags_say(tmp_path):
    pixels = np.dstack([np.zeros((12, 8, 3), np.uint8), IMAGES[0]])
    spec = write(tmp_path / "a.parquet", image=pa.array([png(pixels), PNGS[0]]))
    assert "--background" in read(spec)[1][0]
    image = read(spec, background="#ffffff")[1][0]
    np.testing.assert_array_equal(image[..., 0], 255 - IMAGES[0])
    with pytest.raises(StageError, match="12×8 = 96 pixels, expected at most 95"):
        _ = open_source(spec, SourceOptions(max_image_pixels=95)).image_shape
    lists = write(tmp_path / "b.parquet", image=nested(IMAGES, pa.uint8()))
    assert "12×8 = 96 pixels, expected at most 95" in read(lists, max_image_pixels=95)[1][0]


FLAT = pa.array([image.ravel().tolist() for image in SQUARES])
BOXES = pa.array([[1, 2, 30, 40]] * 30)


@pytest.mark.parametrize(
    "columns",
    [
        {"bbox": BOXES},
        {"input_ids": pa.array([list(range(64))] * 30)},
        {"hist": pa.array([[1] * 256] * 30, pa.list_(pa.uint8()))},
        {"image": pa.array(["a.png"] * 30), "image_sizes": BOXES},
        {"image_id": BOXES, "label": LABELS},
    ],
)
def test_short_lists_are_no_images(tmp_path, columns):
    [flat] = columns.keys() - {"image", "label"}
    message = f"nothing says that the numbers in '{flat}' are pixels; if they are, name the "
    with pytest.raises(StageError, match=message):
        open_source(write(tmp_path / "set.parquet", **columns))
    # Beside images they are not read, and named.
    spec = write(tmp_path / "beside.parquet", **columns | {"image": HUB, "label": LABELS})
    source, images, _ = read(spec)
    assert_are_the_blobs(images)
    assert f"columns that are not read: '{flat}'" in source.notes


@pytest.mark.parametrize(
    "name", ["image", "images", "img", "pixels", "pixel_values", "data", "x", "Image_Raw"]
)
def test_a_name_or_the_metadata_makes_a_flat_list_pixels(tmp_path, name):
    spec = write(tmp_path / "a.parquet", **{"bbox": BOXES, name: FLAT})
    assert_are_the_blobs(read(spec)[1], SQUARES)
    features = {"vector": {"_type": "Array2D"}}
    spec = write(tmp_path / "b.parquet", features, **{"vector": FLAT})
    assert_are_the_blobs(read(spec)[1], SQUARES)


def test_lists_of_lists_are_pixels_if_nothing_else_is(tmp_path):
    pixels = nested(IMAGES, pa.uint8())
    assert_are_the_blobs(read(write(tmp_path / "a.parquet", bbox=BOXES, digit=pixels))[1])
    spec = write(tmp_path / "b.parquet", image=HUB, label=LABELS, boxes=pixels)
    assert "columns that are not read: 'boxes'" in read(spec)[0].notes
    with pytest.raises(StageError, match="'digit', 'boxes' may all hold the images"):
        open_source(write(tmp_path / "c.parquet", digit=pixels, boxes=pixels))


def test_image_files_of_two_types_are_two_candidates(tmp_path):
    columns = {"image": pa.array(PNGS), "thumb": HUB, "label": LABELS}
    digests = pa.array([bytes(16)] * 30, pa.binary(16))
    with pytest.raises(
        StageError, match=r"'image', 'thumb' may all hold .*drop_columns\(\['thumb'"
    ):
        open_source(write(tmp_path / "a.parquet", **columns, md5=digests))
    with pytest.raises(StageError, match="'image', 'thumb' may all hold"):
        open_source(write(tmp_path / "b.parquet", **columns | {"thumb": HUB, "image": FLAT}))
    spec = write(tmp_path / "c.parquet", {"image": {"_type": "Image"}}, **columns, md5=digests)
    assert_are_the_blobs(read(spec)[1])
    spec = write(tmp_path / "d.parquet", image=HUB, label=LABELS, md5=digests)
    assert "columns that are not read: 'md5'" in read(spec)[0].notes


@pytest.mark.parametrize("value_type", [pa.int8(), pa.int16(), pa.uint16(), pa.int32(), pa.int64()])
def test_numbers_that_are_no_pixels_are_refused_early(tmp_path, value_type):
    pixels = [image.astype(np.int16) // 3 for image in IMAGES]
    pixels[-1][0, 0] = bad = 256 if value_type in (pa.int16(), pa.uint16()) else -1
    spec = write(tmp_path / "a.parquet", image=nested(pixels, value_type))
    with pytest.raises(StageError, match=r"holds numbers -?\d+ to \d+; expected pixels 0 to 255: "):
        open_source(spec)
    pixels[-1][0, 0] = min(max(bad, 0), 255)
    column = nested(pixels, value_type if bad < 0 else pa.int16())
    images = read(write(tmp_path / "b.parquet", image=column))[1]
    assert_are_the_blobs(images, np.stack(pixels).astype(np.uint8))


@pytest.mark.parametrize("highest, limit", [(1, 1), (2, 16), (16, 16), (17, None), (0, None)])
def test_lists_that_are_nearly_black_are_said(tmp_path, highest, limit):
    pixels = [np.minimum(image, highest) for image in IMAGES]
    for name, column in (("a", nested(pixels, pa.uint8())), ("b", HUB)):
        source, images, _ = read(write(tmp_path / f"{name}.parquet", image=column))
        assert_are_the_blobs(images, pixels if name == "a" else IMAGES)
        warnings = [note for note in source.notes if note.startswith("warning")]
        assert len(warnings) == (name == "a" and limit is not None)
        for note in warnings:
            assert f"at most {highest} of 255, nearly black, and stored as they are" in note
            assert f"(255 * x / {limit}).round() makes {limit} white" in note


def test_images_of_16_bits_are_said(tmp_path):
    files = [png(image.astype(np.uint16) * 257) for image in IMAGES[:20]]
    source, images, _ = read(write(tmp_path / "a.parquet", image=pa.array([*files, *PNGS[20:]])))
    assert_are_the_blobs(images)
    assert source.image_shape == (12, 8, 1)
    assert source.notes[-1] == "20 images of 16 bits are scaled to 8 bits: 65535 becomes 255"
    source = open_source(hub(tmp_path / "b.parquet"))
    assert source.image_shape and not any("16 bits" in note for note in source.notes)


def test_grey_images_before_a_coloured_background_have_the_shape_that_is_read(tmp_path):
    pixels = np.dstack([IMAGES[0], 255 - IMAGES[0]])
    source, images, _ = read(
        write(tmp_path / "a.parquet", image=pa.array([png(pixels)])), background="#ff0000"
    )
    assert source.image_shape == images[0].shape == (12, 8, 3)


def test_lists_of_labels_are_no_images(tmp_path):
    columns = {"pixels": nested(IMAGES, pa.uint8()), "labels": pa.array([[0, 1, 0, 1]] * 30)}
    spec = write(tmp_path / "set.parquet", **columns)
    with pytest.raises(StageError, match="'labels' is list<.* ignore labels with --labels=none"):
        open_source(spec)
    assert_are_the_blobs(read(spec, labels="none")[1])


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([HUB, HUB], names=["image", "image"])
    pq.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(StageError, match="set.parquet has two columns 'image'; expected one of"):
        open_source(f"parquet:{tmp_path}/set.parquet")


# Labels.


@pytest.mark.parametrize(
    "column, names, expected",
    [
        (LABELS.astype(np.float32), [str(i) for i in range(10)], LABELS),
        (pa.array(LABELS % 2 == 1), ["false", "true"], LABELS % 2),
        (pa.array([NAMES[9 - n] for n in LABELS]), NAMES, 9 - LABELS.astype(int)),
        (
            pa.array([NAMES[9 - n] for n in LABELS]).dictionary_encode(),
            NAMES,
            9 - LABELS.astype(int),
        ),
        (
            pa.array([f"{3 * n}" for n in LABELS], pa.large_string()),
            [f"{3 * i}" for i in range(10)],
            LABELS,
        ),
        (pa.array([-1] * 30), [], [-1] * 30),
        (pa.array([None] * 30), [], [-1] * 30),
    ],
    ids=["floats", "booleans", "texts", "dictionary", "numbers as texts", "minus one", "nulls"],
)
def test_labels_are_what_they_say(tmp_path, column, names, expected):
    source, images, labels = read(write(tmp_path / "set.parquet", image=HUB, label=column))
    assert_are_the_blobs(images)
    assert source.class_names == names and labels == list(expected)
    if not names:
        assert "30 of 30 records are unlabelled: a label is missing, null or -1" in source.notes


def test_labels_that_are_none_are_quarantined_and_missing_ones_are_not(tmp_path):
    labels = LABELS.astype(float)
    labels[:6] = [-1, np.nan, 2.5, 10, -2, np.inf]
    features = {"image": {"_type": "Image"}, "label": CLASS_LABEL}
    spec = write(tmp_path / "a.parquet", features, image=HUB, label=labels)
    _, images, read_labels = read(spec)
    assert read_labels[:2] == [-1, -1] and read_labels[6:] == LABELS[6:].tolist()
    assert images[2] == images[5] == "label that is no whole number, expected -1 to 9"
    assert images[3:5] == ["label 10, expected -1 to 9", "label -2, expected -1 to 9"]
    assert_are_the_blobs([*images[:2], *images[6:]], [*IMAGES[:2], *IMAGES[6:]])
    source, images, read_labels = read(spec, labels="none")
    assert_are_the_blobs(images)
    assert read_labels == [-1] * 30 and source.class_names == []
    texts = pa.array([None, "", *(NAMES[n] for n in LABELS[2:])])
    assert read(write(tmp_path / "b.parquet", image=HUB, label=texts))[2][:2] == [-1, -1]


@pytest.mark.parametrize(
    "others, taken",
    [
        ({"digit": LABELS}, "'digit' holds the labels, the only one that can"),
        ({"Label": LABELS, "caption": pa.array(["x"] * 30)}, "'Label' holds the labels"),
        ({"cls": LABELS, "__key__": pa.array(["x"] * 30), "json": pa.array([b"{}"] * 30)}, "'cls'"),
        ({"fold": LABELS}, "no column holds labels; of 'fold'"),
        ({"digit": LABELS, "fold": LABELS}, "'digit' holds the labels, the only one that can"),
        ({"id": LABELS, "file_name": pa.array(["x"] * 30)}, "no column holds labels; of 'id'"),
        ({"boxes": pa.array([[1.5, 2.5]] * 30)}, "no column holds labels; of 'boxes' (list<"),
        ({}, "no column holds labels"),
    ],
)
def test_the_column_of_labels_is_found(tmp_path, others, taken):
    source, images, labels = read(write(tmp_path / "set.parquet", image=HUB, **others))
    assert_are_the_blobs(images)
    assert any(taken in note for note in source.notes), source.notes
    assert labels == (
        LABELS.tolist() if "holds the labels" in taken or "cls" in others else [-1] * 30
    )


@pytest.mark.parametrize(
    "others, error, message",
    [
        ({"text": pa.array(["x"] * 30)}, UsageError, "'text' is string, and may hold classes or "),
        ({"score": LABELS / 10}, UsageError, "'score' is double, and may hold classes or"),
        (
            {"time": np.arange(30) + 1_700_000_000},
            UsageError,
            "'time' differs in all 30 rows; expected labels, which repeat: --label_column=time",
        ),
        ({"a": pa.array([*range(29), None])}, UsageError, "'a' differs in all 29 rows"),
        ({"a": LABELS, "b": LABELS}, UsageError, r"'a', 'b' may hold the labels; .*_column=a or"),
        ({"label": LABELS, "class": LABELS}, UsageError, "'label', 'class' may hold the labels"),
        ({"label": pa.array([[1, 2]] * 30)}, StageError, r"'label' is list<.*--labels=none"),
        (
            {"label": pa.array(["x" * 2000] * 30)},
            StageError,
            "'label' holds a label of 2,000 bytes",
        ),
        ({"label": LABELS.astype(int) + 70_000}, StageError, r"column 'label': labels up to 7000"),
        pytest.param(
            {"label": pa.array([str(i) for i in range(69_990)])},
            StageError,
            "'label' holds more than 65,536 different labels",
            marks=pytest.mark.long,
        ),
        (
            {"label": pa.array([2**64 - 1] * 30, pa.uint64())},
            StageError,
            "'label' holds .*18446744",
        ),
    ],
)
def test_the_column_of_labels_is_not_guessed(tmp_path, others, error, message):
    image = pa.concat_arrays([HUB] * (len(next(iter(others.values()))) // 30))
    spec = write(tmp_path / "set.parquet", image=image, **others, settings={})
    with pytest.raises(error, match=message) as raised:
        open_source(spec)
    assert type(raised.value) is error
    assert_are_the_blobs(read(spec, labels="none")[1][:30])


def test_numbers_that_all_differ_are_labels_if_something_says_so(tmp_path):
    numbers = np.arange(30)
    for name, options in (("age", {"label_column": "age"}), ("label", {})):
        spec = write(tmp_path / f"{name}.parquet", image=HUB, **{name: numbers})
        assert read(spec, **options)[2] == numbers.tolist()
    spec = write(tmp_path / "few.parquet", image=HUB[:19], age=numbers[:19])
    assert read(spec)[2] == numbers[:19].tolist()
    # A value repeats in another file.
    write(tmp_path / "set" / "train.parquet", image=HUB, digit=numbers)
    write(tmp_path / "set" / "test.parquet", image=HUB[:5], digit=numbers[:5])
    assert len(read(f"parquet:{tmp_path}/set")[0].class_names) == 30


def test_columns_that_are_not_read_are_named(tmp_path):
    columns = {"image": HUB, "label": LABELS, "age": LABELS, "fine_label": LABELS}
    spec = write(tmp_path / "a.parquet", **columns)
    assert "columns that are not read: 'age', 'fine_label'" in read(spec)[0].notes
    notes = read(spec, labels="none")[0].notes
    assert "columns that are not read: 'label', 'age', 'fine_label'" in notes
    assert not any("not read" in note for note in read(hub(tmp_path / "b.parquet"))[0].notes)
    many = {f"of_{number}": LABELS for number in range(25)}
    note = next(
        n for n in read(write(tmp_path / "c.parquet", **columns | many))[0].notes if "…" in n
    )
    assert note.endswith("'of_17', … (27 in all)")


@pytest.mark.parametrize("text", ["nan", "NaN", "NA", "None"])
def test_texts_of_a_missing_label_are_no_class(tmp_path, text):
    labels = pa.array([text, "", None, *("10" if n % 2 else "9" for n in LABELS[3:])])
    source, images, read_labels = read(write(tmp_path / "a.parquet", image=HUB, label=labels))
    assert_are_the_blobs(images)
    assert source.class_names == ["9", "10"] and read_labels[:3] == [-1, -1, -1]
    assert read_labels[3:] == (LABELS[3:] % 2).tolist()
    assert source.notes[-1] == (
        "3 of 30 records are unlabelled: a label is missing, null or -1, or the text " + repr(text)
    )
    features = {"label": {"_type": "ClassLabel", "names": ["10", text, "9"]}}
    source, _, read_labels = read(write(tmp_path / "b.parquet", features, image=HUB, label=labels))
    assert source.class_names == ["10", text, "9"] and read_labels[:3] == [1, -1, -1]
    assert source.notes[-1].endswith(
        "2 of 30 records are unlabelled: a label is missing, null or -1"
    )
    source, _, read_labels = read(
        write(tmp_path / "c.parquet", image=HUB, label=pa.array([text] * 30))
    )
    assert source.class_names == [] and set(read_labels) == {-1}


@pytest.mark.parametrize(
    "column, shown",
    [
        (LABELS, "4; expected one of the 4 classes"),
        (pa.array([NAMES[n] for n in LABELS]), "'e'; expected one of the 4 classes"),
        (pa.array([n if n < 4 else 2.5 for n in LABELS]), "2.5"),
    ],
    ids=["numbers", "texts", "fractions"],
)
def test_labels_beyond_the_names_of_the_metadata_are_counted(tmp_path, column, shown):
    features = {"label": {"_type": "ClassLabel", "names": NAMES[:4]}}
    source, images, _ = read(write(tmp_path / "a.parquet", features, image=HUB, label=column))
    count = int((LABELS >= 4).sum())
    assert source.class_names == NAMES[:4]
    assert sum(isinstance(image, str) for image in images) == count > 0
    such_as = f", such as {shown}" if shown != "2.5" else "; expected one of the 4 classes"
    assert f"{count} of 30 records go to quarantine by their labels{such_as}" in source.notes


WORDS = pa.array(["train"] * 20 + ["test"] * 10)


@pytest.mark.parametrize("name", ["split", "Subset", "fold", "partition"])
@pytest.mark.parametrize("labels", ["auto", "none"])
def test_splits_in_a_column_are_refused_and_the_remedy_works(tmp_path, monkeypatch, name, labels):
    columns = {"image": HUB, "label": LABELS, name: WORDS}
    spec = write(tmp_path / "all.parquet", **columns)
    expected = f"column '{name}' holds 'train', 'test' for train and test, and splits are"
    with pytest.raises(UsageError, match=expected) as raised:
        open_source(spec, SourceOptions(labels=labels))
    assert type(raised.value) is UsageError
    lines = str(raised.value).split("pq.write_table")
    monkeypatch.chdir(tmp_path)
    exec("pq.write_table" + lines[1].partition(" with ")[0])
    source, images, _ = read("parquet:train.parquet")
    assert_are_the_blobs(images, IMAGES[:20])  # The file's name says the same.
    assert source.split_sizes == {"train": 20}
    assert f"columns that are not read: '{name}'" in source.notes
    exec("pq.write_table" + lines[2].replace("OTHER_FILE", "'other.parquet'"))
    assert_are_the_blobs(read("parquet:other.parquet")[1])


def test_splits_in_a_column_in_other_forms(tmp_path):
    features = {"split": {"_type": "ClassLabel", "names": ["test", "train"]}}
    numbers = pa.array([1] * 20 + [0] * 10)
    spec = write(tmp_path / "a.parquet", features, image=HUB, split=numbers)
    with pytest.raises(UsageError, match=r"holds 1, 0 for train and test, .*'split', '==', 1\)"):
        open_source(spec)
    spec = write(tmp_path / "b.parquet", image=HUB, split=WORDS.dictionary_encode())
    with pytest.raises(UsageError, match="holds 'train', 'test' for"):
        open_source(spec)
    # A file whose name states another split, and one whose words are the split of its name.
    with pytest.raises(UsageError, match="holds 'train' for train, and splits"):
        open_source(write(tmp_path / "test.parquet", image=HUB[:20], split=WORDS[:20]))
    # The requested labels; words that are no splits.
    spec = write(tmp_path / "c.parquet", image=HUB, split=WORDS)
    assert read(spec, label_column="split")[0].class_names == ["test", "train"]
    spec = write(tmp_path / "d.parquet", image=HUB, label=LABELS, subset=pa.array(["a", None] * 15))
    assert "columns that are not read: 'subset'" in read(spec)[0].notes


def test_two_levels_of_labels_need_a_flag(tmp_path):
    coarse = {"_type": "ClassLabel", "names": ["low", "high"]}
    features = {"img": {"_type": "Image"}, "fine_label": CLASS_LABEL, "coarse_label": coarse}
    columns = {"img": HUB, "fine_label": LABELS, "coarse_label": LABELS // 5}
    spec = write(tmp_path / "train.parquet", features, **columns)
    with pytest.raises(UsageError, match="'fine_label', 'coarse_label' .*--label_column=fine_labe"):
        open_source(spec)
    source, _, labels = read(spec, label_column="coarse_label")
    assert source.class_names == ["low", "high"] and labels == (LABELS // 5).tolist()
    for name in ("first", "digit", "img"):
        with pytest.raises(
            UsageError, match=f"--label_column={name}: .*'fine_label' .*the name of"
        ):
            open_source(spec, SourceOptions(label_column=name))


@pytest.mark.parametrize(
    "metadata", [b"", b"{", b"[]", b'{"info": {"features": [1]}}', b"[" * 9999, b"\xff"]
)
def test_metadata_that_is_damaged_is_none(tmp_path, metadata):
    table = pa.table({"image": HUB, "label": LABELS})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
    assert read(f"parquet:{tmp_path}/a.parquet")[0].class_names == [str(i) for i in range(10)]


# Files and splits.


@pytest.mark.parametrize(
    "paths",
    [
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["data/train-00000-of-00001-0a1b2c3d4e5f.parquet", "data/test-00000-of-00001-9f8e.parquet"],
        ["mnist/train/0000.parquet", "mnist/test/0000.parquet"],
        ["split=train/part-0.parquet", "split=test/part-0.parq"],
    ],
)
def test_splits_are_named_by_files_and_directories(tmp_path, paths):
    for path, rows in zip(paths, (slice(0, 20), slice(20, 30)), strict=True):
        hub(tmp_path / "set" / path, rows)
    (tmp_path / "set" / "README.md").write_text("A set.")
    source, images, labels = read(f"parquet:{tmp_path}/set")
    assert_are_the_blobs(images)
    assert source.split_sizes == {"train": 20, "test": 10} and labels == LABELS.tolist()
    ids = source.ids(np.array([0, 19, 20, 29]))
    assert ids == [f"{paths[i // 2]}#{row}".encode() for i, row in enumerate([0, 19, 0, 9])]
    assert source.where(20) == f"{tmp_path}/set/{paths[1]}#0"
    assert source.class_names == NAMES and source.ignored == {".md": 1}
    assert "files are of the splits that their paths name: 1 of train, 1 of test" in source.notes


def test_a_file_a_directory_and_a_pattern(tmp_path):
    for number in range(3):
        rows = slice(10 * number, 10 * number + 10)
        hub(tmp_path / "set" / f"train-{number:05d}-of-00003.parquet", rows)
    hub(tmp_path / "set" / "test-00000-of-00001.parquet", slice(0, 5))
    hub(tmp_path / "other" / "set.parquet", slice(0, 4))
    place = f"parquet:{tmp_path}"
    sizes = {
        "set/train-00001-of-00003.parquet": {"train": 10},
        "set": {"train": 30, "test": 5},
        "set/": {"train": 30, "test": 5},
        "set/train-*.parquet": {"train": 30},
        "set/t[er]*-00000-*": {"train": 10, "test": 5},
        "*/train-0000[!0]-?f-*.parquet": {"train": 20},
        "**/train-*.parquet": {"train": 30},
        "other/set.parquet": {"unsplit": 4},
    }
    for rest, expected in sizes.items():
        assert open_source(f"{place}/{rest}").split_sizes == expected, rest
    # The same files, wherever they lie; a change of a byte is another set.
    fingerprints = {open_source(f"{place}/{rest}").fingerprint() for rest in ("set", "set/*")}
    os.rename(tmp_path / "set", tmp_path / "moved")
    fingerprints.add(open_source(f"{place}/moved").fingerprint())
    assert len(fingerprints) == 1
    for options in ({"labels": "none"}, {}):
        fingerprints.add(
            open_source(f"{place}/moved/train*", SourceOptions(**options)).fingerprint()
        )
    assert len(fingerprints) == 3
    for rest in ("none", "[z-a]*.parquet", "moved/*.csv", "none/*.parquet", ""):
        with pytest.raises(StageError):
            open_source(f"{place}/{rest}" if rest else "parquet:")


@pytest.mark.parametrize(
    "paths, message",
    [
        (
            ["mnist/train.parquet", "fashion/train.parquet"],
            "fashion/, mnist/ all hold train; expec",
        ),
        (["a/0.parquet", "b/0.parquet"], r"a/, b/ all hold files; .*\*\*/\*.parquet"),
        (
            ["train.parquet", "extra.parquet"],
            "train.parquet names a split, and extra.parquet names",
        ),
    ],
)
def test_directories_that_each_are_a_set_are_refused(tmp_path, paths, message):
    for path in paths:
        hub(tmp_path / path)
    with pytest.raises(StageError, match=message):
        open_source(f"parquet:{tmp_path}")


def test_a_column_in_the_names_of_directories_is_not_lost_in_silence(tmp_path):
    write(tmp_path / "label=3" / "0.parquet", image=HUB)
    with pytest.raises(StageError, match="the directory label=3/ names a column"):
        open_source(f"parquet:{tmp_path}")
    assert_are_the_blobs(read(f"parquet:{tmp_path}", labels="none")[1])


def test_a_test_split_without_labels(tmp_path):
    hub(tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", {"image": {"_type": "Image"}}, image=HUB, id=LABELS)
    source, images, labels = read(f"parquet:{tmp_path}")
    assert_are_the_blobs(images, [*IMAGES, *IMAGES])
    assert labels == [*LABELS.tolist(), *[-1] * 30] and source.class_names == NAMES
    assert "test.parquet has no column 'label': its records are unlabelled" in source.notes


def test_texts_of_all_files_are_the_classes(tmp_path):
    for split, texts in (("train", ["dog", "cat"]), ("test", ["emu", "dog"])):
        write(tmp_path / f"{split}.parquet", image=HUB[:2], label=pa.array(texts))
    source, _, labels = read(f"parquet:{tmp_path}")
    assert source.class_names == ["cat", "dog", "emu"] and labels == [1, 0, 2, 1]


@pytest.mark.parametrize(
    "columns, features, message",
    [
        (
            {"image": HUB, "label": pa.array(["x"] * 30)},
            None,
            "numbers in .* and texts in test.par",
        ),
        ({"img": HUB, "label": LABELS}, None, r"test.parquet holds 'img' \(.*images in 'image' as"),
        (
            {"image": LABELS, "label": LABELS},
            None,
            "test.parquet has 'image' as uint8; expected im",
        ),
        (
            {"image": nested(IMAGES, pa.uint8()), "label": LABELS},
            None,
            "'image' is struct<.* and list<",
        ),
        (
            {"image": HUB, "label": LABELS},
            {"label": {"_type": "ClassLabel", "names": NAMES[:4]}},
            r"class 4 is e by the metadata of train.parquet, and missing by",
        ),
    ],
)
def test_files_that_contradict_each_other_are_refused(tmp_path, columns, features, message):
    hub(tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", features, **columns)
    with pytest.raises(StageError, match=message):
        open_source(f"parquet:{tmp_path}")


# Storage, changes, damage.


@pytest.mark.parametrize("form", ["set", "set/train.parquet", "set/*.parquet"])
def test_a_url_is_the_same_set(tmp_path, form):
    hub(tmp_path / "set" / "train.parquet", slice(0, 20))
    hub(tmp_path / "set" / "test.parquet", slice(20, 30))
    url = f"memory://{tmp_path.name}-{form[3:4] == '/'}-{len(form)}"
    fsspec.filesystem("memory").put(str(tmp_path / "set"), f"{url}/set", recursive=True)
    source, images, labels = read(f"parquet:{url}/{form}")
    local, local_images, local_labels = read(f"parquet:{tmp_path}/{form}")
    assert source.fingerprint() == local.fingerprint() and labels == local_labels
    assert_are_the_blobs(images, local_images)
    assert source.ids(np.arange(3)) == local.ids(np.arange(3))
    fsspec.filesystem("memory").pipe(f"{url}/set/train.parquet", b"other")
    assert source.listing() != source.listed


def test_an_object_store_that_fails_now_and_then(tmp_path, object_store):
    from tests.storage import object_stores

    for split in ("train", "test"):
        hub(tmp_path / f"{split}.parquet")
        object_store.put(f"parquet/{split}.parquet", (tmp_path / f"{split}.parquet").read_bytes())
    with object_store.deciding(object_stores.failing_every(9)):
        source, images, _ = read(f"parquet:gs://{object_stores.BUCKET}/parquet")
    assert_are_the_blobs(images, [*IMAGES, *IMAGES])
    assert source.fingerprint() == open_source(f"parquet:{tmp_path}").fingerprint()


def test_a_set_that_changes_is_noticed(tmp_path):
    spec = hub(tmp_path / "set" / "train.parquet").rpartition("/")[0]
    conversion.open_source_once.cache_clear()
    source = conversion.open_converted(conversion.SourceSpec(spec))
    worker = source.for_workers()
    hub(tmp_path / "set" / "test.parquet")
    with pytest.raises(SourceChanged, match=r"test\.parquet is new"):
        source.check_unchanged()
    (tmp_path / "set" / "test.parquet").unlink()
    source.check_unchanged()
    os.utime(tmp_path / "set" / "train.parquet", (1, 1))
    with pytest.raises(SourceChanged, match=r"train\.parquet was changed"):
        source.check_unchanged()
    conversion.open_source_once.cache_clear()
    with pytest.raises(SourceChanged, match="a worker finds other files"):
        conversion.open_converted(worker)


@pytest.mark.parametrize("is_url", [False, True])
def test_a_file_that_changes_after_the_listing(tmp_path, monkeypatch, is_url):
    from pipeline.sources.readers.parquet_files import listing

    list_files, memory = listing.list_files, fsspec.filesystem("memory")
    hub(tmp_path / "set" / "train.parquet")
    place = f"memory://{tmp_path.name}/set" if is_url else f"{tmp_path}/set"
    memory.put(str(tmp_path / "set"), f"memory://{tmp_path.name}/set", recursive=True)

    def list_and_change(path):
        listed = list_files(path)
        hub(tmp_path / "set" / "train.parquet", slice(0, 9))
        memory.put(f"{tmp_path}/set/train.parquet", f"memory://{tmp_path.name}/set/train.parquet")
        return listed

    monkeypatch.setattr(listing, "list_files", list_and_change)
    with pytest.raises(SourceChanged, match="train.parquet: was changed while it was in use"):
        open_source(f"parquet:{place}")


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    from pipeline.sources.readers.parquet_files import values

    spec, cells = hub(tmp_path / "train.parquet"), values.cells

    def change_and_read(*args):
        os.utime(tmp_path / "train.parquet", (1, 1))
        return cells(*args)

    monkeypatch.setattr(values, "cells", change_and_read)
    with pytest.raises(SourceChanged, match="was changed while it was in use"):
        open_source(spec)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "wb", buffering=0))
    with pytest.raises(StageError, match="No space left on device; .* name another one with TMPD"):
        open_source(hub(tmp_path / "set.parquet"))


def corrupt(data: bytes) -> bytes:
    """Other bytes in the middle of a page."""
    return data[:400] + bytes(200) + data[600:]


DAMAGE = {
    "no Parquet file": lambda data: b"label,pixel0\n" * 99,
    "empty": lambda data: b"",
    "short": lambda data: data[:3],
    "cut": lambda data: data[: len(data) // 2],
    "only the end": lambda data: data[-60:],
    "encrypted": lambda data: b"PARE" + data[4:-4] + b"PARE",
    "a page": corrupt,
    "the footer": lambda data: data[:-100] + bytes(90) + data[-10:],
    "another number of rows": lambda data: data.replace(b"\x16\x3c\x19", b"\x16\x3e\x19"),
    "a footer longer than the file": lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(tmp_path, damage):
    hub(tmp_path / "set.parquet")
    settings = {"write_page_checksum": True, "compression": "none"}
    pq.write_table(pq.read_table(tmp_path / "set.parquet"), tmp_path / "set.parquet", **settings)
    data = DAMAGE[damage]((tmp_path / "set.parquet").read_bytes())
    (tmp_path / "set.parquet").write_bytes(data)
    with pytest.raises(StageError, match=r"set.parquet: not a Parquet file that can be read \("):
        open_source(f"parquet:{tmp_path}/set.parquet")


def test_any_damage_is_told_or_harmless(tmp_path):
    hub(tmp_path / "whole.parquet")
    data, generator = (tmp_path / "whole.parquet").read_bytes(), np.random.default_rng(0)
    for number in range(150):
        bad = bytearray(data)
        for place in generator.integers(len(data) // 2 if number % 2 else 0, len(data), 3):
            bad[place] ^= int(generator.integers(1, 256))
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(bad)
        try:
            _, images, _ = read(f"parquet:{path}")
            assert len(images) <= 30
        except StageError as error:
            assert ";" in str(error)


BOMBS = {
    "zeros": {"image": pa.array([bytes(100_000_000)], pa.large_binary())},
    "repeated": {"image": pa.array([bytes(9_000_000)] * 40)},
    "pixels": {"image": pa.array([np.zeros(20_000_000, np.uint8)], pa.list_(pa.uint8()))},
    "nulls": {"image": pa.nulls(1_000_000, pa.binary())},
}
# The peak of resource.getrusage would begin at the memory of the process that starts this one.
MEMORY = """
import re, sys
from pipeline.cli.errors import StageError
from pipeline.sources import open_source
for path in sys.argv[1:]:
    try:
        open_source(f"parquet:{path}")
        print("read")
    except StageError as error:
        print(error)
    print(int(re.search("VmHWM: *(.*) kB", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.fixture
def opened_in_a_process(tmp_path):
    """Opens a plain file, then others; (outcome of each other, peak memory that it adds in MB)."""

    def open_them(*paths) -> list[tuple[str, int]]:
        hub(tmp_path / "small.parquet")
        command = [sys.executable, "-c", MEMORY, tmp_path / "small.parquet", *paths]
        done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        outcomes, peaks = lines[2::2], list(map(int, lines[1::2]))
        return [(text, peak - peaks[0]) for text, peak in zip(outcomes, peaks[1:], strict=True)]

    return open_them


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_bombs_take_no_memory(tmp_path, opened_in_a_process):
    for name, columns in BOMBS.items():
        write(tmp_path / f"{name}.parquet", settings={"compression": "zstd"}, **columns)
        assert (tmp_path / f"{name}.parquet").stat().st_size < 200_000
    for text, peak in opened_in_a_process(*(tmp_path / f"{name}.parquet" for name in BOMBS)):
        assert "expected at most 1,032 times as many" in text or "states 1,000,000 rows" in text
        assert peak < 200


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_memory_is_bounded_by_a_batch_and_not_by_a_row_group(tmp_path, opened_in_a_process):
    generator = np.random.default_rng(0)
    images = [png(generator.integers(0, 256, (300, 300, 3), np.uint8)) for _ in range(3)]
    table = pa.table({"image": pa.array(images * 213)})  # 173 MB.
    for name, use_dictionary in (("repeated", True), ("plain", False)):
        settings = {"use_dictionary": use_dictionary, "write_batch_size": 9}
        pq.write_table(table, tmp_path / f"{name}.parquet", **settings)
    opened = opened_in_a_process(tmp_path / "repeated.parquet", tmp_path / "plain.parquet")
    assert [text for text, _ in opened] == ["read", "read"]
    assert max(peak for _, peak in opened) < 180, opened


# The whole job.


def test_a_set_of_the_hub_becomes_shards(tmp_path):
    hub(tmp_path / "set" / "train-00000-of-00001.parquet")
    hub(tmp_path / "set" / "test-00000-of-00001.parquet", slice(0, 10))
    source, out = f"parquet:{tmp_path}/set", tmp_path / "out"
    make_shards(source, out, num_shards=2)
    dataset = reader.Dataset(str(out))
    assert dataset.manifest["class_names"] == NAMES
    found = {}
    for split in dataset.splits:
        for entry in dataset.shards(split):
            shard = dataset.read_shard(entry)
            for record in zip(shard.ids, shard.images, shard.labels.tolist(), strict=True):
                found[record[0]] = record[1:]
    assert len(found) == 40
    for split, count in (("train", 30), ("test", 10)):
        for row in range(count):
            image, label = found[f"{split}-00000-of-00001.parquet#{row}"]
            np.testing.assert_array_equal(image.reshape(12, 8), IMAGES[row])
            assert label == LABELS[row]
