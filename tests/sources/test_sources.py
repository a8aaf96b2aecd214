"""Every kind of source on real files: the same records whatever they come from, and bad sets."""

import dataclasses
import gzip
import os
import shutil
import struct

import numpy as np
import pytest

from pipeline import sources
from pipeline.cli.errors import SourceChanged, StageError, UsageError
from pipeline.datasets import reader
from pipeline.sources import conversion
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers.idx import open_idx
from tests.conftest import (
    REPOSITORY,
    blobs,
    make_folder_set,
    make_idx_set,
    make_shards,
    outputs_of,
    write_csv,
    write_idx,
)

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def records_in(directory) -> dict[str, set]:
    """split -> {(id, pixels, label)} of a finished set."""
    dataset, records = reader.Dataset(str(directory)), {}
    for split in dataset.splits:
        records[split] = set()
        for entry in dataset.shards(split):
            shard = dataset.read_shard(entry)
            pixels = [image.tobytes() for image in shard.images]
            records[split] |= set(zip(shard.ids, pixels, shard.labels.tolist(), strict=True))
    return records


def save_npz(path, names, *, size=(12, 8), **changes) -> str:
    """The blobs under the given keys: images of train, labels of train, of test, of test."""
    arrays = [array for pair in blobs(size=size).values() for array in pair]
    np.savez_compressed(path, **dict(zip(names, arrays, strict=True)) | changes)
    return f"npz:{path}"


KERAS = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")


@pytest.mark.parametrize("layout", [KERAS, MEDMNIST])
def test_npz_gives_the_same_shards_as_idx(data_dir, tmp_path, layout):
    arrays = [array for pair in blobs().values() for array in pair]
    if layout is MEDMNIST:
        arrays[1], arrays[3] = arrays[1][:, None], arrays[3][:, None]
        arrays[0] = np.asfortranarray(arrays[0])
    np.savez(tmp_path / "set.npz", **dict(zip(layout, arrays, strict=True)))
    make_shards(f"npz:{tmp_path}/set.npz", tmp_path / "out")
    assert outputs_of(tmp_path / "out") == outputs_of(data_dir)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize("label_last", [False, True])
def test_csv_gives_the_same_records_as_idx(tmp_path, suffix, label_last):
    idx = make_idx_set(tmp_path / "idx", size=(8, 8))
    (tmp_path / "csv").mkdir()
    for split, (images, labels) in blobs(size=(8, 8)).items():
        path = write_csv(tmp_path / "csv" / f"mnist_{split}.csv", images, labels)
        if label_last:  # As OpenML has it, with the line ends of Windows.
            rows = [line.split(",") for line in path.read_text().splitlines()]
            rows = [[*row[1:], row[0].replace("label", '"class"')] for row in rows]
            path.write_text("\r\n".join(map(",".join, rows)) + "\r\n\r\n")
        if suffix.endswith(".gz"):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    make_shards(f"idx:{idx}", tmp_path / "a")
    make_shards(f"csv:{tmp_path}/csv", tmp_path / "b")
    assert records_in(tmp_path / "a") == records_in(tmp_path / "b")


def test_a_csv_file_alone_has_no_splits_and_needs_no_header(tmp_path):
    images, labels = blobs(size=(8, 8))["train"]
    path = write_csv(tmp_path / "set.csv", images, labels)
    with_header = make_shards(f"csv:{path}", tmp_path / "a")
    assert with_header["records"]["written"] == 300
    assert list(with_header["splits"]) == ["train", "validation", "test"]
    path.write_text(path.read_text().split("\n", 1)[1])
    make_shards(f"csv:{path}", tmp_path / "b")
    assert records_in(tmp_path / "a") == records_in(tmp_path / "b")


