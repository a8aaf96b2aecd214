"""Image sets as people have them: no class off by one, no photo on its side, no split changed."""

import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.cli.errors import StageError
from pipeline.datasets import reader
from pipeline.sources import image_file, open_source
from tests.conftest import blobs, make_folder_set, make_shards, outputs_of
from tests.forked import run_command

ORIENTATION = 274


def saved(image: Image.Image, kind: str, orientation: int | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "kind, mode", [("PNG", "RGB"), ("PNG", "L"), ("JPEG", "RGB"), ("WEBP", "RGB")]
)
def test_photos_stand_upright(kind, mode, orientation):
    data = saved(photo(mode), kind, orientation)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).reshape(-1)
    pixels = image_file.decode(data)
    np.testing.assert_array_equal(pixels.reshape(-1), expected)
    shape, is_turned = image_file.shape_of(io.BytesIO(data))
    assert (shape, is_turned) == (pixels.shape, orientation != 1)
    assert pixels.shape[:2] == ((10, 6) if orientation >= 5 else (6, 10))


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_orientation_that_is_none_turns_nothing(orientation):
    data = saved(photo(), "PNG", orientation)
    np.testing.assert_array_equal(image_file.decode(data), np.asarray(photo()))


def test_a_damaged_exif_block_turns_nothing():
    data = saved(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(40), quality=95)
    plain = saved(photo(), "JPEG", quality=95)
    np.testing.assert_array_equal(image_file.decode(data), image_file.decode(plain))


def test_a_set_with_photos_on_their_side_has_another_id_than_one_that_stored_them_so(tmp_path):
    for name, orientation in (("upright", None), ("turned", 6)):
        (tmp_path / name / "cat").mkdir(parents=True)
        for number in range(12):
            data = saved(photo().rotate(90 * 2 * (number % 2)), "PNG", orientation)
            (tmp_path / name / "cat" / f"{number}.png").write_bytes(data)
    manifests = [
        make_shards(f"folder:{tmp_path}/{name}", tmp_path / f"{name}-out", num_shards=1)
        for name in ("upright", "turned")
    ]
    assert [manifest["image_shape"] for manifest in manifests] == [[6, 10, 3], [10, 6, 3]]
    assert manifests[0]["dataset_id"] != manifests[1]["dataset_id"]


@pytest.mark.parametrize(
    "names, expected",
    [
        ([str(n) for n in range(12)], [str(n) for n in range(12)]),
        (["001", "2", "10", "0"], ["0", "001", "2", "10"]),
        (["10", "9", "b"], ["10", "9", "b"]),
    ],
)
def test_classes_that_are_numbers_sort_as_numbers(tmp_path, names, expected):
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
        value = int(name, 36) % 250
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / "set" / name / "a.png")
    manifest = make_shards(f"folder:{tmp_path}/set", tmp_path / "out", num_shards=1)
    assert manifest["class_names"] == expected
    dataset = reader.Dataset(str(tmp_path / "out"))
    for split in dataset.splits:
        for entry in dataset.shards(split):
            shard = dataset.read_shard(entry)
            for image, label in zip(shard.images, shard.labels, strict=True):
                assert image.flat[0] == int(expected[label], 36) % 250


def official(path, *, with_validation: bool = True) -> str:
    """A MedMNIST-like file whose validation split is the first 40 of the training images."""
    (train, train_labels), (test, test_labels) = blobs().values()
    arrays = {"train_images": train[40:], "train_labels": train_labels[40:]}
    if with_validation:
        arrays |= {"val_images": train[:40], "val_labels": train_labels[:40]}
    np.savez(path, **arrays, test_images=test, test_labels=test_labels)
    return f"npz:{path}"


def test_an_official_validation_split_stays_as_it_is(tmp_path):
    source = official(tmp_path / "set.npz")
    command = ["pipeline.preprocess", f"--source={source}", "--num_shards=2"]
    done = run_command(*command, f"--output_dir={tmp_path}/out")
    assert "(train 260, validation 40, test 50)" in done.stdout
    assert "the source's validation split of 40 is kept as it is" in done.stderr
    # Said or not, it is the same set.
    run_command(*command, f"--output_dir={tmp_path}/zero", "--validation_fraction=0")
    assert outputs_of(tmp_path / "zero") == outputs_of(tmp_path / "out")
    # What is asked for is done.
    done = run_command(*command, f"--output_dir={tmp_path}/more", "--validation_fraction=0.5")
    sizes = {split: int(n) for split, n in re.findall(r"(\w+) (\d+)[,)]", done.stdout)}
    assert 90 < sizes["train"] < 170 and sizes["train"] + sizes["validation"] == 300


