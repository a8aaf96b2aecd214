"""Arrays as people have them: npz, npy and idx of any dtype and order of axes, or a remedy."""

import gzip
import pathlib
import resource
import struct
import tracemalloc

import numpy as np
import pytest

from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import reader
from pipeline.datasets.building import reading
from pipeline.sources import SourceOptions, conversion, open_source
from pipeline.sources.readers.array_layout import pairs, stored, values
from tests.conftest import make_shards, write_idx

GENERATOR = np.random.default_rng(3)
GREY = GENERATOR.integers(0, 256, (40, 6, 6), np.uint8)
GREY[0, 0, :2] = 0, 255
COLOUR = GENERATOR.integers(0, 256, (40, 6, 6, 3), np.uint8)
LABELS = np.arange(40) % 7


def npz(path: pathlib.Path, **arrays) -> str:
    np.savez(path / "set.npz", **arrays)
    return f"npz:{path}/set.npz"


def records(source) -> tuple[np.ndarray, list[int]]:
    images, labels = source.read(np.arange(sum(source.split_sizes.values())))
    return np.asarray(images), labels.tolist()


def read(spec: str, **options):
    source = open_source(spec, SourceOptions(**options))
    return source, *records(source)


def plain(path: pathlib.Path, images=GREY, labels=LABELS):
    """The same set as every version has read it."""
    (path / "plain").mkdir()
    return open_source(npz(path / "plain", x=images, y=labels))


# Axes and dtypes: all of these hold the same set, so its id is the same.


SAME_PIXELS = {
    "flat": (GREY.reshape(40, 36), "(n, 36) are images of 6×6, row by row"),
    "with an axis": (GREY[..., None], None),
    "channels first": (GREY[:, None], "(n, 1, 6, 6) are images with the channels first"),
    "counted last": (np.moveaxis(GREY, 0, -1), "(6, 6, n) are images that the last axis counts"),
    "fortran": (np.asfortranarray(GREY), None),
    "fortran, counted last": (np.asfortranarray(np.moveaxis(GREY, 0, -1)), "counts"),
    "fortran, flat": (np.asfortranarray(GREY.reshape(40, 36)), "row by row"),
    "counted last with channels": (np.moveaxis(GREY[..., None], 0, -1), "counts"),
    **{
        dtype: (GREY.astype(dtype), "values 0 to 255 are whole and stored as they are")
        for dtype in ("int16", "uint16", "int32", ">i4", "int64", "uint64")
    },
    **{
        f"{dtype} to 255": (GREY.astype(dtype), "are whole and stored as they are")
        for dtype in ("float16", "float32", ">f4", "float64")
    },
    **{
        f"{dtype} to 1": ((GREY / 255).astype(dtype), "are multiplied by 255 and rounded")
        for dtype in ("float16", "float32", "float64", ">f8")
    },
    "float32 to 1, flat, fortran": (
        np.asfortranarray((GREY / 255).astype(np.float32).reshape(40, 36)),
        "are multiplied by 255 and rounded",
    ),
}


@pytest.mark.parametrize("case", SAME_PIXELS)
def test_the_same_pixels_are_the_same_set(tmp_path, case):
    images, note = SAME_PIXELS[case]
    source, pixels, labels = read(npz(tmp_path, x=images, y=LABELS))
    np.testing.assert_array_equal(pixels[..., 0], GREY)
    assert labels == LABELS.tolist()
    assert (note in "\n".join(source.notes)) if note else source.notes == []
    assert source.fingerprint() == plain(tmp_path).fingerprint()
    some = np.array([39, 0, 7])
    np.testing.assert_array_equal(source.read(some)[0][..., 0], GREY[some])


@pytest.mark.parametrize(
    "images",
    [
        COLOUR.transpose(0, 3, 1, 2),
        COLOUR.transpose(1, 2, 3, 0),
        np.asfortranarray(COLOUR),
        np.asfortranarray(COLOUR.transpose(1, 2, 3, 0)),
        (COLOUR / 255).astype(np.float32).transpose(0, 3, 1, 2),
    ],
    ids=["channels first", "as of .mat", "fortran", "as of .mat, fortran", "floats"],
)
def test_colours_stand_where_they_are(tmp_path, images):
    source, pixels, _ = read(npz(tmp_path, X=images, y=LABELS[:, None]))
    np.testing.assert_array_equal(pixels, COLOUR)
    assert source.fingerprint() == plain(tmp_path, COLOUR).fingerprint()


# Computed by the version before arrays were converted.
OF_ARANGE = "a3f54808d4c8578734425a148aab2c3271956ae03facbbbbf43ad60223dfc70a"


def test_the_fingerprint_of_sets_made_before_stays(tmp_path):
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4) * 5
    source = open_source(npz(tmp_path, x_train=images, y_train=np.arange(3)))
    assert source.fingerprint() == OF_ARANGE
    write_idx(tmp_path / "train-images-idx3-ubyte", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.arange(3, dtype=np.uint8))
    source = open_source(f"idx:{tmp_path}")
    assert source.fingerprint() == OF_ARANGE
    assert source.ids(np.arange(1)) == [b"train-0000000"] and source.notes == []