def test_a_folder_keeps_class_names_and_paths(tmp_path):
    make_folder_set(tmp_path / "set")
    (tmp_path / "set" / "train" / ".hidden").mkdir()
    (tmp_path / "set" / "train" / ".hidden" / "x.png").write_bytes(b"")
    (tmp_path / "set" / "train" / "class 1" / "Thumbs.db").write_bytes(b"")
    manifest = make_shards(f"folder:{tmp_path}/set", tmp_path / "out")
    assert manifest["class_names"] == [f"class {label}" for label in range(10)]
    records = {"read": 350, "written": 350, "quarantined": 0, "ignored": {".db": 1}}
    assert manifest["records"] == records
    images, labels = blobs()["test"]
    expected = {
        (f"test/class {label}/{i:05d}.png", image.tobytes(), label)
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True))
    }
    assert records_in(tmp_path / "out")["test"] == expected


def test_a_folder_without_splits_follows_links_and_survives_loops(tmp_path):
    make_folder_set(tmp_path / "set")
    classes = tmp_path / "classes"
    classes.mkdir()
    for path in (tmp_path / "set" / "train").iterdir():
        (classes / path.name).symlink_to(path)
    (classes / "class 1" / "loop").symlink_to(classes)
    source = sources.open_source(f"folder:{classes}")
    assert source.split_sizes == {"unsplit": 300}
    assert len(source.class_names) == 10


def test_the_fingerprint_of_a_folder_knows_every_byte_and_name(tmp_path):
    directory = make_folder_set(tmp_path / "set", num_train=12, num_test=3)
    seen = {sources.open_source(f"folder:{directory}").fingerprint()}
    path = next(directory.rglob("*.png"))
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    seen.add(sources.open_source(f"folder:{directory}").fingerprint())
    path.write_bytes(data)
    path.rename(path.with_name("other.png"))
    seen.add(sources.open_source(f"folder:{directory}").fingerprint())
    assert len(seen) == 3
    path.with_name("other.png").rename(path)
    moved = directory.rename(tmp_path / "elsewhere")
    assert sources.open_source(f"folder:{moved}").fingerprint() in seen


@pytest.mark.parametrize("kind", ["idx", "npz", "csv", "folder"])
def test_a_url_gives_the_same_shards_as_the_files(tmp_path, kind):
    import fsspec

    local, url = tmp_path / "set", f"memory://{tmp_path.name}/set"
    if kind == "idx":
        make_idx_set(local, suffix=".gz")
    elif kind == "folder":
        make_folder_set(local, num_train=30, num_test=5)
    else:
        local.mkdir()
        images, labels = blobs(size=(8, 8))["train"]
        write_csv(local / "set.csv", images, labels)
        save_npz(local / "set.npz", KERAS)
    fsspec.filesystem("memory").put(str(local), url, recursive=True)
    rest = {"npz": "/set.npz", "csv": "/set.csv"}.get(kind, "")
    make_shards(f"{kind}:{local}{rest}", tmp_path / "a")
    make_shards(f"{kind}:{url}{rest}", tmp_path / "b")
    assert outputs_of(tmp_path / "a") == outputs_of(tmp_path / "b")


