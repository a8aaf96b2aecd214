"""What a set is said to be: statistics against NumPy, warnings against sets made wrong."""

import hashlib
import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from pipeline.datasets.profile.statistics import Statistics
from tests.conftest import blobs, make_shards, outputs_of

SHAPES = st.sampled_from([(3, 4, 1), (5, 2, 3), (130, 2, 1)])


@st.composite
def some_records(draw):
    count = draw(st.integers(1, 12))
    shape = (count, *draw(SHAPES))
    images = draw(hnp.arrays(np.uint8, shape))
    labels = draw(hnp.arrays(np.int64, count, elements=st.integers(-2, 5)))
    return images, labels


@hypothesis.given(some_records(), st.data())
def test_statistics_are_numpy_s_and_the_sum_of_those_of_any_parts(records, data):
    images, labels = records
    whole = Statistics(images.shape[1:])
    whole.add(images, labels)
    summary = whole.summary(["a", "b", "c"])
    pixels = images.reshape(-1, images.shape[3]).astype(np.float64)
    np.testing.assert_allclose(summary["mean_per_channel"], pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(summary["std_per_channel"], pixels.std(axis=0), atol=1e-6)
    assert (summary["min"], summary["max"]) == (images.min(), images.max())
    assert summary["num_blank"] == sum(np.ptp(image) == 0 for image in images)
    counted = [*summary["num_per_class"].values(), *summary["num_outside_classes"].values()]
    counted.append(summary.get("num_unlabelled", 0))
    assert sum(counted) == summary["num_examples"] == len(images)
    assert summary["num_per_class"]["b"] == (labels == 1).sum()
    for label in set(labels.tolist()) & set(range(6)):
        mean = images[labels == label].astype(np.float64).mean(axis=0)
        step = -(-max(images.shape[1:3]) // 64)
        np.testing.assert_allclose(whole.mean_image(label), mean[::step, ::step], atol=0.5001)

    order = data.draw(st.permutations(range(len(images))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(images)), max_size=3)))
    total = Statistics(images.shape[1:])
    for part in np.split(np.array(order), cuts):
        statistics = Statistics(images.shape[1:])
        statistics.add(images[part], labels[part])
        total += Statistics.from_bytes(statistics.to_bytes())
    assert total.summary([]) == whole.summary([])
    assert total.to_bytes() == whole.to_bytes()


def of_set(tmp_path, splits, **settings) -> tuple[dict, dict]:
    """Manifest and statistics of a set of these arrays; images (n, H, W)."""
    arrays = {}
    for split, (images, labels) in splits.items():
        arrays |= {f"x_{split}": images, f"y_{split}": np.asarray(labels)}
    np.savez(tmp_path / "set.npz", **arrays)
    settings = {"num_shards": 2, "validation_fraction": 0.0, **settings}
    manifest = make_shards(f"npz:{tmp_path}/set.npz", tmp_path / "out", **settings)
    return manifest, json.loads((tmp_path / "out" / "statistics.json").read_text())


def test_a_set_with_nothing_wrong_has_no_warnings(tmp_path):
    manifest, statistics = of_set(tmp_path, blobs())
    assert manifest["warnings"] == statistics["warnings"] == []
    assert "Nothing looks wrong" in (tmp_path / "out" / "stats.html").read_text()


def test_images_that_stand_twice_are_found_wherever_they_are(tmp_path, monkeypatch):
    from pipeline.datasets.profile import duplicates

    monkeypatch.setattr(duplicates, "_RECORDS_AT_ONCE", 40)
    generator = np.random.default_rng(2)
    x, u = (generator.integers(0, 256, (n, 6, 5), np.uint8) for n in (200, 60))
    y, v = np.arange(200) % 10, np.arange(60) % 10
    x[150], x[151], u[3], u[40] = x[7], x[7], x[7], x[90]
    manifest, statistics = of_set(tmp_path, {"train": (x, y), "test": (u, v)})
    warning, relabelled = manifest["warnings"]
    assert warning.startswith("2 images stand both in train and in test: ")
    # Pixels of record 7 stand at 150 and 151, whose labels are 0 and 1; and those of 90 at 40.
    assert relabelled.startswith("1 image has more than one label: train-0000007 = train-0000150")
    assert "train-0000007 = test-0000003" in warning
    assert "train-0000090 = test-0000040" in warning
    assert statistics["duplicates_between"] == {"train, test": 2}
    assert statistics["splits"]["train"]["num_duplicates"] == 2
    assert statistics["splits"]["test"]["num_duplicates"] == 0
    lines = [
        json.loads(x) for x in (tmp_path / "out" / "duplicates.jsonl").read_text().split("\n")[:-1]
    ]
    expected = {
        hashlib.sha256(x[7].tobytes()).hexdigest()[:32]: {
            "test": ["test-0000003"],
            "train": ["train-0000007", "train-0000150", "train-0000151"],
        },
        hashlib.sha256(x[90].tobytes()).hexdigest()[:32]: {
            "test": ["test-0000040"],
            "train": ["train-0000090"],
        },
    }
    assert {line["image_hash"]: line["ids"] for line in lines} == expected
    assert sorted(line.get("labels", []) for line in lines) == [[], [0, 1, 3, 7]]
    assert [line["image_hash"] for line in lines] == sorted(expected)