REFUSED_AXES = [
    (np.zeros((40, 108), np.uint8), True, r"uint8 \(40, 108\); .* save x.reshape\(-1, 3, 6, 6\)"),
    (np.zeros((40, 108), np.uint8), True, r"or x.reshape\(-1, 6, 6, 3\) if they are last"),
    (np.zeros((40, 35), np.uint8), True, r"x: uint8 \(40, 35\); expected .* save x.reshape\("),
    (np.zeros((40, 6, 6, 4), np.uint8), True, r"\(40, 6, 6, 4\); expected .* save x\[\.\.\., :3"),
    (np.zeros((41, 6, 6), np.uint8), True, "has 41 images and labels int64"),
    (np.zeros((36, 40), np.uint8), True, "counted by the first axis"),
    (
        np.zeros((36, 36), np.uint8),
        False,
        r"can be one image, or 36 images of 6×6, or 36 of 6×6 with an",
    ),
    (np.zeros((64, 100), np.uint8), False, r"64 images of 10×10, or 100 of 8×8 with .*T.reshape"),
    (np.zeros((40, 40), np.uint8), True, r"uint8 \(40, 40\); expected .*: save x.reshape"),
    (np.zeros((40, 6, 40), np.uint8), True, r"save numpy.moveaxis\(x, -1, 0\)\[..., None\] if"),
    (np.zeros((40, 40, 40), np.uint8), True, r"first axis and the last have as many .* labels"),
    (np.zeros((6, 6, 6), np.uint8), False, r"save numpy.moveaxis\(x, -1, 0\)"),
    (np.zeros((6, 6, 3), np.uint8), False, r"can be one image with channels: if so, save x\[None"),
    (np.zeros((6, 6, 40), np.uint8), False, r"save numpy.moveaxis\(x, -1, 0\)"),
    (np.zeros((6, 6, 3, 40), np.uint8), False, r"save numpy.moveaxis\(x, -1, 0\)"),
    (np.zeros(40, np.uint8), True, r"x: uint8 \(40,\); expected"),
    (np.zeros((40, 2, 6, 6, 3), np.uint8), True, "expected uint8"),
    (np.zeros((0, 6, 6), np.uint8), False, "at least one image"),
    (np.full((40, 6, 6), "a"), True, r"<U1 \(40, 6, 6\); expected numbers: save x.astype"),
    (np.zeros((40, 6, 6), complex), True, r"complex128 \(40, 6, 6\); expected numbers"),
]


@pytest.mark.parametrize(("images", "is_labelled", "message"), REFUSED_AXES)
def test_axes_are_not_guessed(tmp_path, images, is_labelled, message):
    spec = npz(tmp_path, x=images, **({"y": LABELS} if is_labelled else {}))
    with pytest.raises(StageError, match=message):
        open_source(spec)


def test_features_first_are_not_guessed(tmp_path):
    square = GENERATOR.integers(0, 256, (64, 64), np.uint8)
    with pytest.raises(StageError, match="can be one image, or 64 images of 8×8, or 64 of 8×8 wit"):
        open_source(npz(tmp_path, x=square, y=np.arange(64)))
    with pytest.raises(StageError, match="can be one image, or 64 images of 10×10"):
        open_source(npz(tmp_path, x_train=np.zeros((64, 100)), x_test=np.zeros((64, 81))))
    arrays = {"x_train": np.ones((64, 100)), "x_test": np.ones((64, 81))}
    with pytest.raises(StageError, match="image shapes differ between splits"):
        open_source(npz(tmp_path, **arrays, y_train=np.arange(64), y_test=np.arange(64)))
    labelled = npz(tmp_path, x=np.full((64, 100), 9, np.uint8), y=np.arange(64))
    assert open_source(labelled).image_shape == (10, 10, 1)
    _, pixels, _ = read(npz(tmp_path, x=square[:16]))  # 4×4 is not a likely image.
    np.testing.assert_array_equal(pixels.reshape(16, 64), square[:16])


@pytest.mark.parametrize("shape", [(64, 64), (6, 6, 6)])
@pytest.mark.parametrize("is_labelled", [True, False])
def test_another_split_shows_which_axis_counts_images(tmp_path, shape, is_labelled):
    train = GENERATOR.integers(0, 256, (70, *shape[1:]), np.uint8)
    test = train[: shape[0]]
    labels = {"y_train": np.arange(70), "y_test": np.arange(len(test))} if is_labelled else {}
    source, pixels, _ = read(npz(tmp_path, x_train=train, x_test=test, **labels))
    assert source.split_sizes == {"train": 70, "test": len(test)}
    np.testing.assert_array_equal(pixels[70:].reshape(test.shape), test)
    with pytest.raises(StageError, match="x_train: uint8|x_test: uint8"):
        open_source(npz(tmp_path, x_train=test, x_test=test))


def test_labels_of_one_split_show_which_axis_counts_images(tmp_path):
    images = GENERATOR.integers(0, 256, (100, 64), np.uint8)
    arrays = {"x_train": images, "x_test": images}
    with pytest.raises(StageError, match="x_train: uint8"):
        open_source(npz(tmp_path, **arrays))
    _, pixels, _ = read(npz(tmp_path, **arrays, y_train=np.arange(100)))
    np.testing.assert_array_equal(pixels.reshape(200, 64), [*images, *images])


def test_an_array_is_turned_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "_TURN_BYTES", 100)
    for images in (COLOUR, COLOUR[:, :2, :2], COLOUR[:3]):  # Many images, or large ones.
        spec = npz(tmp_path, x=images.transpose(1, 2, 3, 0), y=LABELS[: len(images)])
        np.testing.assert_array_equal(read(spec)[1], images)


# Values.


def noisy(low: float, high: float, dtype=np.float32) -> np.ndarray:
    values = GENERATOR.random((40, 6, 6)) * (high - low) + low
    values.flat[:2] = low, high
    return values.astype(dtype)


@pytest.mark.parametrize(
    ("images", "flag"),
    [
        (noisy(-1, 1), "--pixel_range=-1,1"),
        (noisy(0, 254.5), "--pixel_range=0,255"),
        (noisy(0, 0.06), "--pixel_range=0,1"),
        (noisy(0, 300, np.float16), "--pixel_range=0,300"),
        (noisy(-0.42, 2.82), "--pixel_range=-1,3"),
        (GREY.astype(np.uint16) * 257, "--pixel_range=0,65535"),
        (GREY.astype(np.int32) * 16, "--pixel_range=0,4095"),
        (GREY.astype(np.int8), "--pixel_range=-128,127"),
        (np.zeros((40, 6, 6)), "--pixel_range=0,1"),
    ],
)
def test_a_range_that_is_not_evident_is_asked_for(tmp_path, images, flag):
    spec = npz(tmp_path, x=images, y=LABELS)
    with pytest.raises(UsageError) as error:
        open_source(spec)
    assert f"x: {images.dtype} (40, 6, 6), values {images.min()!s} to {images.max()!s}" in str(
        error.value
    )
    assert f"such as {flag}" in str(error.value)
    low, high = map(float, flag.partition("=")[2].split(","))
    _, pixels, _ = read(spec, pixel_range=(low, high))
    expected = np.rint((images.astype(np.float64) - low) / (high - low) * 255)
    np.testing.assert_array_equal(pixels[..., 0], expected)