def test_a_set_of_tensorflow_datasets_is_prepared_from_files_in_the_manual_directory(tmp_path):
    import tensorflow_datasets as tfds

    class ManualBlobs(tfds.core.GeneratorBasedBuilder):
        """A data set as their catalog has them: registered by name, files put there by hand."""

        VERSION = tfds.core.Version("1.0.0")
        MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the IDX files there."
        pkg_dir_path = tmp_path

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(12, 8, 1)),
                "label": tfds.features.ClassLabel(names=list("abcdefghij")),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager):
            source = open_idx(str(dl_manager.manual_dir))
            return {"train": self._records(source, 0, 300), "test": self._records(source, 300, 350)}

        def _generate_examples(self):
            raise NotImplementedError

        def _records(self, source, first, last):
            images, labels = source.read(np.arange(first, last))
            for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                yield i, {"image": image, "label": label}

    manual = make_idx_set(tmp_path / "manual")
    out, data_dir = tmp_path / "out", str(tmp_path / "tfds")
    with pytest.raises(StageError, match="could not prepare it .* name it with --tfds_manual_dir"):
        make_shards("tfds:manual_blobs", out, tfds_data_dir=data_dir)
    dirs = {"tfds_data_dir": data_dir, "tfds_manual_dir": str(manual)}
    manifest = make_shards("tfds:manual_blobs", out, **dirs)
    assert manifest["class_names"] == list("abcdefghij")
    assert manifest["splits"]["test"] == 50
    # TFDS shuffles when it prepares, so ids say another order; the pixels are the same.
    pairs = {s: {record[1:] for record in records} for s, records in records_in(out).items()}
    train_pairs = pairs["train"] | pairs["validation"]
    images, labels = blobs()["train"]
    pixels = [image.tobytes() for image in images]
    assert train_pairs == set(zip(pixels, labels.tolist(), strict=True))
    # Another day, another folder, prepared already: nothing of it is in the output.
    moved = (tmp_path / "tfds").rename(tmp_path / "elsewhere")
    make_shards("tfds:manual_blobs:1.0.0", tmp_path / "again", tfds_data_dir=str(moved))
    assert outputs_of(tmp_path / "again") == outputs_of(out)
    with pytest.raises(StageError, match="cannot be loaded at version 9.9.9"):
        sources.open_source("tfds:manual_blobs:9.9.9", SourceOptions(tfds_data_dir=str(moved)))
    # Images of 12×8 pixels, by their headers; and a file that changes while it is read.
    options = SourceOptions(tfds_data_dir=str(moved), max_image_pixels=95)
    source = sources.open_source("tfds:manual_blobs", options)
    images, labels = source.read(np.arange(300, 303))
    assert "12×8 = 96 pixels, expected at most 95: --max_image_pixels" in images[2].reason
    source = sources.open_source("tfds:manual_blobs", SourceOptions(tfds_data_dir=str(moved)))
    np.testing.assert_array_equal(source.read(np.arange(300, 303))[1], labels)
    # With a memory, the records are not read for the fingerprint.
    prepared = [path for path in moved.rglob("*") if path.is_file()]
    for path in prepared:
        os.utime(path, ns=(0, 1))
    spec = conversion.SourceSpec("tfds:manual_blobs", tfds_data_dir=str(moved))
    fingerprint = source.fingerprint()
    (tmp_path / "memory").write_bytes(conversion.open_converted(spec).memory_bytes())
    spec = dataclasses.replace(spec, memory=str(tmp_path / "memory"))
    remembering = conversion.open_converted(spec)
    assert remembering.is_unchanged and remembering.trusted(np.arange(350)).all()
    assert remembering.fingerprint() == fingerprint
    os.utime(prepared[0], ns=(0, 2))
    assert not conversion.open_converted(spec).is_unchanged
    source = sources.open_source("tfds:manual_blobs", SourceOptions(tfds_data_dir=str(moved)))
    os.utime(next(moved.rglob("*array_record*")))
    with pytest.raises(SourceChanged, match="was changed while it was in use"):
        source.read(np.arange(3))


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("none", "auto", "none of the features holds labels: image"),
        ("image", "auto", "none of the features holds labels: image"),
        ("text", "auto", "expected an image and an integer label: --labels=none reads the images"),
        (
            "coarse",
            "auto",
            "expected an image and an integer label: --labels=none reads the images",
        ),
        ("text", "none", ""),
        ("coarse", "none", ""),
    ],
)
def test_a_set_of_tensorflow_datasets_may_lack_labels(tmp_path, kind, labels, message):
    import tensorflow_datasets as tfds

    (pixels, _), _ = blobs().values()
    features = {"image": tfds.features.Image(shape=(12, 8, 1))}
    more = {
        "text": ("label", tfds.features.Text(), "a"),
        "coarse": ("coarse", tfds.features.ClassLabel(num_classes=2), 1),
    }
    if kind in more:
        features[more[kind][0]] = more[kind][1]

    class Unlabelled(tfds.core.GeneratorBasedBuilder):
        """A set as their catalog has them; the name of each is its own."""

        name = f"unlabelled_{kind}_{labels}"
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            keys = ("image", "image") if kind == "image" else None
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), supervised_keys=keys
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(pixels[:20]):
                record = {"image": image[..., None]}
                if kind in more:
                    record[more[kind][0]] = more[kind][2]
                yield i, record

    spec = f"tfds:{Unlabelled.name}"
    options = SourceOptions(tfds_data_dir=str(tmp_path / "tfds"), labels=labels)
    if "expected" in message:
        with pytest.raises(UsageError, match=message):
            sources.open_source(spec, options)
        return
    source = sources.open_source(spec, options)
    assert source.notes == ([message] if message else []) and source.class_names == []
    images, found = source.read(np.arange(20))
    assert set(found.tolist()) == {-1}
    expected = {image.tobytes() for image in pixels[:20]}
    assert {np.asarray(image).tobytes() for image in images} == expected


