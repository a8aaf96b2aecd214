import gzip
import struct

import numpy as np
import pytest

from pipeline import sources
from pipeline.errors import StageError, UsageError
from pipeline.sources.idx import open_idx
from tests.conftest import make_idx_set, write_idx

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def test_packed_plain_and_dotted_names_are_the_same_source(tmp_path):
    plain = make_idx_set(tmp_path / "plain")
    packed = make_idx_set(tmp_path / "packed", suffix=".gz")
    dotted = make_idx_set(tmp_path / "dotted")
    for path in list(dotted.iterdir()):
        path.rename(dotted / path.name.replace("-idx", ".idx"))
    opened = [open_idx(str(d)) for d in (plain, packed, dotted)]
    assert len({source.fingerprint() for source in opened}) == 1
    indices = np.array([349, 0, 299, 300])
    for source in opened:
        assert source.image_shape == (12, 8, 1)
        assert source.split_sizes == {"train": 300, "test": 50}
        assert source.ids(indices) == [
            b"test-0000049",
            b"train-0000000",
            b"train-0000299",
            b"test-0000000",
        ]
        np.testing.assert_array_equal(source.read(indices)[0], opened[0].read(indices)[0])


def test_the_fingerprint_knows_every_pixel_and_label(tmp_path):
    directory = make_idx_set(tmp_path / "set")
    before = open_idx(str(directory)).fingerprint()
    for name in (TRAIN_IMAGES, TRAIN_LABELS):
        data = bytearray((directory / name).read_bytes())
        data[-1] ^= 1
        (directory / name).write_bytes(bytes(data))
        after = open_idx(str(directory)).fingerprint()
        assert after != before
        before = after


def test_the_sample_is_mnists_test_set():
    source = sources.open_source("sample")
    assert source.split_sizes == {"unsplit": 10_000}
    images, labels = source.read(np.arange(10_000))
    assert images.shape == (10_000, 28, 28, 1)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def cut_gzip(directory):
    data = gzip.compress((directory / TRAIN_IMAGES).read_bytes())
    (directory / TRAIN_IMAGES).unlink()
    (directory / f"{TRAIN_IMAGES}.gz").write_bytes(data[: len(data) // 2])


def promise_more(directory):
    data = bytearray((directory / TRAIN_IMAGES).read_bytes())
    data[4:8] = struct.pack(">I", 2**32 - 1)
    (directory / TRAIN_IMAGES).write_bytes(bytes(data))


def wrong_magic(directory):
    data = (directory / TRAIN_IMAGES).read_bytes()
    (directory / TRAIN_IMAGES).write_bytes(b"\x89PNG" + data[4:])


def fewer_labels(directory):
    write_idx(directory / TRAIN_LABELS, np.zeros(299, np.uint8))


def empty_set(directory):
    write_idx(directory / TRAIN_IMAGES, np.zeros((0, 12, 8), np.uint8))
    write_idx(directory / TRAIN_LABELS, np.zeros(0, np.uint8))


def other_shape(directory):
    write_idx(directory / "t10k-images-idx3-ubyte", np.zeros((50, 8, 8), np.uint8))


def remove_all(directory):
    for path in directory.iterdir():
        path.rename(path.with_name(path.name + ".bak"))


BAD_SETS = [
    (cut_gzip, "not a whole gzip file .* fetch or copy it again"),
    (
        promise_more,
        "the header promises 4294967295×12×8 = 412316860320 bytes, the file holds 28800",
    ),
    (wrong_magic, "begins with 89504e47, expected the IDX magic number 00000803"),
    (fewer_labels, "holds 300 images, .* holds 299 labels"),
    (empty_set, "holds 0×12×8 pixels; expected at least one image"),
    (other_shape, "image shapes differ between splits"),
    (remove_all, "no train-images-idx3-ubyte.* found t10k-images-idx3-ubyte.bak"),
    (lambda d: (d / TRAIN_IMAGES).unlink(), "no train-images-idx3-ubyte.* beside train-labels"),
    (lambda d: (d / TRAIN_LABELS).unlink(), "no train-labels-idx1-ubyte.* beside train-images"),
    (lambda d: (d / TRAIN_LABELS).write_bytes(b""), "begins with nothing, expected the IDX magic"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_SETS)
def test_a_bad_set_is_an_error_and_nothing_is_written(tmp_path, damage, message):
    from tests.conftest import make_shards

    directory = make_idx_set(tmp_path / "set")
    damage(directory)
    with pytest.raises(StageError, match=message):
        make_shards(f"idx:{directory}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("idx:/no/such/place", StageError, "no such directory; expected IDX files"),
        ("idx:", UsageError, "names no directory"),
        ("mnist", UsageError, "no source 'mnist'; expected sample, idx:DIR"),
        ("sample:x", UsageError, "the sample takes nothing after its name"),
    ],
)
def test_a_bad_spec(spec, error, message):
    with pytest.raises(error, match=message):
        sources.open_source(spec)