@pytest.mark.parametrize(
    ("images", "pixel_range"),
    [(GREY, (0, 254)), (GREY, (1, 255)), (noisy(0, 1.0001), (0, 1)), (noisy(-1, 1), (0, 1))],
)
def test_values_outside_the_range_are_refused(tmp_path, images, pixel_range):
    with pytest.raises(UsageError, match=f"values {images.min()!s} to {images.max()!s}; expected"):
        read(npz(tmp_path, x=images, y=LABELS), pixel_range=pixel_range)


def test_a_range_may_be_wider_than_the_dtype(tmp_path):
    _, pixels, _ = read(npz(tmp_path, x=noisy(0, 40_000, np.float16)), pixel_range=(0, 80_000))
    assert (pixels.min(), pixels.max()) == (0, 128)


def test_a_range_is_checked_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "_SCAN_BYTES", 36)
    images = np.full((40, 6, 6), 100, np.uint8)
    images[39] = 255
    with pytest.raises(UsageError, match="values 100 to 255; expected"):
        read(npz(tmp_path, x=images, y=LABELS), pixel_range=(0, 200))


def test_a_range_of_the_values_that_the_message_shows_is_enough(tmp_path):
    images = noisy(-0.4242129, 2.8214867)
    shown = float(str(images.min())), float(str(images.max()))
    _, pixels, _ = read(npz(tmp_path, x=images, y=LABELS), pixel_range=shown)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize(
    ("highest", "dtype"), [(1, np.uint8), (16, np.uint8), (16, np.int64), (16, np.float64)]
)
def test_dark_sets_warn_and_keep_their_id(tmp_path, highest, dtype):
    images = (GREY.astype(int) * highest // 255).astype(dtype)
    source, pixels, _ = read(npz(tmp_path, x=images, y=LABELS))
    np.testing.assert_array_equal(pixels[..., 0], images)
    [warning] = [note for note in source.notes if note.startswith("warning: ")]
    assert f"--pixel_range=0,{highest} makes {highest} white" in warning
    same = plain(tmp_path, images.astype(np.uint8))
    assert source.fingerprint() == same.fingerprint()
    source, pixels, _ = read(npz(tmp_path, x=images, y=LABELS), pixel_range=(0, highest))
    assert not any(note.startswith("warning") for note in source.notes)
    assert (pixels.max(), source.fingerprint() == same.fingerprint()) == (255, False)


def test_uint8_of_more_is_no_dark_set(tmp_path):
    source = open_source(npz(tmp_path, x=np.clip(GREY, 0, 17), y=LABELS))
    assert source.notes == []


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("highest", [1, 16])
def test_a_dark_split_beside_another_is_warned_of(tmp_path, dtype, highest):
    dark = (GREY.astype(int) * highest // 255).astype(dtype)
    source, pixels, _ = read(npz(tmp_path, x_train=dark, x_test=GREY.astype(dtype)))
    np.testing.assert_array_equal(pixels[..., 0], np.concatenate([dark, GREY]))
    [warning] = [note for note in source.notes if note.startswith("warning: ")]
    assert warning == (
        f"warning: pixels of {tmp_path}/set.npz: x_train: {np.dtype(dtype)} (40, 6, 6) are at most "
        f"{highest} of 255, nearly black, those of other arrays are not, and all are stored as "
        f"they are; if {highest} is white, save numpy.uint8(x * (255 / {highest}))"
    )


@pytest.mark.parametrize("images", [GREY > 127, (GREY > 127).astype(np.float32)])
def test_booleans_are_black_and_white(tmp_path, images):
    source, pixels, _ = read(npz(tmp_path, x=images, y=LABELS))
    np.testing.assert_array_equal(pixels[..., 0], np.where(images, 255, 0))
    assert "255" in source.notes[0]


def test_the_range_is_that_of_all_splits(tmp_path):
    whole, fractions = GREY.astype(np.float32), (GREY / 255).astype(np.float32)
    source, pixels, _ = read(npz(tmp_path, x_train=whole, x_test=np.clip(whole, 0, 1)))
    assert pixels.max() == 255 and pixels[40:].max() == 1
    with pytest.raises(UsageError, match="such as --pixel_range=0,255"):
        open_source(npz(tmp_path, x_train=whole, x_test=fractions))
    with pytest.raises(StageError, match="x_train: uint8 .* expected float32 as in .*x_test: save"):
        open_source(npz(tmp_path, x_train=GREY, x_test=fractions))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(tmp_path, value):
    images = noisy(0, 1)
    images[17, 2, 3] = value
    for options in ({}, {"pixel_range": (0, 1)}):
        with pytest.raises(StageError, match="image 17 holds NaN or an infinity"):
            read(npz(tmp_path, x=images, y=LABELS), **options)


def test_floats_stay_in_their_file(tmp_path):
    images = np.zeros((20_000, 28, 28), np.float32)  # 63 MB.
    images[:, 0, 0] = 1
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", np.zeros(20_000, np.int64))
    del images
    tracemalloc.start()
    try:
        source = open_source(f"npy:{tmp_path}")
        source.fingerprint()
        assert tracemalloc.get_traced_memory()[1] < 90e6  # Of 63 MB + 125 MB as float64.
        tracemalloc.reset_peak()
        source.read(np.arange(4_096))
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


# Labels.


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (LABELS.astype(np.float32), None),
        (LABELS[:, None], None),
        (LABELS[:, None].astype(float), None),
        (LABELS.astype(">u2"), None),
        (np.eye(7)[LABELS], "one-hot rows (n, 7), read as class numbers"),
        (np.eye(7, dtype=bool)[LABELS], "one-hot"),
        (np.asfortranarray(np.eye(7, dtype=np.uint8)[LABELS]), "one-hot"),
        (LABELS.astype(str), "words, numbered in their sorted order"),
        (LABELS.astype("S3")[:, None], "words"),
    ],
    ids=str,
)
def test_the_same_labels_are_the_same_set(tmp_path, labels, note):
    source, _, numbers = read(npz(tmp_path, x=GREY, y=labels))
    assert numbers == LABELS.tolist()
    assert source.class_names == list("0123456")
    assert source.fingerprint() == plain(tmp_path).fingerprint()
    assert (note in source.notes[0]) if note else source.notes == []