def test_a_source_of_one_s_own(tmp_path, monkeypatch):
    (tmp_path / "my_sets.py").write_text(
        "import numpy as np\n"
        "from pipeline.sources import ArraySource\n"
        "def open_stripes(rest):\n"
        "    images = np.zeros((int(rest), 8, 8, 3), np.uint8)\n"
        "    images[:, ::2] = np.arange(len(images), dtype=np.uint8)[:, None, None, None]\n"
        "    return ArraySource({'train': (images, np.arange(len(images)) % 4)})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    manifest = make_shards("my_sets.open_stripes:40", tmp_path / "out")
    assert manifest["image_shape"] == [8, 8, 3]
    assert manifest["records"]["written"] == 40
    with pytest.raises(UsageError, match="no source 'my_sets.open_strips'"):
        sources.open_source("my_sets.open_strips:40")


def test_the_source_that_the_docs_show_is_one(tmp_path, monkeypatch):
    import pickle

    page = (REPOSITORY / "docs" / "preprocess.md").read_text()
    code = page.partition("## A source of your own")[2].split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 30
    (tmp_path / "pickles.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    generator = np.random.default_rng(0)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name in names:
        data = generator.integers(0, 256, (20, 3072), np.uint8)
        batch = {"data": data, "labels": [i % 10 for i in range(20)]}
        (tmp_path / name).write_bytes(pickle.dumps(batch))
    manifest = make_shards(f"pickles.open_cifar:{tmp_path}", tmp_path / "out")
    assert manifest["image_shape"] == [32, 32, 3]
    assert manifest["records"] == {"read": 120, "written": 120, "quarantined": 0}
    # Channels last: the last batch's first image as its authors say it is stored.
    image = data[0].reshape(3, 32, 32).transpose(1, 2, 0)
    pixels_by_id = {record[0]: record[1] for record in records_in(tmp_path / "out")["test"]}
    assert pixels_by_id["test-0000000"] == image.tobytes()


# IDX: names, layouts, damage.


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


def test_emnist_s_files_lie_side_by_side_and_are_transposed(tmp_path, data_dir):
    emnist = tmp_path / "emnist"
    emnist.mkdir()
    for split, (images, labels) in blobs().items():
        for name in ("letters", "digits"):
            write_idx(emnist / f"emnist-{name}-{split}-images-idx3-ubyte.gz", images.swapaxes(1, 2))
            write_idx(emnist / f"emnist-{name}-{split}-labels-idx1-ubyte.gz", labels)
    with pytest.raises(StageError, match="belong to the same split; name one set .*/emnist-"):
        sources.open_source(f"idx:{emnist}")
    out = tmp_path / "out"
    make_shards(f"idx:{emnist}/emnist-letters", out, transpose=True)
    assert records_in(out) == records_in(data_dir)


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


def cut_header(directory):
    (directory / TRAIN_IMAGES).write_bytes((directory / TRAIN_IMAGES).read_bytes()[:7])


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
    (cut_gzip, "not a complete gzip file .* download or copy it again"),
    (
        promise_more,
        "the header states 4294967295×12×8 = 412316860320 bytes, the file holds 28800",
    ),
    (wrong_magic, "starts with 89504e47, expected the IDX magic number 00000803"),
    (cut_header, "holds 7 bytes, expected an IDX header of 16"),
    (fewer_labels, "holds 300 images, .* holds 299 labels"),
    (empty_set, "holds 0×12×8 pixels; expected at least one image"),
    (other_shape, "image shapes differ between splits"),
    (remove_all, "no train-images-idx3-ubyte.* found t10k-images-idx3-ubyte.bak"),
    (lambda d: (d / TRAIN_IMAGES).unlink(), "no train-images-idx3-ubyte.* beside train-labels"),
    (lambda d: (d / TRAIN_LABELS).unlink(), "no train-labels-idx1-ubyte.* beside train-images"),
    (lambda d: (d / TRAIN_LABELS).write_bytes(b""), "starts with nothing, expected the IDX magic"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_SETS)
def test_a_bad_set_is_an_error_and_nothing_is_written(tmp_path, damage, message):
    directory = make_idx_set(tmp_path / "set")
    damage(directory)
    with pytest.raises(StageError, match=message):
        make_shards(f"idx:{directory}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("idx:/no/such/place", StageError, "no such directory; expected a directory of IDX files"),
        ("npz:/no/such/set.npz", StageError, "no such file; expected an .npz archive"),
        ("csv:/no/such/set.csv", StageError, "no such file"),
        ("folder:/no/such/place", StageError, "no such directory; expected a directory of images"),
        ("tfds:no_such_set", StageError, "tensorflow-datasets has no such set"),
        ("idx:", UsageError, "names no directory"),
        ("npz:", UsageError, "names no file"),
        ("csv:", UsageError, "names no file"),
        ("folder:", UsageError, "names no directory"),
        ("tfds:", UsageError, "names no set"),
        ("mnist", UsageError, "no source 'mnist'; expected sample, idx:DIR"),
        ("os.path:x", UsageError, r"no source 'os.path'"),
        ("sample:x", UsageError, "the sample takes no argument"),
    ],
)
def test_a_bad_spec(spec, error, message):
    with pytest.raises(error, match=message):
        sources.open_source(spec)


def unpickled(*_):
    raise AssertionError("a pickle was loaded")


class Payload:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return unpickled, ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.array([Payload()] * 300)}, "holds Python objects, which are never unpick"),
        ({"x_train": np.zeros((300, 12, 8))}, r"float64 \(300, 12, 8\); expected uint8"),
        ({"x_train": np.zeros((300, 12), np.uint8)}, r"\(300, 12\); expected uint8 \(n, H, W\)"),
        ({"x_train": np.zeros((300, 12, 8, 4), np.uint8)}, "expected uint8"),
        ({"x_train": np.zeros((299, 12, 8), np.uint8)}, "299 images and labels"),
        ({"y_train": np.zeros((300, 14), np.uint8)}, "one integer for each image"),
        ({"y_train": np.full(300, 0.5)}, "label 0 is 0.5; expected whole numbers"),
        ({"y_train": np.full(300, 70_000)}, "labels up to 70000; expected class numbers"),
        ({"train_images": np.zeros((300, 12, 8), np.uint8)}, "are both images of train"),
        ({"x_val": np.zeros((3, 12, 8), np.uint8)}, "expected images and labels of each split"),
        ({"y_train": np.zeros((300, 1, 1), np.uint8)}, "one integer for each image"),
    ],
)
def test_a_bad_npz(tmp_path, changes, message):
    spec = save_npz(tmp_path / "set.npz", KERAS, **changes)
    with pytest.raises(StageError, match=message):
        sources.open_source(spec)