def test_a_source_without_a_validation_split_gives_a_tenth(tmp_path):
    source = official(tmp_path / "set.npz", with_validation=False)
    for name, more in (("default", ()), ("said", ("--validation_fraction=0.1",))):
        flags = [f"--source={source}", f"--output_dir={tmp_path}/{name}", "--num_shards=2", *more]
        done = run_command("pipeline.preprocess", *flags)
        assert "is kept as it is" not in done.stderr
    assert outputs_of(tmp_path / "default") == outputs_of(tmp_path / "said")


def test_an_append_takes_the_share_of_the_set(tmp_path):
    source = official(tmp_path / "set.npz", with_validation=False)
    out = tmp_path / "out"
    make_shards(source, out, validation_fraction=0.3, num_shards=1)
    appended = {"append": True, "id_prefix": "more-", "num_shards": 1}
    manifest = make_shards(source, out, validation_fraction=None, **appended)
    assert manifest["last_append"]["written"] == 310
    with pytest.raises(StageError, match=r"validation_fraction is 0\.3 there and 0\.1 here"):
        make_shards(source, out, validation_fraction=0.1, **appended)


def test_folders_without_numbers_and_photos_keep_their_id(tmp_path):
    make_folder_set(tmp_path / "set")
    manifest = make_shards(f"folder:{tmp_path}/set", tmp_path / "out", validation_fraction=None)
    again = make_shards(f"folder:{tmp_path}/set", tmp_path / "out", validation_fraction=0.1)
    assert again["reused"] and again["dataset_id"] == manifest["dataset_id"]


@pytest.mark.parametrize("above", ["archive", "archive/images"])
def test_single_directories_on_top_are_descended_into(tmp_path, above):
    make_folder_set(tmp_path / "plain")
    make_folder_set(tmp_path / "set" / above)
    flags = ["--num_shards=2", "--validation_fraction=0"]
    done = run_command(
        "pipeline.preprocess",
        f"--source=folder:{tmp_path}/set",
        f"--output_dir={tmp_path}/out",
        *flags,
    )
    assert f"reads {above}/, the only directory" in done.stderr
    manifest = make_shards(
        f"folder:{tmp_path}/plain", tmp_path / "plain-out", validation_fraction=0
    )
    dataset = reader.Dataset(str(tmp_path / "out"))
    assert {split: dataset.num_examples(split) for split in dataset.splits} == manifest["splits"]
    assert dataset.manifest["class_names"] == manifest["class_names"]


def test_a_single_class_and_a_single_split_are_not_descended_into(tmp_path):
    for number in range(12):
        for place in ("one/cat", "two/train/cat", "two/train/dog"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(
                tmp_path / place / f"{number}.png"
            )
    one = make_shards(f"folder:{tmp_path}/one", tmp_path / "out1", num_shards=1)
    two = make_shards(f"folder:{tmp_path}/two", tmp_path / "out2", num_shards=1)
    assert one["class_names"] == ["cat"]
    assert two["class_names"] == ["cat", "dog"] and "test" not in two["splits"]


def plain_fingerprint(directory) -> str:
    """The fingerprint of a folder in which nothing had to be chosen."""
    digest = hashlib.sha256()
    for path in sorted(str(p.relative_to(directory)) for p in directory.rglob("*.png")):
        content = hashlib.sha256((directory / path).read_bytes()).digest()
        digest.update(path.encode() + b"\0" + content)
    return digest.hexdigest()


@pytest.mark.parametrize(
    "directories, orientation, stays",
    [
        (["b", "a"], None, True),
        (["0", "1", "9"], None, True),
        (["0", "10", "2"], None, False),
        (["archive/a", "archive/b"], None, False),
        (["a"], 6, False),
        (["a"], 1, True),
    ],
)
def test_the_id_of_a_folder_changes_only_where_its_records_do(
    tmp_path, directories, orientation, stays
):
    for directory in directories:
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "x.png").write_bytes(saved(photo(), "PNG", orientation))
    source = open_source(f"folder:{tmp_path}")
    assert (source.fingerprint() == plain_fingerprint(tmp_path)) == stays