def test_words_are_class_names_of_all_splits(tmp_path):
    names = np.array(["dog", "cat", "éclair"])
    source, _, labels = read(
        npz(tmp_path, x_train=GREY, y_train=names[LABELS % 3], x_test=GREY, y_test=["ape"] * 40)
    )
    assert source.class_names == ["ape", "cat", "dog", "éclair"]
    assert labels == [{0: 2, 1: 1, 2: 3}[n % 3] for n in LABELS] + [0] * 40
    other = open_source(
        npz(tmp_path, x_train=GREY, y_train=names[LABELS % 3], x_test=GREY, y_test=["ant"] * 40)
    )
    assert other.fingerprint() != source.fingerprint()


def test_words_that_are_numbers_sort_as_numbers(tmp_path):
    source, _, labels = read(npz(tmp_path, x=GREY[:3], y=["10", "9", "100"]))
    assert (source.class_names, labels) == (["9", "10", "100"], [1, 0, 2])


def test_one_hot_rows_have_a_class_for_each_column(tmp_path):
    source = open_source(npz(tmp_path, x=GREY, y=np.eye(14)[LABELS]))
    assert len(source.class_names) == 14
    assert source.fingerprint() != plain(tmp_path).fingerprint()


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_records_of_label_minus_one_are_counted(tmp_path, dtype):
    labels = np.where(LABELS == 3, -1, LABELS).astype(dtype)
    source, _, found = read(npz(tmp_path, x_train=GREY, y_train=labels, x_test=GREY, y_test=LABELS))
    assert source.notes == [f"{(LABELS == 3).sum()} of 80 records have no label (-1)"]
    assert found == [*labels, *LABELS]
    source, _, _ = read(npz(tmp_path, x=GREY, y=np.full(40, -1, dtype)))
    assert source.notes == ["40 of 40 records have no label (-1)"] and source.class_names == []


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_binary_labels_of_minus_one_and_one_are_refused(tmp_path, dtype):
    labels = np.where(LABELS > 3, 1, -1).astype(dtype)
    spec = npz(tmp_path, x_train=GREY, y_train=labels, x_test=GREY, y_test=labels)
    message = r"binary labels -1 and 1; expected 0 and 1, .*save \(y > 0\).* --labels=none"
    with pytest.raises(UsageError, match=message):
        open_source(spec)
    assert set(read(spec, labels="none")[2]) == {-1}
    # A split of one of the classes is no set of its own.
    source = open_source(npz(tmp_path, x_train=GREY, y_train=LABELS, x_test=GREY, y_test=labels))
    assert source.notes == [f"{(labels == -1).sum()} of 80 records have no label (-1)"]


TWO = np.eye(7, dtype=np.uint8)[LABELS]
TWO[3, :2] = 1
NONE = np.eye(7, dtype=np.uint8)[LABELS]
NONE[3] = 0
OTHER = np.eye(7, dtype=np.uint8)[LABELS]
OTHER[3, 0] = 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (TWO, r"y: uint8 \(40, 7\); expected one integer .* --labels=none reads the images alone"),
        (NONE, "--labels=none"),
        (OTHER, "--labels=none"),
        (np.eye(7)[LABELS] * 2, "--labels=none"),
        (np.c_[LABELS, LABELS], "--labels=none"),
        (np.array([["a", "b"]] * 40), "--labels=none"),
        (LABELS + 0.5, r"y: float64 \(40,\): label 0 is 0.5; expected whole .* --labels=none"),
        (np.where(LABELS == 2, np.nan, 1), "label 2 is nan"),
        (np.full(40, 1e300), "expected class numbers"),
        (np.full(40, 2**64 - 1, np.uint64), "expected class numbers"),
        (LABELS.astype(complex), r"y: complex128 \(40,\); expected one integer"),
        (np.full(40, ""), "the label ''; expected printable"),
        (np.full(40, b"\xff"), "expected printable"),
        (np.full(40, 0xFFFFFFFF, np.uint32).view("U1"), "expected printable"),
        (np.array(LABELS, object), "holds Python objects"),
        (np.zeros((40, 2, 2)), "expected one integer for each image"),
        (LABELS[:39], r"40 images and labels int64 \(39,\)"),
        (np.int64(5), "expected one integer for each image"),
    ],
)
def test_labels_that_are_none_are_refused_and_can_be_ignored(tmp_path, labels, message):
    spec = npz(tmp_path, x=GREY, y=labels)
    with pytest.raises(StageError, match=message):
        open_source(spec)
    _, pixels, found = read(spec, labels="none")
    np.testing.assert_array_equal(pixels[..., 0], GREY)
    assert set(found) == {-1}