@pytest.mark.parametrize("member", ["../evil", "/etc/evil", "a/../../evil"])
def test_an_npz_whose_members_lead_elsewhere(tmp_path, member):
    spec = save_npz(tmp_path / "set.npz", KERAS, **{member: np.zeros(3)})
    with pytest.raises(StageError, match=f"holds a member named '{member}.npy'; expected a path"):
        sources.open_source(spec)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_cut_npz(tmp_path, part):
    spec = save_npz(tmp_path / "set.npz", KERAS)
    data = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "set.npz").write_bytes(data[: int(part * len(data))])
    with pytest.raises(StageError, match=r"not a complete \.npz archive"):
        sources.open_source(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the first line has 0 column\(s\)"),
        ("hello\nworld\n", r"the first line has 1 column\(s\)"),
        ("label,pixel0,pixel1,pixel2,pixel3\n", "holds a header but no rows"),
        ("1,2,3\n", "2 pixels a row; expected a square image"),
    ],
)
def test_a_bad_csv(tmp_path, text, message):
    (tmp_path / "set.csv").write_text(text)
    with pytest.raises(StageError, match=message) as error:
        make_shards(f"csv:{tmp_path}/set.csv", tmp_path / "out")
    assert "set.csv" in str(error.value)


@pytest.mark.parametrize(
    "first", ["\ufeff3", "1.0", '"1"', "x", ""], ids=["BOM", "float", "quoted", "word", "empty"]
)
def test_a_first_row_with_something_wrong_is_no_header(tmp_path, first):
    images, labels = blobs(num_train=20, size=(8, 8))["train"]
    path = write_csv(tmp_path / "set.csv", images, labels)
    lines = path.read_text().splitlines()[1:]
    lines[0] = first + "," + lines[0].split(",", 1)[1]
    path.write_text("\n".join(lines) + "\n5\n")  # And a line of one character.
    manifest = make_shards(f"csv:{path}", tmp_path / "out", max_quarantined="2", num_shards=1)
    bad = 2 if first in ("x", "") else 1  # A label 1.0 or "1" is a number.
    assert manifest["records"] == {"read": 21, "written": 21 - bad, "quarantined": bad}