def test_blank_images_missing_classes_and_labels_outside_the_list(tmp_path):
    (x, y), (u, v) = blobs().values()
    x[:3] = [[[0]], [[255]], [[9]]]
    v[v == 4] = 5
    manifest, statistics = of_set(
        tmp_path, {"train": (x, y), "test": (u, v)}, class_names=tuple("abcdefghi")
    )
    text = "\n".join(manifest["warnings"])
    assert "train has 3 images of one value everywhere" in text
    assert "test has no image of class e" in text
    count = int((y == 9).sum())
    assert f"train has {count} images with a label outside the class list: 9" in text
    assert statistics["splits"]["train"]["num_outside_classes"] == {"9": count}
    page = (tmp_path / "out" / "stats.html").read_text()
    assert "9, outside the list" in page
    assert manifest["class_names"] == list("abcdefghi")


def test_negative_labels_are_outside_the_list(tmp_path):
    (x, y), (u, v) = blobs().values()
    manifest, _ = of_set(tmp_path, {"train": (x, y), "test": (u, np.full(50, -2))})
    assert any("test has 50 images with a label outside" in w for w in manifest["warnings"])


def test_negatives_are_noticed(tmp_path):
    (x, y), (u, v) = blobs().values()
    manifest, _ = of_set(tmp_path, {"train": (x, y), "test": (255 - u, v)})
    assert any(w.startswith("train and test look like negatives") for w in manifest["warnings"])


@pytest.mark.parametrize(("num_images", "darkest", "lightest"), [(30, 80, 160), (5, 0, 60)])
def test_opposite_shades_around_grey_and_a_few_images_are_no_negatives(
    tmp_path, num_images, darkest, lightest
):
    """Photos are as light as dark, and the mean of a few images is anything."""
    shade = np.linspace(darkest, lightest, 8).astype(np.uint8)
    train = np.broadcast_to(shade, (num_images, 12, 8))
    test = train[..., ::-1] + 14 if num_images > 20 else 255 - train
    labels = np.arange(num_images) % 2
    manifest, _ = of_set(tmp_path, {"train": (train, labels), "test": (test, labels)})
    assert not any("negatives" in warning for warning in manifest["warnings"])


def test_warnings_are_printed_and_stand_on_the_page(tmp_path):
    from tests.forked import run_command

    (x, y), _ = blobs().values()
    x[0] = 0
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y)
    flags = (f"--source=npz:{tmp_path}/set.npz", f"--output_dir={tmp_path}/out", "--name=<b>")
    assert run_command("pipeline.preprocess", *flags, check=False).returncode == 2
    done = run_command("pipeline.preprocess", *flags[:2], "--class_names=<i>,b,c,d,e,f,g,h,i,j")
    assert "preprocess: warning: train has 1 image of one value everywhere" in done.stderr
    page = (tmp_path / "out" / "stats.html").read_text()
    assert "train has 1 image of one value everywhere" in page
    assert "&lt;i&gt;" in page and "<i>" not in page


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(12, 8), (200, 150)])
def test_a_page_of_any_shape_shows_every_image_it_promises(tmp_path, channels, size):
    import base64
    import io
    import re

    from PIL import Image

    images, labels = blobs(num_train=30, size=size)["train"]
    images = np.repeat(images[..., None], channels, axis=3)
    of_set(tmp_path, {"train": (images, labels)})
    page = (tmp_path / "out" / "stats.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == len(set(labels.tolist())) + 30
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert image.mode == {1: "L", 3: "RGB"}[channels]
            assert max(image.size) <= 128
    assert "http" not in page.replace("http-equiv", "")  # Needs no other file.


def test_the_same_set_elsewhere_gives_the_same_page(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        of_set(tmp_path / name, blobs())
    assert outputs_of(tmp_path / "a" / "out") == outputs_of(tmp_path / "b" / "out")