def test_ignored_labels_are_no_reason_to_refuse(tmp_path):
    arrays = {"x_train": GREY, "y_train": LABELS, "label_train": LABELS, "y_test": LABELS}
    spec = npz(tmp_path, **arrays)
    with pytest.raises(StageError, match="are both labels of train"):
        open_source(spec)
    assert read(spec, labels="none")[0].split_sizes == {"train": 40}
    spec = idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"no labels")
    (tmp_path / "kmnist-train-labels-idx1-ubyte").write_bytes(b"no labels")
    with pytest.raises(StageError, match="belong to the same split"):
        open_source(spec)
    (tmp_path / LABELS_NAME).write_bytes(b"no labels")
    source, pixels, labels = read(spec, labels="none")
    assert source.split_sizes == {"train": 40} and set(labels) == {-1}


def test_words_beside_numbers_are_refused(tmp_path):
    arrays = {"x_train": GREY, "y_train": LABELS, "x_test": GREY}
    with pytest.raises(StageError, match="expected words in all splits, or numbers in all"):
        open_source(npz(tmp_path, **arrays, y_test=LABELS.astype(str)))


def test_images_without_labels(tmp_path):
    source, _, labels = read(npz(tmp_path, x_train=GREY, x_test=GREY))
    assert set(labels) == {-1} and source.class_names == []
    source, _, labels = read(npz(tmp_path, x_train=GREY, y_train=LABELS, x_test=GREY))
    assert labels == LABELS.tolist() + [-1] * 40
    assert source.class_names == list("0123456") and source.notes == ["test has no labels"]
    spec = npz(tmp_path, x_test=GREY, y_test=LABELS, x_train=GREY)
    with pytest.raises(StageError, match="train has no labels beside other splits .* --labels=non"):
        open_source(spec)
    assert set(read(spec, labels="none")[2]) == {-1}


def test_an_unlabelled_set_becomes_shards(tmp_path):
    manifest = make_shards(npz(tmp_path, x=GREY), tmp_path / "out", num_shards=1)
    assert (manifest["class_names"], manifest["records"]["written"]) == ([], 40)
    dataset = reader.Dataset(str(tmp_path / "out"))
    labels = {
        label
        for split in dataset.splits
        for entry in dataset.shards(split)
        for label in dataset.read_shard(entry).labels.tolist()
    }
    assert labels == {-1}


# Names.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x_train", ("images", "train", "")),
        ("X_train", ("images", "train", "")),
        ("trainX", ("images", "train", "")),
        ("XTrain", ("images", "train", "")),
        ("xtrain", ("images", "train", "")),
        ("Y_TEST", ("labels", "test", "")),
        ("TrainImages", ("images", "train", "")),
        ("train-labels", ("labels", "train", "")),
        ("data", ("images", "unsplit", "")),
        ("target", ("labels", "unsplit", "")),
        ("val_labels", ("labels", "validation", "")),
        ("kmnist-test-imgs", ("images", "test", "kmnist")),
        ("data_train_labels", ("labels", "train", "data")),
        ("train/pixels", ("images", "train", "")),
        ("metadata", ("", "unsplit", "metadata")),
        ("images_labels", ("", "unsplit", "images labels")),
        ("latents_classes", ("labels", "unsplit", "latents")),
        ("arr_0", ("", "unsplit", "arr 0")),
    ],
)
def test_what_a_name_says(name, expected):
    assert pairs.parse(name)[:3] == expected


@pytest.mark.parametrize(
    "names",
    [
        ("X_train", "Y_train", "X_test", "Y_test"),
        ("trainX", "trainY", "testX", "testY"),
        ("train_data", "train_target", "test_data", "test_target"),
        ("train/images", "train/labels", "test/images", "test/labels"),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "npz directory", "npy directory"])
def test_names_pair_images_and_labels(tmp_path, names, kind):
    arrays = dict(zip(names, (GREY, LABELS, GREY[:9], LABELS[:9]), strict=True))
    spec = f"{kind[:3]}:{tmp_path}"
    if kind == "npz":
        spec = npz(tmp_path, **arrays)
    for name, array in arrays.items() if kind != "npz" else ():
        if kind == "npz directory":
            np.savez(tmp_path / f"set-{name.replace('/', '-')}.npz", array)
        else:
            np.save(tmp_path / f"set-{name.replace('/', '-')}.npy", array)
    source, pixels, labels = read(spec)
    assert source.split_sizes == {"train": 40, "test": 9} and source.notes == []
    assert source.ids(np.array([0, 40])) == [b"train-0000000", b"test-0000000"]
    np.testing.assert_array_equal(pixels[..., 0], np.concatenate([GREY, GREY[:9]]))
    assert labels == [*LABELS, *LABELS[:9]]


def test_words_of_newer_versions_make_no_split_beside_those_of_all(tmp_path):
    """What an archive held beside a set never mattered; the set and its id stay."""
    spec = npz(tmp_path, x_train=GREY, y_train=LABELS)
    before = open_source(spec).fingerprint()
    more = {"data_test": GREY, "val_target": LABELS, "imgs": GREY, "classes": np.arange(7)}
    source = open_source(npz(tmp_path, x_train=GREY, y_train=LABELS, **more))
    assert source.fingerprint() == before and source.split_sizes == {"train": 40}
    assert source.notes == ["ignores the arrays data_test, val_target, imgs, classes"]


def test_further_arrays_are_named(tmp_path):
    arrays = {"metadata": np.array({}, object), "classes": np.array(["a"] * 7), "data": GREY}
    source, _, labels = read(npz(tmp_path, images=GREY, labels=LABELS, **arrays))
    assert source.notes == ["ignores the arrays metadata, classes, data"]
    assert labels == LABELS.tolist()


def test_archives_that_hold_splits(tmp_path):
    np.savez(tmp_path / "train.npz", x=GREY, y=LABELS)
    np.savez(tmp_path / "test.npz", x=GREY[:5], y=LABELS[:5])
    (tmp_path / "README.md").write_text("")
    source = open_source(f"npz:{tmp_path}")
    assert source.split_sizes == {"train": 40, "test": 5} and source.ignored == {".md": 1}
    assert sorted(source.listing()) == [f"{tmp_path}/test.npz", f"{tmp_path}/train.npz"]