@pytest.mark.parametrize("label", ["1_0", "+2", "-70000", "65536"])
def test_labels_that_are_none_make_no_class(tmp_path, label):
    images, labels = blobs(num_train=20, size=(8, 8))["train"]
    path = write_csv(tmp_path / "set.csv", images, labels)
    extra = ",".join([label, *["0"] * 64])
    junk = "60000,1\n" + ",".join(["77", "a", *["0"] * 63])
    path.write_text(path.read_text() + f"{extra}\n{junk}\n")
    manifest = make_shards(f"csv:{path}", tmp_path / "out", max_quarantined="3", num_shards=1)
    assert manifest["records"] == {"read": 23, "written": 20, "quarantined": 3}
    assert len(manifest["class_names"]) == labels.max() + 1


def test_a_set_of_labels_outside_any_class_list(tmp_path):
    images, _ = blobs(num_train=30)["train"]
    np.savez(tmp_path / "set.npz", x=images, y=np.full(30, -7))
    manifest = make_shards(f"npz:{tmp_path}/set.npz", tmp_path / "out", num_shards=1)
    assert manifest["class_names"] == []
    np.savez(tmp_path / "set.npz", x=images, y=np.append(np.zeros(29, np.int64), 65_535))
    manifest = make_shards(f"npz:{tmp_path}/set.npz", tmp_path / "high", num_shards=1)
    assert len(manifest["class_names"]) == 65_536


