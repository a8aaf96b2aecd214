"""Folders of images as people have them: what is a split, what a class, what a pixel."""

import functools
import hashlib
import io
import struct
import subprocess
import sys
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import reader
from pipeline.sources import (
    SourceOptions,
    Unreadable,
    conversion,
    image_file,
    open_source,
)
from pipeline.sources.images import bounded_image
from pipeline.sources.images.image_frames import MAX_FRAMES
from pipeline.sources.splits import splits_of_directories
from tests.conftest import REPOSITORY, make_shards
from tests.sources.test_greedy_files import chunk, tiff

QUARANTINED = "quarantined"
# Every format that can be read.
decode = functools.partial(image_file.decode, allow_tiff=True)
read_header = functools.partial(image_file.read_header, allow_tiff=True)
ALLOWED = SourceOptions(allow_tiff=True)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """200 MNIST digits (200, 28, 28) and their labels."""
    images, labels = open_source("sample").read(np.arange(200))
    return np.asarray(images)[..., 0], labels


def save(path, pixels: np.ndarray | Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def make_tree(directory, paths: str) -> str:
    """A PNG image for each word, whose pixels follow from the word; returns the spec."""
    for path in paths.split():
        save(directory / path, np.full((4, 4), hash_of(path), np.uint8))
    return f"folder:{directory}"


def hash_of(path: str) -> int:
    return hashlib.sha256(path.encode()).digest()[0]


def reading(spec: str, **options) -> dict[str, str]:
    """Path -> "split class", "split" without a label, or QUARANTINED."""
    source = open_source(spec, SourceOptions(allow_tiff=True, **options))
    num_records = sum(source.split_sizes.values())
    splits = [split for split, size in source.split_sizes.items() for _ in range(size)]
    images, labels = source.read(np.arange(num_records))
    found = {}
    for path, split, image, label in zip(
        source.ids(np.arange(num_records)), splits, images, labels.tolist(), strict=True
    ):
        name = f" {source.class_names[label]}" if label >= 0 else ""
        is_bad = isinstance(image, Unreadable)
        found[path.decode()] = QUARANTINED if is_bad else split + name
    return found


def notes_of(spec: str, **options) -> str:
    source = open_source(spec, SourceOptions(allow_tiff=True, **options))
    assert source.image_shape
    return "\n".join(source.notes)


LABELLED = {
    "train/cat/1.png": "train cat",
    "train/dog/2.png": "train dog",
    "test/cat/3.png": "test cat",
}


def inside(trees: dict[str, str], **changes: str) -> dict[str, str]:
    """A tree whose directories train and test have other names."""
    return {
        path.replace("train/", f"{changes['train']}/").replace("test/", f"{changes['test']}/"): name
        for path, name in trees.items()
    }


LAYOUTS = {
    "classes": {"cat/1.png": "unsplit cat", "dog/2.png": "unsplit dog"},
    "one class": {"cat/1.png": "unsplit cat"},
    "splits of classes": LABELLED,
    "flat": {"1.png": "unsplit", "2.png": "unsplit"},
    "splits": {"train/1.png": "train", "test/2.png": "test", "val/3.png": "validation"},
    "one split": {"train/1.png": "train"},
    "labels in train alone": {
        "train/cat/1.png": "train cat",
        "train/dog/1.png": "train dog",
        "test/1.png": "test",
    },
    "a stray file in a split": LABELLED | {"train/9.png": QUARANTINED},
    "a stray file beside splits": LABELLED | {"9.png": QUARANTINED},
    "a stray file beside classes": {"cat/1.png": "unsplit cat", "9.png": QUARANTINED},
    "a stray file beside splits without classes": {"test/1.png": "test", "9.png": QUARANTINED},
    "splits doubled": inside(LABELLED, train="train/train", test="test/test"),
    "splits doubled in other words": inside(LABELLED, train="Train/training", test="test1/test1"),
    "Intel's": inside(LABELLED, train="seg_train/seg_train", test="seg_test/seg_test")
    | {"seg_pred/seg_pred/4.png": "pred"},
    "one doubled": inside(LABELLED, train="train/train", test="test"),
    "doubled without classes": {"train/train/1.png": "train", "test/test/2.png": "test"},
    "images in each split": inside(LABELLED, train="train/images", test="test/images"),
    "images in a labelled and an unlabelled split": {
        "train/images/cat/1.png": "train cat",
        "train/images/dog/2.png": "train dog",
        "test/images/3.png": "test",
    },
    "tiny-imagenet's": {
        "train/n1/images/1.png": "train n1",
        "train/n2/images/2.png": "train n2",
        "val/images/3.png": "validation",
        "test/images/4.png": "test",
    },
    "a directory in each class": {
        "cat/images/1.png": "unsplit cat",
        "dog/images/2.png": "unsplit dog",
    },
    "classes doubled": {"cat/cat/1.png": "unsplit cat", "dog/dog/2.png": "unsplit dog"},
    "classes above splits": {
        "cat/train/1.png": "train cat",
        "cat/test/2.png": "test cat",
        "dog/train/3.png": "train dog",
        "dog/test/4.png": "test dog",
    },
    "STL-10's": {
        "train/cat/1.png": "train cat",
        "train/dog/1.png": "train dog",
        "test/cat/1.png": "test cat",
        "unlabeled/1.png": "unlabelled",
        "unlabeled/part1/2.png": "unlabelled",
    },
    "SVHN's": LABELLED | {"extra/dog/4.png": "extra dog"},
    "COCO's": {"train2017/1.png": "train", "val2017/2.png": "validation"},
    "two directories of train": {
        "train_a/cat/1.png": "train cat",
        "train_b/dog/2.png": "train dog",
        "test/cat/3.png": "test cat",
    },
    "vehicles": {"car/1.png": "unsplit car", "train/2.png": "unsplit train"},
    "environments": {
        "dev/1.png": "unsplit dev",
        "eval/2.png": "unsplit eval",
        "trn/3.png": "unsplit trn",
    },
    "a class called dev": {"dev/1.png": "unsplit dev"},
    "numbers": {f"train/{n}/1.png": f"train {n}" for n in (0, 1, 2, 10, 11)},
}


# Below another directory, these are other layouts.
AT_THE_TOP = [name for name in LAYOUTS if name.startswith("a stray file beside")]
AT_THE_TOP += ["one class", "a class called dev", "flat"]


@pytest.mark.parametrize(
    "above, name",
    [("", name) for name in LAYOUTS]
    + [
        (above, name)
        for above in ("archive/", "archive/all images/", "test set/")
        for name in LAYOUTS
        if name not in AT_THE_TOP and (above != "test set/" or name.startswith("splits "))
    ],
)
def test_splits_and_classes_are_found(tmp_path, above, name):
    tree = {above + path: meaning for path, meaning in LAYOUTS[name].items()}
    for path in tree:
        save(tmp_path / path, np.full((4, 4), 7, np.uint8))
    assert reading(f"folder:{tmp_path}") == tree
    # Without labels the splits are the same ones.
    without = reading(f"folder:{tmp_path}", labels="none")
    assert "quarantined" not in without.values() or "beside splits" in name
    if QUARANTINED not in tree.values():
        assert without == {path: meaning.split()[0] for path, meaning in tree.items()}
    source = open_source(f"folder:{tmp_path}")
    assert all(split.isidentifier() for split in source.split_sizes)
    assert (source.class_names == []) == (not any(" " in meaning for meaning in tree.values()))


@pytest.mark.parametrize(
    "paths, note",
    [
        ("a/train/1.png a/test/2.png", "reads a/, the only directory"),
        ("train/train/c/1.png test/1.png", "reads train/train/: the only directory in its split"),
        ("c/train/1.png d/train/1.png", "reads <class>/<split>/FILE: the classes hold train/"),
        ("c/x/1.png d/x/1.png", "the class is the first directory: each holds a single directory"),
        ("train/c/1.png test/2.png", "test has no class directories: its images have no labels"),
        ("c/1.png", "c/ is read as a class; --labels=none if it is none"),
        ("train_a/c/1.png train_b/c/1.png", "train_a/, train_b/ are read as one split, train"),
        ("Cat/1.png cat/1.png", "warning: class names differ only by case: Cat, cat"),
        (
            "train/c/1.png train/d/1.png test/unknown/1.png",
            "warning: no class of test is in train: unknown; train has c, d",
        ),
        ("cat/1.png dog/2.png test/3.png", "test/ is read as a class; move away what is none"),
        (
            "cat/1.png unlabeled/2.png pred/4.png",
            "pred/, unlabeled/ are read as classes; move away what is none",
        ),
        (
            "cat/1.png 9.png 8.png",
            "quarantine by their directories: 2, such as 8.png: lies in no class directory",
        ),
        (
            "cat\\1.png cat\\2.png",
            "warning: 2 paths hold a backslash, such as cat\\1.png, as an archive from Windows",
        ),
    ],
)
def test_what_was_decided_is_said(tmp_path, paths, note):
    assert note in notes_of(make_tree(tmp_path, paths))


def test_where_nothing_was_decided_nothing_is_said(tmp_path):
    spec = make_tree(tmp_path, "train/c/1.png train/d/1.png test/c/1.png test/d/1.png")
    assert notes_of(spec) == ""


@pytest.mark.parametrize(
    ("paths", "is_noted"),
    [
        ("images/1.png masks/1.png", True),
        ("JPEGImages/a.jpg SegmentationClass/a.png SegmentationObject/a.png", True),
        ("train/image_2/1.png train/label_2/1.png test/image_2/2.png", True),
        ("HR/1.png HR/2.png LR/1.png", True),
        ("images/1.png cat/1.png", False),
        ("cat/1.png cat/2.png dog/1.png dog/2.png", False),
        ("images/1.png", False),  # A single class.
    ],
)
def test_images_beside_their_masks_are_noted(tmp_path, paths, is_noted):
    spec = make_tree(tmp_path, paths)
    assert ("are named like the parts of one set" in notes_of(spec)) == is_noted
    assert "the parts of one set" not in notes_of(spec, labels="none")


def test_directories_without_images_are_named(tmp_path):
    spec = make_tree(tmp_path, "cat/1.png dog/big/2.png dog/small/3.png")
    assert "no image" not in notes_of(spec, class_level=1)
    for path in ("cat/a.txt", "frog/a.heic", "frog/b.heic", "__MACOSX/x/y.png", "README"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    assert "a directory holds no image: frog/" in notes_of(spec, class_level=1)
    for path in ("dog/xml/deep/a.xml", "e/f/a.xml", "g/a.xml"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    assert "4 directories hold no image: dog/xml/, e/, frog/, …" in notes_of(spec, class_level=1)


def test_what_is_said_takes_one_line(tmp_path):
    for path in ("a\nb/x\n1.png", "a\nb/2.png", "test/3.png", "\x1b[2J.png"):
        save(tmp_path / "in\nside" / path, np.zeros((4, 4), np.uint8))
    (tmp_path / "in\nside" / "a\nb" / "bad\n.png").write_bytes(b"x")
    (tmp_path / "in\nside" / "no\nimage").mkdir()
    (tmp_path / "in\nside" / "no\nimage" / "a.txt").write_bytes(b"x")
    for spec in (f"folder:{tmp_path}", f"folder:{tmp_path}/in\nside"):
        source = open_source(spec, SourceOptions(labels="auto" if "\n" in spec else "none"))
        assert source.image_shape and source.notes
        assert not [note for note in source.notes if not note.isprintable()]
    (tmp_path / "in\nside" / "a\nb" / "c\nd").mkdir()
    save(tmp_path / "in\nside" / "a\nb" / "c\nd" / "1.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(UsageError) as caught:
        open_source(f"folder:{tmp_path}")
    assert str(caught.value).isprintable() and "a\\nb/c\\nd" in str(caught.value)


OMNIGLOT = "Greek/c1/1.png Greek/c2/2.png Latin/c1/3.png Latin/c3/4.png"


@pytest.mark.parametrize(
    "paths, options, parts",
    [
        (
            OMNIGLOT,
            {},
            [
                "images lie in up to 2 directories, such as Greek/c1/1.png",
                "--class_level=1 for Greek, Latin (2 in all)",
                "--class_level=2 for Greek/c1, Greek/c2, Latin/c1, … (4 in all)",
                "or --labels=none for no classes",
            ],
        ),
        ("train/a/x/1.png train/a/y/1.png train/b/1.png test/a/1.png", {}, ["--class_level=2"]),
        (
            "bg/Greek/c1/1.png bg/Latin/c2/1.png ev/Kanji/c3/2.png",
            {},
            ["for bg/Greek/c1, bg/Latin/c2, ev/Kanji/c3 (3 in all)"],
        ),
        ("cat/1.png cat/images/2.png dog/3.png", {}, ["such as cat/images/2.png"]),
        ("train/images/cat/1.png test/images/cat/2.png", {}, ["for images/cat (1 in all)"]),
        (
            "c/train/1.png c/test/2.png d/train/3.png",
            {},
            ["the splits differ between classes", "d/ holds train of test, train"],
        ),
        (
            "train/c/1.png test/c/2.png masks/3.png",
            {},
            ["test/ looks like a split, masks/ like a class", "--class_level=1 if all are classes"],
        ),
        ("train/1.png test/2.png masks/3.png", {}, ["looks like a split, masks/ like a class"]),
        ("train/1.png test/2.png masks/3.png", {"labels": "none"}, ["masks/ like a class"]),
        ("train/c/1.png test/c/2.png extra/3.png x/4.png", {}, ["x/ like a class"]),
        (
            "train_images/1.png train_masks/2.png",
            {},
            ["train_images/, train_masks/ look like the same split, train"],
        ),
        ("cat/1.png dog/2.png", {"class_level": 2}, ["no image lies so deep", "--class_level=1"]),
        ("1.png", {"class_level": 1}, ["no image lies so deep", "remove the flag"]),
    ],
)
def test_what_is_ambiguous_is_refused_with_what_was_found(tmp_path, paths, options, parts):
    spec = make_tree(tmp_path, paths)
    with pytest.raises(UsageError) as caught:
        open_source(spec, SourceOptions(**options))
    for part in (spec, *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "paths, level, classes",
    [
        (OMNIGLOT, 1, "Greek Greek Latin Latin"),
        (OMNIGLOT, 2, "Greek/c1 Greek/c2 Latin/c1 Latin/c3"),
        ("A/" + OMNIGLOT.replace(" ", " A/"), 2, "Greek/c1 Greek/c2 Latin/c1 Latin/c3"),
        ("A/" + OMNIGLOT.replace(" ", " A/"), 3, "A/Greek/c1 A/Greek/c2 A/Latin/c1 A/Latin/c3"),
        ("a/1.png a/b/2.png a/b/c/3.png", 2, "- a/b a/b"),
        ("2/1/1.png 10/1/2.png", 2, "2/1 10/1"),
        ("test/1.png train/1.png", 1, "test train"),  # Vehicles.
        ("masks/1.png test/1.png train/1.png", 1, "masks test train"),
    ],
)
def test_a_class_level_says_which_directories_name_the_class(tmp_path, paths, level, classes):
    expected = {
        path: QUARANTINED if name == "-" else f"unsplit {name}"
        for path, name in zip(paths.split(), classes.split(), strict=True)
    }
    assert reading(make_tree(tmp_path, paths), class_level=level) == expected


def test_a_class_level_counts_below_the_split(tmp_path):
    paths = "train/a/x/1.png train/a/y/2.png train/b/3.png test/test/a/x/4.png val/5.png"
    assert reading(make_tree(tmp_path, paths), class_level=2) == {
        "train/a/x/1.png": "train a/x",
        "train/a/y/2.png": "train a/y",
        "train/b/3.png": QUARANTINED,
        "test/test/a/x/4.png": "test a/x",
        "val/5.png": "validation",
    }
    source = open_source(f"folder:{tmp_path}", SourceOptions(class_level=2))
    [image] = [i for i in source.read(np.arange(5))[0] if isinstance(i, Unreadable)]
    assert image.reason == "lies in 1 of 2 class directories"


def test_a_class_level_accepts_splits_that_differ_between_classes(tmp_path):
    paths = ["cat/train/1.png", "dog/train/2.png", "cat/test/3.png"]
    found = reading(make_tree(tmp_path, " ".join(paths)), class_level=1)
    assert found == dict(zip(paths, ["train cat", "train dog", "test cat"], strict=True))


def test_without_labels_no_depth_is_refused(tmp_path):
    spec = make_tree(tmp_path, "train/1.png train/a/2.png train/a/b/c/3.png test/x/y/4.png 5.png")
    found = reading(spec, labels="none")
    assert found.pop("5.png") == QUARANTINED  # In no split.
    assert {path: path.split("/")[0] for path in found} == found


@pytest.mark.parametrize(
    "names, splits",
    [
        ("train test", "train test"),
        ("Train TEST", "train test"),
        ("training valid t10k", "train validation test"),
        ("training_set test_images val-set", "train test validation"),
        ("trn tst dev", "train test validation"),
        ("TrainImages TestImages", "train test"),
        ("trainset testset", "train test"),
        ("train2017 val2017", "train validation"),
        ("train extra unlabelled pred", "train extra unlabelled pred"),
        ("train", "train"),
        ("test", "test"),
        # No splits:
        ("trn", ""),
        ("train2017", ""),
        ("dev test", ""),
        ("extra test", ""),
        ("train eval", ""),
        ("images_background images_evaluation", ""),
        ("train test cat", ""),
        ("trains testament", ""),
    ],
)
def test_words_that_state_a_split(names, splits):
    found = splits_of_directories(names.split())
    expected = dict(zip(names.split(), splits.split(), strict=True)) if splits else {}
    assert found == expected


def test_names_that_unicode_encodes_in_two_ways_are_one_class(tmp_path):
    composed = unicodedata.normalize("NFC", "café")
    decomposed = unicodedata.normalize("NFD", "café")
    assert composed != decomposed
    for number, name in enumerate((composed, decomposed, "tea")):
        save(tmp_path / "set" / name / f"{number}.png", np.full((4, 4), number, np.uint8))
        save(tmp_path / "alone" / decomposed / f"{number}.png", np.zeros((4, 4), np.uint8))
    source = open_source(f"folder:{tmp_path}/set")
    assert source.class_names == [composed, "tea"]
    images, labels = source.read(np.arange(3))
    assert {image.flat[0]: label for image, label in zip(images, labels, strict=True)} == {
        0: 0,
        1: 0,
        2: 1,
    }
    assert f"encodes in two ways are one class: {composed}" in source.notes[0]
    # A name alone stays as in sets made before.
    assert open_source(f"folder:{tmp_path}/alone").class_names == [decomposed]


# Ids.


def plain_fingerprint(directory, paths: list[str]) -> str:
    """The fingerprint of a folder of which all versions read the same records, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.encode() + b"\0")
        digest.update(hashlib.sha256((directory / path).read_bytes()).digest())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "paths, options, stays",
    [
        ("cat/1.png dog/2.png", {}, True),
        ("3.png cat/1.png dog/2.png", {}, True),
        ("4.png train/2.png train/c/1.png test/c/3.png", {}, True),
        ("cat/images/1.png dog/images/2.png", {}, True),
        (OMNIGLOT, {"class_level": 1}, True),
        ("train/a/x/1.png train/b/y/2.png", {"class_level": 1}, True),
        ("car/1.png train/2.png", {}, True),
        # Earlier versions read other records, or quarantined them:
        ("1.png 2.png", {}, False),
        ("train/c/1.png test/2.png", {}, False),
        ("train/1.png test/2.png", {}, False),
        ("train/train/c/1.png train/train/d/1.png", {}, False),
        ("train2017/c/1.png val2017/c/2.png", {}, False),
        ("c/train/1.png d/train/2.png", {}, False),
        ("train/1.png test/2.png", {"class_level": 1}, False),
        (OMNIGLOT, {"class_level": 2}, False),
        ("cat/1.png", {"labels": "none"}, False),
        ("caf\u00e9/1.png cafe\u0301/1.png", {}, False),
    ],
)
def test_the_id_changes_only_where_records_do(tmp_path, paths, options, stays):
    source = open_source(make_tree(tmp_path, paths), SourceOptions(**options))
    assert (source.fingerprint() == plain_fingerprint(tmp_path, paths.split())) == stays


def test_each_reading_of_the_same_files_has_its_own_id(tmp_path):
    spec = make_tree(tmp_path, OMNIGLOT)
    ways = [{"class_level": 1}, {"class_level": 2}, {"labels": "none"}]
    ids = {open_source(spec, SourceOptions(**way)).fingerprint() for way in ways}
    assert len(ids) == 3


# Files.


def test_the_endings_are_pillow_s():
    Image.init()
    formats = (*bounded_image.FORMATS, "TIFF")
    of_formats = {e for e, kind in Image.registered_extensions().items() if kind in formats}
    assert set(image_file.EXTENSIONS) == of_formats


def test_all_endings_are_read_and_others_counted(tmp_path):
    endings = [*image_file.EXTENSIONS, ".JFIF", ".Tif"]
    for number, ending in enumerate(endings):
        save(
            tmp_path / "set" / "cat" / f"{number}{ending}", np.zeros((4, 4), np.uint8), format="PNG"
        )
    others = ["a", "b", "c.TXT", "labels.csv", "Thumbs.db", "x.heic", "y.svg", "z.ico", "scan.0001"]
    for name in [*others, ".hidden", ".hidden.txt", "__MACOSX/cat/resource.png"]:
        save(tmp_path / "set" / name, np.zeros((4, 4), np.uint8), format="PNG")
    source = open_source(f"folder:{tmp_path}/set")
    assert source.split_sizes == {"unsplit": len(endings)}
    images, _ = source.read(np.arange(len(endings)))
    assert not any(isinstance(image, Unreadable) for image in images)
    rest = {e: 1 for e in (".txt", ".csv", ".db", ".heic", ".svg", ".ico", ".png")}
    assert source.ignored == {"": 3} | rest
    manifest = make_shards(f"folder:{tmp_path}/set", tmp_path / "out", num_shards=1)
    assert manifest["records"]["ignored"] == {"": 3} | rest


def test_where_nothing_is_read_the_message_says_what_was_found(tmp_path):
    for name in ("a.heic", "b.heic", "c.HEIC", "d.psd", "README"):
        (tmp_path / name).write_bytes(b"x")
    message = r"0 images among 5 files \(3 \.heic, 1 without an ending, 1 \.psd\); expected files"
    with pytest.raises(StageError, match=message):
        open_source(f"folder:{tmp_path}")


def test_shapes_are_counted_where_they_differ(tmp_path):
    sizes = [(4, 4)] * 3 + [(4, 4, 3)] * 2 + [(n, 9) for n in range(1, 6)]
    for number, size in enumerate(sizes):
        save(tmp_path / "cat" / f"{number}.png", np.zeros(size, np.uint8))
    expected = "images are 4×4×1 (3), 4×4×3 (2), 5×9×1 (1), 4×9×1 (1), 3×9×1 (1), and 2 other"
    assert expected in notes_of(f"folder:{tmp_path}")


# Pixels.


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_header_agrees(data: bytes, background: str | None = None) -> np.ndarray:
    pixels = decode(data, background=background)
    header = read_header(io.BytesIO(data), background=background)
    assert header.shape == pixels.shape and pixels.dtype == np.uint8
    return pixels


def netpbm(kind: str, values: np.ndarray, highest: int) -> bytes:
    return f"{kind} {values.shape[1]} {values.shape[0]} {highest}\n".encode() + values.tobytes()


VALUES = np.random.default_rng(3).integers(0, 65_536, (7, 5))
VALUES[0, :3] = 0, 65_535, 32_896


def of_16_bits() -> dict[str, bytes]:
    """VALUES in every kind of file that holds 16 bits."""
    grey = Image.fromarray(VALUES.astype(np.uint16))
    return {
        "PNG": encoded(grey, "PNG"),
        "TIFF": encoded(grey, "TIFF"),
        "big-endian TIFF": encoded(Image.fromarray(VALUES.astype(">u2")), "TIFF"),
        "TIFF of 32 bits": encoded(Image.fromarray(VALUES.astype(np.int32)), "TIFF"),
        "PGM": netpbm("P5", VALUES.astype(">u2"), 65_535),
        "text PGM": netpbm("P2", np.frombuffer(b"", np.uint8).reshape(7, 0), 65_535).replace(
            b"P2 0", b"P2 5"
        )
        + " ".join(map(str, VALUES.ravel())).encode(),
    }


@pytest.mark.parametrize("kind", of_16_bits())
def test_16_bits_are_scaled_to_8(kind):
    data = of_16_bits()[kind]
    expected = np.round(VALUES / 257).astype(np.uint8)  # No quotient lies halfway.
    np.testing.assert_array_equal(assert_header_agrees(data)[..., 0], expected)
    assert read_header(io.BytesIO(data)).is_of_16_bits


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_8_bits_that_were_stretched_to_16_come_back(kind):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    images = {"PPM": netpbm("P5", (grey * 257).astype(">u2"), 65_535)}
    data = images.get(kind) or encoded(Image.fromarray(grey * 257), kind)
    np.testing.assert_array_equal(assert_header_agrees(data)[..., 0], grey)


def test_16_bits_of_a_png_in_colour_come_as_pillow_reads_them():
    colours = np.random.default_rng(4).integers(0, 256, (4, 6, 3)).astype(np.uint16)
    data = png_of_16_bits(colours * 257, colour_type=2)
    np.testing.assert_array_equal(assert_header_agrees(data), colours)
    np.testing.assert_array_equal(
        assert_header_agrees(netpbm("P6", (colours * 257).astype(">u2"), 65_535)), colours
    )


def png_of_16_bits(values: np.ndarray, *, colour_type: int, transparent: bytes = b"") -> bytes:
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = b"".join(
        [width.to_bytes(4, "big"), height.to_bytes(4, "big"), bytes([16, colour_type, 0, 0, 0])]
    )
    parts = [
        (b"IHDR", head),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(k, d) for k, d in parts if d or k != b"tRNS")


@pytest.mark.parametrize(
    "values, reason",
    [
        (np.array([[0, 65_536]], np.int32), "holds values from 0 to 65536, expected 16 bits"),
        (np.array([[-1, 9_000]], np.int32), "holds values from -1 to 9000, expected 16 bits"),
        (np.array([[0, 255]], np.uint16), "holds no value above 255, which would become black"),
        (np.array([[0.5, 1]], np.float32), "Pillow's mode F, expected 8 or 16 bits a channel"),
    ],
)
def test_what_cannot_be_scaled_is_refused(values, reason):
    with pytest.raises(ValueError, match=reason):
        decode(encoded(Image.fromarray(values), "TIFF"))


def test_a_black_image_of_16_bits_is_black():
    data = encoded(Image.fromarray(np.zeros((3, 3), np.uint16)), "PNG")
    assert not assert_header_agrees(data).any()


COLOURS = np.random.default_rng(7).integers(0, 65_536, (5, 4, 4)).astype("<u2")


def tiff_of(pixels: np.ndarray, photometric: int = 2, planes: int = 1, extra: int = -1) -> bytes:
    """An uncompressed TIFF of one strip, or of one a channel."""
    height, width, channels = pixels.shape
    size = pixels.nbytes // planes if planes == 1 else pixels.nbytes // channels
    strips = channels if planes == 2 else 1
    stored = np.moveaxis(pixels, -1, 0) if planes == 2 else pixels
    bits = struct.pack("<4H", *[8 * pixels.itemsize] * 4)
    offsets = struct.pack("<4I", *(48 + n * size for n in range(4)))
    counts = struct.pack("<4I", *[size] * 4)
    where = (16, 32) if strips > 1 else (48, size)
    tags = [
        *[(256, 3, 1, width), (257, 3, 1, height), (259, 3, 1, 1), (262, 3, 1, photometric)],
        (258, 3, channels, 8 if channels > 2 else 8 * pixels.itemsize),
        *[(277, 3, 1, channels), (278, 3, 1, height), (284, 3, 1, planes)],
        *[(273, 4, strips, where[0]), (279, 4, strips, where[1])],
        *([(338, 3, 1, extra)] if extra >= 0 else []),
    ]
    return tiff(*sorted(tags), data=bits + offsets + counts + stored.tobytes())


DEEP_COLOURS = {
    "RGB PNG": lambda c: png_of_16_bits(c[..., :3], colour_type=2),
    "RGBA PNG": lambda c: png_of_16_bits(c, colour_type=6),
    "LA PNG": lambda c: png_of_16_bits(c[..., 2:], colour_type=4),
    "RGB TIFF": lambda c: tiff_of(c[..., :3]),
    "RGBA TIFF": lambda c: tiff_of(c, extra=2),
    "CMYK TIFF": lambda c: tiff_of(c, photometric=5),
    "PPM": lambda c: netpbm("P6", c[..., :3].astype(">u2"), 65_535),
}


@pytest.mark.parametrize("kind", DEEP_COLOURS)
def test_16_bits_of_a_colour_are_the_high_byte(tmp_path, kind):
    colours = COLOURS.copy()
    if kind != "CMYK TIFF":
        colours[..., 3] = 65_535  # Opaque.
    data = DEEP_COLOURS[kind](colours)
    header = read_header(io.BytesIO(data))
    assert header.is_of_16_bits and header.is_of_deep_colour
    pixels = assert_header_agrees(data)
    if kind == "LA PNG":
        np.testing.assert_array_equal(pixels, np.dstack([colours[..., 2] >> 8] * 3))
    elif kind not in ("CMYK TIFF", "PPM"):  # Pillow rounds PPM.
        np.testing.assert_array_equal(pixels, colours[..., :3] >> 8)
    path = tmp_path / f"1.{'png' if 'PNG' in kind else 'tif' if 'TIFF' in kind else 'ppm'}"
    path.write_bytes(data)
    assert "1 images of 16 bits are scaled to 8 bits" in notes_of(f"folder:{tmp_path}")
    # Earlier versions read the same pixels; of a flat folder they read none.
    (tmp_path / "set" / "cat").mkdir(parents=True)
    path.rename(tmp_path / "set" / "cat" / path.name)
    source = open_source(f"folder:{tmp_path}/set", ALLOWED)
    assert source.fingerprint() == plain_fingerprint(tmp_path / "set", [f"cat/{path.name}"])


@pytest.mark.parametrize("kind", [kind for kind in DEEP_COLOURS if kind[:4] not in ("CMYK", "PPM")])
@pytest.mark.parametrize("is_opaque", [True, False])
def test_16_bits_that_would_become_black_are_quarantined(tmp_path, kind, is_opaque):
    dark = COLOURS >> 8
    if is_opaque:
        dark[..., 3] = 65_535
    data = DEEP_COLOURS[kind](dark)
    with pytest.raises(ValueError, match="no colour above 255, and would become black"):
        decode(data, background="#ffffff")
    ending = "png" if "PNG" in kind else "tif"
    save(tmp_path / "cat" / "0.png", OPAQUE)
    (tmp_path / "cat" / f"1.{ending}").write_bytes(data)
    paths = ["cat/0.png", f"cat/1.{ending}"]
    spec = f"folder:{tmp_path}"
    assert reading(spec, background="#ffffff") == {
        paths[0]: "unsplit cat",
        paths[1]: QUARANTINED,
    }
    assert "to quarantine by their headers: 1, such as cat/1" in notes_of(
        spec, background="#ffffff"
    )
    source = open_source(spec, SourceOptions(allow_tiff=True, background="#ffffff"))
    assert source.fingerprint() != plain_fingerprint(tmp_path, paths)


def test_black_strokes_in_the_alpha_of_16_bits_are_seen():
    strokes = COLOURS.copy()
    strokes[..., :3] = 0
    data = png_of_16_bits(strokes, colour_type=6)
    pixels = assert_header_agrees(data, "#ffffff")
    np.testing.assert_array_equal(pixels[..., 0], 255 - (strokes[..., 3] >> 8))


def test_white_is_zero_in_16_bits_too():
    for dtype, highest in (("<u2", 65_535), ("u1", 255)):
        values = (COLOURS[..., :1] >> (0 if highest > 255 else 8)).astype(dtype)
        expected = np.round((highest - values.astype(int)) * (255 / highest))
        np.testing.assert_array_equal(
            assert_header_agrees(tiff_of(values, photometric=0)), expected
        )
        np.testing.assert_array_equal(
            assert_header_agrees(tiff_of(values, photometric=1)), 255 - expected
        )


@pytest.mark.parametrize(
    "data, reason",
    [
        (tiff_of(COLOURS.astype(np.uint8), extra=0), "a TIFF with 1 more channels than its colour"),
        (tiff_of(COLOURS, extra=0), "a TIFF with 1 more channels than its colour"),
        (tiff_of(COLOURS[..., :3], planes=2), "uncompressed planes for its colours, which Pillow"),
    ],
)
def test_a_tiff_of_which_a_part_would_be_lost_is_quarantined(tmp_path, data, reason):
    save(tmp_path / "cat" / "0.png", OPAQUE)
    (tmp_path / "cat" / "1.tif").write_bytes(data)
    paths = ["cat/0.png", "cat/1.tif"]
    assert reading(f"folder:{tmp_path}") == {paths[0]: "unsplit cat", paths[1]: QUARANTINED}
    assert reason in notes_of(f"folder:{tmp_path}")
    fingerprint = open_source(f"folder:{tmp_path}", ALLOWED).fingerprint()
    assert fingerprint != plain_fingerprint(tmp_path, paths)  # They were read.


def test_planes_of_8_bits_are_read():
    colours = COLOURS[..., :3].astype(np.uint8)
    np.testing.assert_array_equal(assert_header_agrees(tiff_of(colours, planes=2)), colours)


ALPHA = np.random.default_rng(5).integers(0, 256, (6, 4)).astype(np.uint8)
GREY, OPAQUE = ALPHA[::-1].copy(), np.full_like(ALPHA, 255)
RGB = np.random.default_rng(6).integers(0, 256, (6, 4, 3)).astype(np.uint8)


def with_alpha(mode: str, alpha: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """An image and its colours (H, W, 3), as if it had no alpha."""
    if mode == "LA":
        return Image.fromarray(np.dstack([GREY, alpha])), np.dstack([GREY] * 3)
    return Image.fromarray(np.dstack([RGB, alpha])), RGB


@pytest.mark.parametrize("background", ["#ffffff", "#000000", "#ff8000", "#777777"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("alpha", [ALPHA, OPAQUE], ids=["alpha", "opaque"])
def test_transparent_pixels_lie_on_the_background(mode, kind, alpha, background):
    image, colours = with_alpha(mode, alpha)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = assert_header_agrees(encoded(image, kind, **options), background)
    share = alpha[..., None] / 255
    behind = np.array(list(bytes.fromhex(background[1:])))
    expected = colours * share + behind * (1 - share)
    assert np.abs(expected - pixels).max() <= 1  # Pillow rounds on its way.
    is_grey = mode == "LA" and kind != "WEBP" and len(set(behind)) == 1
    assert pixels.shape[2] == (1 if is_grey else 3)
    if alpha is OPAQUE:
        np.testing.assert_array_equal(
            pixels, np.broadcast_to(expected, (6, 4, 3))[..., : pixels.shape[2]]
        )


def transparent_kinds() -> dict[str, tuple[bytes, int]]:
    """Images of two pixels, value 0 and white, of which 0 is transparent; and their channels."""
    two = np.array([[0, 255]], np.uint8)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    deep = png_of_16_bits(np.array([[0, 65_535]]), colour_type=0, transparent=b"\0\0")
    return {
        "L": (encoded(Image.fromarray(two), "PNG", transparency=0), 1),
        "1": (encoded(Image.fromarray(two > 0), "PNG", transparency=0), 1),
        "RGB": (encoded(Image.fromarray(np.dstack([two] * 3)), "PNG", transparency=(0, 0, 0)), 3),
        "P": (encoded(palette, "PNG", transparency=0), 3),
        "GIF": (encoded(palette, "GIF", transparency=0), 3),
        "16 bits": (deep, 1),
    }


@pytest.mark.parametrize("kind", transparent_kinds())
def test_a_transparent_colour_is_replaced(kind):
    data, channels = transparent_kinds()[kind]
    with pytest.raises(ValueError, match=r"transparent pixels, .* --background=white"):
        decode(data)
    for background, value in (("#ffffff", 255), ("#000000", 0), ("#646464", 100)):
        pixels = assert_header_agrees(data, background)
        assert pixels.shape == (1, 2, channels)
        assert set(pixels[0, 0].tolist()) == {value} and set(pixels[0, 1].tolist()) == {255}
    pixels = assert_header_agrees(data, "#ff8000")
    np.testing.assert_array_equal(pixels, [[[255, 128, 0], [255, 255, 255]]])


@pytest.mark.parametrize(
    "kind, mode, channels",
    [
        ("PNG", "1", 1),
        ("PNG", "L", 1),
        ("PNG", "P", 3),
        ("PNG", "RGB", 3),
        ("PNG", "LA", 1),
        ("PNG", "RGBA", 3),
        ("PNG", "I;16", 1),
        ("JPEG", "L", 1),
        ("JPEG", "CMYK", 3),
        ("GIF", "P", 3),
        ("WEBP", "RGB", 3),
        ("DIB", "RGB", 3),
    ],
)
@pytest.mark.parametrize("background", [None, "#ffffff", "#ff0000"])
def test_the_header_agrees_with_the_image(kind, mode, channels, background):
    rgb = Image.fromarray(RGB)
    image = Image.fromarray(VALUES.astype(np.uint16)) if mode == "I;16" else rgb.convert(mode)
    pixels = assert_header_agrees(encoded(image, kind), background)
    is_coloured = mode == "LA" and background == "#ff0000"
    assert pixels.shape[2] == (3 if is_coloured else channels)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(orientation, compression):
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(Image.fromarray(RGB), "TIFF", exif=exif, compression=compression)
    with Image.open(io.BytesIO(encoded(Image.fromarray(RGB), "PNG", exif=exif))) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(assert_header_agrees(data), expected)
    # Earlier versions also had these pixels.
    assert not read_header(io.BytesIO(data)).is_turned


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_read(kind):
    frames = [Image.fromarray(np.full((4, 4, 3), n, np.uint8)) for n in (0, 120, 240)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert not assert_header_agrees(data).any()


def animated(kind: str, num_frames: int, mode: str = "L", **options) -> bytes:
    noise = np.random.default_rng(8).integers(0, 256, (num_frames, 30, 40)).astype(np.uint8)
    first, *others = (Image.fromarray(frame).convert(mode) for frame in noise)
    return encoded(first, kind, save_all=True, append_images=others, **options)


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "BigTIFF", "MPO"])
def test_frames_are_counted_without_decoding(kind, num_frames):
    is_big = kind == "BigTIFF"
    options = {"big_tiff": True} if is_big else {"lossless": True} if kind == "WEBP" else {}
    if kind == "GIF":
        options = {"comment": b"c" * 700}
    for mode in ("L", "RGB"):
        data = animated("TIFF" if is_big else kind, num_frames, mode, **options)
        assert read_header(io.BytesIO(data)).num_frames == num_frames
        # A damaged end changes no frame before.
        if kind in ("GIF", "TIFF"):
            header = read_header(io.BytesIO(data[:-20] if kind == "GIF" else data))
            assert header.num_frames == num_frames


def test_a_chain_of_pages_ends():
    page = tiff_of(COLOURS[..., :1], photometric=1)
    [start] = struct.unpack("<I", page[4:8])
    for following in (start, 8, len(page) - 2, 1 << 31):  # Itself, no directory, beyond the end.
        data = page[:-4] + struct.pack("<I", following)
        assert 1 <= read_header(io.BytesIO(data)).num_frames <= 3
    # Directories without a tag lead each to the next.
    empty = b"".join(struct.pack("<HI", 0, len(page) + 6 * (n + 1)) for n in range(2 * MAX_FRAMES))
    data = page[:-4] + struct.pack("<I", len(page)) + empty
    assert read_header(io.BytesIO(data)).num_frames == MAX_FRAMES


def test_files_of_several_frames_are_noted(tmp_path):
    (tmp_path / "cat").mkdir()
    for number in range(1, 4):
        (tmp_path / "cat" / f"{number}.tif").write_bytes(animated("TIFF", number))
    (tmp_path / "cat" / "4.gif").write_bytes(animated("GIF", 30))
    note = "3 files hold more than one frame; the first is read, and 32 are left out"
    assert note in notes_of(f"folder:{tmp_path}")
    paths = [*(f"cat/{number}.tif" for number in range(1, 4)), "cat/4.gif"]
    source = open_source(f"folder:{tmp_path}", ALLOWED)
    assert source.fingerprint() == plain_fingerprint(tmp_path, paths)


def test_a_jpeg_of_several_pictures_is_a_jpeg():
    """Phones write these, under the same ending."""
    pictures = [Image.fromarray(np.full((8, 8), n, np.uint8)) for n in (0, 200)]
    data = encoded(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert not assert_header_agrees(data).any()
    with pytest.raises(ValueError, match="scans of a JPEG, expected at most 500"):
        decode(data + b"\xff\xda" * 500)


def test_adobe_s_ycck_is_rgb():
    """CMYK JPEGs hold inverted ink."""
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixels = assert_header_agrees(encoded(cmyk, "JPEG", quality=100))
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 8


# The sets of the cases, with real digits.


def records_of(spec: str, **settings) -> set[tuple[str, bytes, int]]:
    """(id, pixels, label) of all records of a source after conversion; none is quarantined."""
    conversion.open_source_once.cache_clear()
    source = conversion.open_converted(conversion.SourceSpec(spec, **settings))
    indices = np.arange(source.num_records)
    records = source.read(indices)
    assert not records.faults
    ids = [record_id.decode() for record_id in source.ids(indices)]
    pixels = [image.tobytes() for image in records.images]
    return set(zip(ids, pixels, records.labels.tolist(), strict=True))


CASES = {
    "flat": lambda i, y: f"img_{i:04d}.png",
    "splits without classes": lambda i, y: f"{'train' if i < 160 else 'test'}/{i}.png",
    "labelled train, unlabelled test": lambda i, y: (
        f"train/{y}/{i}.png" if i < 160 else f"test/{i}.png"
    ),
    "one level down": lambda i, y: f"archive/{'train' if i < 160 else 'test'}/{y}/{i}.png",
    "numbered classes": lambda i, y: f"train/{i % 12}/{i}.png",
    "two deep": lambda i, y: f"{'Latin' if y < 5 else 'Greek'}/character{y:02d}/{i}.png",
}


@pytest.mark.parametrize("case", CASES)
def test_digits_arrive_with_their_labels(tmp_path, case):
    images, labels = digits()
    expected = set()
    for i, (image, digit) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = CASES[case](i, digit)
        save(tmp_path / path, image)
        label = i % 12 if case == "numbered classes" else digit
        if case == "two deep":
            label = (digit + 5) % 10  # Greek comes before Latin.
        is_labelled = path.split("/")[-2:-1] not in ([], ["train"], ["test"])
        expected.add((path, image.tobytes(), label if is_labelled else -1))
    options = {"class_level": 2} if case == "two deep" else {}
    assert records_of(f"folder:{tmp_path}", **options) == expected
    if "train" in case or "splits" in case or "down" in case:
        assert open_source(f"folder:{tmp_path}").split_sizes == {"train": 160, "test": 40}


def test_a_set_of_labelled_and_unlabelled_splits_is_whole(tmp_path):
    for i, image in enumerate(digits()[0][:60]):
        save(tmp_path / "set" / (f"train/{i % 3}" if i < 40 else "test") / f"{i}.png", image)
    settings = {"num_shards": 1, "validation_fraction": 0}
    manifest = make_shards(f"folder:{tmp_path}/set", tmp_path / "out", **settings)
    assert manifest["records"] == {"read": 60, "written": 60, "quarantined": 0}
    dataset = reader.Dataset(str(tmp_path / "out"))
    labels = {
        split: {int(n) for e in dataset.shards(split) for n in dataset.read_shard(e).labels}
        for split in dataset.splits
    }
    assert labels == {"train": {0, 1, 2}, "test": {-1}}


def test_photos_of_digits_stand_upright_and_all_endings_count(tmp_path):
    """Stored with rows for columns; a fifth of the files have no ending."""
    exif = Image.Exif()
    exif[274] = 6
    images, labels = digits()
    endings = [".jpg", ".JPEG", ".jfif", ".jpe", ""]
    for i, (image, digit) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "train" / str(digit) / f"{i}{endings[i % 5]}"
        save(path, np.rot90(image), format="JPEG", exif=exif, quality=100)
    assert open_source(f"folder:{tmp_path}").ignored == {"": 40}
    records = records_of(f"folder:{tmp_path}")
    assert len(records) == 160
    for path, pixels, label in records:
        number = int(path.split("/")[-1].split(".")[0])
        difference = np.frombuffer(pixels, np.uint8).astype(int) - images[number].ravel()
        assert np.abs(difference).max() < 16 and label == labels[number]


def test_digits_in_16_bits_are_the_digits(tmp_path):
    images, labels = digits()
    expected = set()
    for i, (image, digit) in enumerate(zip(images, labels.tolist(), strict=True)):
        save(tmp_path / str(digit) / f"{i}.png", image.astype(np.uint16) * 257)
        expected.add((f"{digit}/{i}.png", image.tobytes(), digit))
    assert records_of(f"folder:{tmp_path}") == expected
    source = open_source(f"folder:{tmp_path}")
    paths = [path.decode() for path in source.ids(np.arange(200))]
    assert source.fingerprint() != plain_fingerprint(tmp_path, paths)  # They went to quarantine.
    assert source.notes == ["200 images of 16 bits are scaled to 8 bits: 65535 becomes 255"]


def test_the_shape_of_most_is_known_with_its_background(tmp_path):
    save(tmp_path / "cat" / "1.png", np.zeros((4, 4, 2), np.uint8))
    for background, channels in (("#ffffff", 1), ("#ff0000", 3)):
        source = open_source(f"folder:{tmp_path}", SourceOptions(background=background))
        assert source.image_shape == source.read(np.arange(1))[0][0].shape == (4, 4, channels)


def test_digits_in_the_alpha_channel_are_seen_on_white(tmp_path):
    images, labels = digits()
    expected = set()
    for i, (image, digit) in enumerate(zip(images, labels.tolist(), strict=True)):
        strokes = np.dstack([np.zeros((28, 28, 3), np.uint8), image])
        save(tmp_path / str(digit) / f"{i}.png", strokes)
        expected.add((f"{digit}/{i}.png", (255 - image).tobytes(), digit))
    assert set(reading(f"folder:{tmp_path}").values()) == {QUARANTINED}
    found = records_of(f"folder:{tmp_path}", background="#ffffff", grayscale=True)
    assert found == expected


def test_grey_and_rgb_digits_become_either(tmp_path):
    images, labels = digits()
    for i, (image, digit) in enumerate(zip(images, labels.tolist(), strict=True)):
        save(tmp_path / str(digit) / f"{i}.png", image if i % 3 else np.dstack([image] * 3))
    assert "images are 28×28×1 (133), 28×28×3 (67)" in notes_of(f"folder:{tmp_path}")
    for flag, depth in (("rgb", 3), ("grayscale", 1)):
        pixels = {image for _, image, _ in records_of(f"folder:{tmp_path}", **{flag: True})}
        assert pixels == {np.repeat(image[..., None], depth, 2).tobytes() for image in images}


READ_ALL = """
import resource, sys
import numpy as np
from pipeline.sources import open_source
for directory in sys.argv[1:]:
    source = open_source(f"folder:{directory}")
    source.fingerprint()
    images, _ = source.read(np.arange(sum(source.split_sizes.values())))
    good = sum(not hasattr(image, "reason") for image in images)
    print(good, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_files_of_many_pixels_cost_no_memory(tmp_path):
    bomb = encoded(Image.new("1", (13_000, 13_000)), "PNG")
    for name, num_bombs in (("without", 0), ("with", 8)):
        for i, image in enumerate(digits()[0][:50]):
            save(tmp_path / name / "train" / "0" / f"{i}.png", image)
        for i in range(num_bombs):
            (tmp_path / name / "train" / "0" / f"z{i}.png").write_bytes(bomb)
    command = [sys.executable, "-c", READ_ALL, tmp_path / "without", tmp_path / "with"]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    good, megabytes, also_good, peak = map(int, done.stdout.split())
    assert good == also_good == 50
    assert peak - megabytes < 20