def test_sets_side_by_side_are_told_apart(tmp_path):
    for name, images in (("k49", GREY[::-1]), ("kmnist", GREY)):
        np.savez(tmp_path / f"{name}-train-imgs.npz", images)
        np.savez(tmp_path / f"{name}-train-labels.npz", LABELS)
    with pytest.raises(StageError, match=f"both images of train.*npz:{tmp_path}/k49"):
        open_source(f"npz:{tmp_path}")
    _, pixels, _ = read(f"npz:{tmp_path}/kmnist")
    np.testing.assert_array_equal(pixels[..., 0], GREY)
    (tmp_path / "k49-train-imgs.npz").unlink()
    (tmp_path / "kmnist-train-labels.npz").unlink()
    with pytest.raises(StageError, match="train has k49-train-labels and kmnist-train-imgs"):
        open_source(f"npz:{tmp_path}")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": GREY, "b": LABELS}, r"holds a, b; expected images and labels of each split"),
        ({"y_train": LABELS}, "train has y_train; expected images and labels of each split"),
        ({"x": GREY, "image": GREY}, "x and image are both images of unsplit"),
    ],
)
def test_names_are_not_guessed(tmp_path, arrays, message):
    with pytest.raises(StageError, match=message):
        open_source(npz(tmp_path, **arrays))


WHOLE = {"X": GREY, "y": LABELS}
SPLITS = {"X_train": GREY[:30], "y_train": LABELS[:30], "X_test": GREY[30:], "y_test": LABELS[30:]}


@pytest.mark.parametrize("labels", ["auto", "none"])
def test_a_set_beside_its_own_splits_is_refused(tmp_path, labels):
    options = SourceOptions(labels=labels)
    spec = npz(tmp_path, **WHOLE, **SPLITS)
    message = f"{spec}: X names no split, and X_train names one; expected a set or its splits, .*"
    with pytest.raises(StageError, match=message) as error:
        open_source(spec, options)
    # The remedy is a line of NumPy that works.
    line = str(error.value).partition("splits: a")[2]
    assert "X_train=a['X_train'], y_train=" in line or labels == "none"
    line = "a" + line.replace("FILE", "file").replace("NEW", "new")
    names = {"numpy": np, "file": tmp_path / "set.npz", "new": tmp_path / "new.npz"}
    exec(line, names)
    names["a"].close()
    assert open_source(f"npz:{tmp_path}/new.npz", options).split_sizes == {"train": 30, "test": 10}


@pytest.mark.parametrize("names", [("all", "train"), ("images", "x_train")])
def test_a_directory_of_a_set_beside_its_own_splits_is_refused(tmp_path, names):
    for name in names if names[0] == "all" else ():
        np.savez(tmp_path / f"{name}.npz", x=GREY, y=LABELS)
    for name in names if names[0] != "all" else ():
        np.save(tmp_path / f"{name}.npy", GREY)
    kind = "npz" if names[0] == "all" else "npy"
    message = (
        rf"{names[0]}\S* names no split, and {names[1]}\S* names one; .* move the files of one"
    )
    with pytest.raises(StageError, match=message):
        open_source(f"{kind}:{tmp_path}")
    (tmp_path / f"{names[0]}.{kind}").unlink()
    assert open_source(f"{kind}:{tmp_path}").split_sizes == {"train": 40}


def test_idx_files_of_a_set_beside_its_own_splits_are_refused(tmp_path):
    spec = idx(tmp_path)
    for name in (IMAGES_NAME, LABELS_NAME):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name.replace("train", "train2")).write_bytes(data)
    message = (
        rf"train2-images\S* names no split, and {IMAGES_NAME} names one; .* or read {spec}/trai"
    )
    with pytest.raises(StageError, match=message):
        open_source(spec)
    assert open_source(f"{spec}/train2-").split_sizes == {"unsplit": 40}
    assert open_source(f"{spec}/train-").split_sizes == {"train": 40}


def test_a_single_nameless_array_is_images(tmp_path):
    np.savez(tmp_path / "set.npz", GREY)
    source, pixels, labels = read(f"npz:{tmp_path}/set.npz")
    assert source.notes == ["reads the only array, arr_0, as images"] and set(labels) == {-1}
    np.testing.assert_array_equal(pixels[..., 0], GREY)


# A file for each class.


def classes(path: pathlib.Path, *names: str, size=(5, 100)) -> str:
    for number, name in enumerate(names):
        np.save(path / f"{name}.npy", np.full(size, number + 100, np.uint8))
    return f"npy:{path}"


@pytest.mark.parametrize(
    ("names", "expected", "without"),
    [
        (["full_numpy_bitmap_cat", "full_numpy_bitmap_car"], ["car", "cat"], "'full_numpy_bitmap_"),
        (["apple", "ant"], ["ant", "apple"], ""),
        (["x-10-v1", "x-9-v1", "x-11-v1"], ["9", "10", "11"], "'x-' and '-v1'"),
        (["full_numpy_bitmap_train", "full_numpy_bitmap_cat"], ["cat", "train"], "'full"),
        (["cat_images", "dog_images"], ["cat", "dog"], "'_images'"),
        (["cat_", "cat_b"], ["cat_", "cat_b"], ""),
    ],
)
def test_a_file_for_each_class(tmp_path, names, expected, without):
    source, pixels, labels = read(classes(tmp_path, *names))
    assert source.class_names == expected
    assert without in source.notes[0] and ("without" in source.notes[0]) == bool(without)
    assert source.split_sizes == {"unsplit": 5 * len(names)}
    ids = source.ids(np.arange(5 * len(names)))
    assert len(set(ids)) == len(ids) and ids[0].endswith(b"-0000000")
    for record_id, image, label in zip(ids, pixels, labels, strict=True):
        name = record_id.decode().rpartition("-")[0]
        assert set(image.flat) == {100 + names.index(name)} and expected[label] in name
        assert source.where(ids.index(record_id)).startswith(f"npy:{tmp_path} {name}[")