def test_a_folder_of_odd_names_pipes_and_links_to_nowhere(tmp_path):
    folder = make_folder_set(tmp_path / "set", num_train=30, num_test=5)
    odd = folder / "train" / os.fsdecode(b"class \xff\n<b>")
    odd.mkdir()
    image = next(folder.rglob("*.png"))
    shutil.copy(image, odd / os.fsdecode(b"\xfe.png"))
    os.mkfifo(odd / "pipe.png")
    (odd / "nowhere.png").symlink_to(tmp_path / "nothing")
    manifest = make_shards(f"folder:{folder}", tmp_path / "out", max_quarantined="1", num_shards=1)
    assert manifest["records"] == {"read": 37, "written": 36, "quarantined": 1}
    assert "class \\udcff\n<b>" in manifest["class_names"]
    assert "<b>" not in (tmp_path / "out" / "stats.html").read_text()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("class_names = ['a', 'b', 'a']", "the class name 'a' appears twice"),
        ("split_sizes = {'train': 0}", "holds no records"),
        ("ids = lambda self, i: [b'\\xff%d' % x for x in i]", "ids are not UTF-8 bytes"),
        ("ids = lambda self, i: [str(x) for x in i]", "ids are not UTF-8 bytes"),
        ("read = lambda self, i: (self.x[i][1:], self.y[i])", "returned .* images and labels"),
        ("read = lambda self, i: (self.x[i], self.y[i] * 1.5)", "returned labels of float64"),
    ],
)
def test_a_source_of_one_s_own_that_breaks_the_protocol(tmp_path, monkeypatch, body, message):
    name = f"broken_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\n"
        "class Broken:\n"
        "    x, y = np.zeros((9, 4, 4, 1), np.uint8), np.arange(9) % 3\n"
        "    image_shape, class_names, split_sizes = (4, 4, 1), ['a', 'b', 'c'], {'train': 9}\n"
        "    fingerprint = lambda self: 'x'\n"
        "    ids = lambda self, i: [b'%d' % x for x in i]\n"
        "    where = lambda self, i: str(i)\n"
        "    read = lambda self, i: (self.x[i], self.y[i])\n"
        f"    {body}\n"
        "def make(rest):\n"
        "    return Broken()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StageError, match=message):
        make_shards(f"{name}.make:", tmp_path / "out", num_shards=1)


def test_a_folder_that_does_not_say_what_is_a_class(tmp_path):
    directory = make_folder_set(tmp_path / "set", num_train=8, num_test=2)
    (directory / "cat").mkdir()
    shutil.copy(next(directory.rglob("*.png")), directory / "cat" / "1.png")
    with pytest.raises(StageError, match="test/ looks like a split, cat/ like a class"):
        sources.open_source(f"folder:{directory}")
    assert sources.open_source(f"folder:{directory}/cat").class_names == []
    with pytest.raises(StageError, match="0 images"):
        (tmp_path / "empty").mkdir()
        sources.open_source(f"folder:{tmp_path}/empty")


# Conversions.


def open_converted(source, **settings):
    conversion.open_source_once.cache_clear()
    return conversion.open_converted(conversion.SourceSpec(source, **settings))


def test_conversions_are_pillow_s_own(tmp_path):
    from PIL import Image

    generator = np.random.default_rng(1)
    colours = generator.integers(0, 256, (6, 10, 14, 3), np.uint8)
    labels = np.arange(6)
    np.savez(tmp_path / "set.npz", x_train=colours, y_train=labels)
    spec = f"npz:{tmp_path}/set.npz"
    source = open_converted(spec, image_size=(5, 4), grayscale=True, transpose=True)
    assert source.image_shape == (5, 4, 1)
    images = source.read(np.arange(6)).images
    for image, original in zip(images, colours, strict=True):
        picture = Image.fromarray(original.swapaxes(0, 1).copy()).convert("L")
        expected = np.asarray(picture.resize((4, 5), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(image[..., 0], expected)


@pytest.mark.parametrize(
    ("mode", "shape"), [("1", (1,)), ("L", (1,)), ("P", (3,)), ("RGB", (3,)), ("CMYK", (3,))]
)
@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "gif"])
def test_image_files_of_any_kind_are_grey_or_rgb(tmp_path, mode, shape, extension):
    from PIL import Image

    from pipeline.sources.readers import folder

    gradient = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12) * 2)
    picture = gradient.convert("RGB").convert(mode)
    try:
        picture.save(tmp_path / f"x.{extension}")
    except (OSError, ValueError):
        pytest.skip(f"{extension} holds no {mode}")
    pixels = folder.decode((tmp_path / f"x.{extension}").read_bytes(), allow_tiff=True)
    assert pixels.dtype == np.uint8
    assert pixels.shape[:2] == (8, 12)
    assert pixels.shape[2:] in (shape, (3,))
    reread = Image.open(tmp_path / f"x.{extension}").convert("RGB" if pixels.shape[2] == 3 else "L")
    np.testing.assert_array_equal(pixels.squeeze(), np.asarray(reread))