def test_the_classes_of_files_are_part_of_the_id(tmp_path):
    before = open_source(classes(tmp_path, "cat", "dog")).fingerprint()
    (tmp_path / "cat.npy").rename(tmp_path / "cow.npy")
    assert open_source(f"npy:{tmp_path}").fingerprint() != before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat"], r"is a single array; .* --source=npy:.*/cat.npy reads it without labels"),
        (["cat_train", "cat_test", "dog_train"], "name splits and classes"),
        (["all", "train", "test"], "name splits and classes"),
        ([], "no .npy files in this directory"),
    ],
)
def test_classes_are_not_guessed(tmp_path, names, message):
    with pytest.raises(StageError, match=message):
        open_source(classes(tmp_path, *names))


@pytest.mark.parametrize(
    "shapes",
    [
        [(80, 64)] * 5,
        [(128, 256)] * 5,
        [(80, 1024)] * 5,
        [(1_000, 784)] * 5,
        [(80, 64), (80, 81)],  # Of various sizes.
        [(5, 36), (6, 36)],
    ],
)
def test_files_that_may_be_one_image_each_are_refused(tmp_path, shapes):
    for number, shape in enumerate(shapes):
        np.save(tmp_path / f"clip{number}.npy", np.full(shape, 99, np.uint8))
    with pytest.raises(StageError, match=r"can be one image each: save numpy.stack .* x.reshape\("):
        open_source(f"npy:{tmp_path}")


@pytest.mark.parametrize(
    "shapes",
    [
        [(784, 784), (10_000, 784)],  # Quick, Draw!, the same pixels and other numbers of images.
        [(60, 784), (60, 784)],
        [(300, 784), (400, 784)],
        [(5_000, 784), (5_000, 784)],
    ],
)
def test_files_of_rows_are_classes(tmp_path, shapes):
    for number, shape in enumerate(shapes):
        np.save(tmp_path / f"class{number}.npy", np.full(shape, number + 99, np.uint8))
    source = open_source(f"npy:{tmp_path}")
    assert source.image_shape == (28, 28, 1) and source.class_names == ["class0", "class1"]
    images, labels = source.read(np.array([0, shapes[0][0]]))
    assert labels.tolist() == [0, 1] and images[:, 0, 0, 0].tolist() == [99, 100]


def test_an_array_alone_has_no_labels(tmp_path):
    source, pixels, labels = read(f"{classes(tmp_path, 'cat')}/cat.npy")
    assert source.class_names == [] and set(labels) == {-1} and set(pixels.flat) == {100}
    assert source.ids(np.array([4])) == [b"cat-0000004"]


def test_splits_without_labels(tmp_path):
    source = open_source(classes(tmp_path, "train", "test"))
    assert source.split_sizes == {"train": 5, "test": 5} and source.class_names == []


def test_more_files_than_may_be_open(tmp_path):
    spec = classes(tmp_path, *(f"class{n}" for n in range(80)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (70, hard))
    try:
        with pytest.raises(StageError, match="80 arrays, more files .* ulimit -n"):
            open_source(spec)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("kept", [0, 4, 60, 200])
def test_a_cut_npy_file(tmp_path, kept):
    spec = f"{classes(tmp_path, 'cat')}/cat.npy"
    data = (tmp_path / "cat.npy").read_bytes()
    (tmp_path / "cat.npy").write_bytes(data[:kept])
    with pytest.raises(StageError, match="not a NumPy array|its header states"):
        open_source(spec)


def test_a_packed_npy_file_is_unpacked_as_far_as_it_promises(tmp_path):
    np.save(tmp_path / "x.npy", GREY)
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(gzip.compress(data))
    np.testing.assert_array_equal(read(f"npy:{tmp_path}/x.npy")[1][..., 0], GREY)
    (tmp_path / "x.npy").write_bytes(gzip.compress(data + bytes(30_000_000)))
    with pytest.raises(StageError, match="not a complete gzip file"):
        open_source(f"npy:{tmp_path}/x.npy")


# IDX.


CODES = {"u1": 8, "i1": 9, ">i2": 11, ">i4": 12, ">f4": 13, ">f8": 14}


def idx_bytes(array: np.ndarray, dtype: str = "u1") -> bytes:
    head = struct.pack(">HBB", 0, CODES[dtype], array.ndim)
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(dtype).tobytes()


IMAGES_NAME, LABELS_NAME = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(path: pathlib.Path, images=GREY, labels=LABELS, *, dtypes=("u1", "u1"), prefix="") -> str:
    (path / f"{prefix}{IMAGES_NAME}").write_bytes(idx_bytes(images, dtypes[0]))
    (path / f"{prefix}{LABELS_NAME}").write_bytes(idx_bytes(labels, dtypes[1]))
    return f"idx:{path}"


@pytest.mark.parametrize("images", [">i2", ">i4", ">f4", ">f8"])
@pytest.mark.parametrize("labels", ["i1", ">i4", ">f4"])
def test_idx_files_of_other_dtypes(tmp_path, images, labels):
    source = open_source(idx(tmp_path, dtypes=(images, labels)))
    assert source.fingerprint() == fingerprint_of_npz(tmp_path)


def fingerprint_of_npz(path: pathlib.Path) -> str:
    """The fingerprint of the same set as an .npz."""
    (path / "npz").mkdir()
    return open_source(npz(path / "npz", x_train=GREY, y_train=LABELS)).fingerprint()


def test_idx_files_obey_the_rules_of_arrays(tmp_path):
    spec = idx(tmp_path, noisy(-1, 1), dtypes=(">f4", "u1"))
    with pytest.raises(UsageError, match="such as --pixel_range=-1,1"):
        open_source(spec)
    assert read(spec, pixel_range=(-1, 1))[1].max() == 255
    with pytest.raises(UsageError, match="--labels=none"):
        open_source(idx(tmp_path, labels=np.c_[LABELS, LABELS]))


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_qmnist(tmp_path, ending):
    columns = np.c_[LABELS, np.full((40, 7), 9)]
    for name, data in (
        ("qmnist-train-images-idx3-ubyte", idx_bytes(GREY)),
        ("qmnist-train-labels-idx2-int", idx_bytes(columns, ">i4")),
        ("qmnist-test-images-idx3-ubyte", idx_bytes(GREY[:9])),
    ):
        data = gzip.compress(data) if ending else data
        (tmp_path / f"{name}{ending}").write_bytes(data)
    source, _, labels = read(f"idx:{tmp_path}")
    assert source.split_sizes == {"train": 40, "test": 9}
    assert labels == LABELS.tolist() + [-1] * 9
    assert source.notes == ["labels are the first of 8 columns", "test has no labels"]


def test_emnist_is_warned_of(tmp_path):
    source = open_source(idx(tmp_path, prefix="emnist-letters-"))
    [note] = source.notes
    assert note.startswith("warning: EMNIST's files") and "--transpose makes" in note
    other = tmp_path / "other"
    other.mkdir()
    assert open_source(idx(other)).fingerprint() == source.fingerprint()
    assert open_source(f"idx:{other}").notes == []


def test_a_directory_named_like_its_file(tmp_path):
    write = {name: data for name, data in ((IMAGES_NAME, GREY), (LABELS_NAME, LABELS))}
    for name, array in write.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(idx_bytes(array))
    assert open_source(f"idx:{tmp_path}").split_sizes == {"train": 40}
    for name, array in write.items():
        (tmp_path / name.replace("-idx", ".idx")).write_bytes(idx_bytes(array))
    source, pixels, _ = read(f"idx:{tmp_path}")
    np.testing.assert_array_equal(pixels[..., 0], GREY)
    assert source.notes[0] == (
        f"reads train-images.idx3-ubyte; {IMAGES_NAME}/{IMAGES_NAME} has the same content"
    )
    (tmp_path / IMAGES_NAME / IMAGES_NAME).write_bytes(idx_bytes(GREY[::-1]))
    with pytest.raises(StageError, match="belong to the same split"):
        open_source(f"idx:{tmp_path}")


@pytest.mark.parametrize("is_equal", [True, False])
def test_two_files_of_one_split(tmp_path, is_equal):
    spec = idx(tmp_path)
    other = idx_bytes(GREY if is_equal else GREY[::-1])
    (tmp_path / "train-images.idx3-ubyte.gz").write_bytes(gzip.compress(other))
    if is_equal:
        assert "has the same content" in open_source(spec).notes[0]
        return
    with pytest.raises(StageError, match="belong to the same split"):
        open_source(spec)


def test_a_plain_file_goes_before_its_packed_copy_and_that_is_said(tmp_path):
    spec = idx(tmp_path)
    (tmp_path / f"{IMAGES_NAME}.gz").write_bytes(b"anything")
    (tmp_path / "train-labels-idx2-int").write_bytes(b"anything")
    (tmp_path / "notes.txt").write_text("")
    source = open_source(spec)
    assert source.notes == [
        f"reads {IMAGES_NAME}, and not {IMAGES_NAME}.gz",
        f"reads {LABELS_NAME}, and not train-labels-idx2-int",
    ]
    assert source.ignored == {".txt": 1}


def test_idx_files_without_labels(tmp_path):
    spec = idx(tmp_path)
    (tmp_path / LABELS_NAME).unlink()
    source, _, labels = read(spec)
    assert set(labels) == {-1} and source.class_names == []
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(GREY))
    assert open_source(spec).split_sizes == {"train": 40, "test": 40}
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS))
    with pytest.raises(StageError, match="no train-labels-idx1-ubyte.* or ignore all labels with"):
        open_source(spec)
    assert open_source(spec, SourceOptions(labels="none")).split_sizes["train"] == 40


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_the_first_bytes_say_what_is_packed(tmp_path, is_packed, ending):
    for name, array in ((IMAGES_NAME, GREY), (LABELS_NAME, LABELS)):
        data = idx_bytes(array)
        (tmp_path / f"{name}{ending}").write_bytes(gzip.compress(data) if is_packed else data)
    _, pixels, labels = read(f"idx:{tmp_path}")
    np.testing.assert_array_equal(pixels[..., 0], GREY)
    assert labels == LABELS.tolist()
    rows = "\n".join(",".join(map(str, [n, *i.flat])) for n, i in zip(LABELS, GREY, strict=True))
    path = tmp_path / f"set.csv{ending}"
    path.write_bytes(gzip.compress(rows.encode()) if is_packed else rows.encode())
    images, labels = open_source(f"csv:{path}").read(np.arange(40))
    np.testing.assert_array_equal(np.stack(images)[..., 0], GREY)


# As a user sees it.


def test_what_is_decided_is_said(tmp_path):
    spec = npz(tmp_path, x=(GREY > 127).astype(np.uint8).reshape(40, 36), y=np.eye(7)[LABELS])
    source = conversion.open_converted(conversion.SourceSpec(spec))
    assert reading.lines(source, "digits", 0.1)[2:] == [
        "images are 6×6×1",
        "the set is named digits: its files begin with digits-",
        "arrays (n, 36) are images of 6×6, row by row",
        "warning: pixels are at most 1 of 255, nearly black, and stored as they are; "
        "--pixel_range=0,1 makes 1 white",
        "labels are one-hot rows (n, 7), read as class numbers",
    ]


def test_workers_open_the_set_as_the_command_does(tmp_path):
    spec = npz(tmp_path, x=(GREY / 255).astype(np.float32).reshape(40, 36), y=LABELS.astype(str))
    source_spec = conversion.open_converted(conversion.SourceSpec(spec)).for_workers()
    conversion.open_source_once.cache_clear()
    converted = conversion.open_converted(source_spec).read(np.arange(40))
    np.testing.assert_array_equal(converted.images[..., 0], GREY)
    assert converted.labels.tolist() == LABELS.tolist()
