"""A set that nobody has named is called after its source, and keeps its name."""

import shutil

import hypothesis
import hypothesis.strategies as st
import pytest

from pipeline.datasets import naming
from tests.conftest import make_idx_set, make_shards, outputs_of, run_command


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("sample", "mnist"),
        ("idx:/data/mnist", "mnist"),
        ("idx:/data/MNIST/", "mnist"),
        ("idx:/data/fashion-mnist", "fashion_mnist"),
        ("idx:/data/emnist/emnist-letters", "emnist_letters"),
        ("npz:/data/mnist.npz", "mnist"),
        ("csv:/data/digits/train.csv.gz", "digits"),
        ("csv:/data/mnist_train.csv", "mnist_train"),
        ("folder:/data/Sea Animals (2019)/train", "sea_animals_2019"),
        ("folder:/data/incoming/2026-11-25", "incoming"),
        ("folder:/data/101 objects", "images_101_objects"),
        ("folder:/data/Früchte", "früchte"),
        ("folder:/data/Fru\u0308chte", "früchte"),
        ("folder:/data/照片", "照片"),
        ("folder:/", "images"),
        ("folder:", "images"),
        ("folder:.", "tests"),
        ("parquet:/hub/fashion_mnist/train/0000.parquet", "fashion_mnist"),
        ("parquet:/hub/mnist/train-*.parquet", "mnist"),
        ("parquet:/hub/mnist/**/part[0-9].parquet", "mnist"),
        ("folder:gs://bucket/photos/", "photos"),
        ("folder:gs://bucket", "bucket"),
        ("tfds:mnist", "mnist"),
        ("tfds:fashion_mnist:3.0.1", "fashion_mnist"),
        ("tfds:emnist/letters:3.*.*", "emnist_letters"),
        ("pickles.open_cifar:/data/cifar-10", "cifar_10"),
        ("own.open_train:train", "images"),
        ("own.open:", "images"),
    ],
)
def test_the_name_of_a_source(source, name, monkeypatch):
    monkeypatch.chdir("tests")
    assert naming.name_of_source(source) == name


_KINDS = ["sample", "idx:", "npz:/", "csv:a/", "parquet:", "tfds:", "folder:gs://", "a.b:", ""]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.sampled_from(_KINDS), st.text(st.characters(codec=None)))
@hypothesis.example("idx:", "ü" * 60)
@hypothesis.example("folder:gs://", "\u0bf0²İ\ud800")
def test_every_source_has_a_name_that_the_flag_takes(kind, rest):
    name = naming.name_of_source(kind + rest.replace("\0", ""))
    assert name.isidentifier() and len(name.encode()) <= naming.MAX_BYTES
    assert naming.name_of_source(f"npy:/{name}.npy") in (name, "images")


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A source, and a set of it that an earlier version has called mnist."""
    directory = tmp_path_factory.mktemp("naming")
    make_idx_set(directory / "Fashion-MNIST", num_train=30, num_test=6)
    make_shards(f"idx:{directory}/Fashion-MNIST", directory / "old", name="mnist", num_shards=2)
    return directory


def test_a_new_set_is_called_after_its_source(fashion, tmp_path, capsys):
    source = f"idx:{fashion}/Fashion-MNIST"
    flags = [f"--source={source}", f"--output_dir={tmp_path}/out"]
    line = "preprocess: the set is named fashion_mnist: its files begin with fashion_mnist-"
    assert line in run_command("pipeline.preprocess", *flags, "--dry_run").stdout.splitlines()
    make_shards(source, tmp_path / "out", name=None, num_shards=2)
    assert line in capsys.readouterr().err.splitlines()
    make_shards(source, tmp_path / "given", name="fashion_mnist", num_shards=2)
    assert outputs_of(tmp_path / "out") == outputs_of(tmp_path / "given")
    assert (tmp_path / "out" / "fashion_mnist-test.tfrecord-00001-of-00002").exists()


def test_a_set_keeps_its_name(fashion, tmp_path, capsys):
    source, out = f"idx:{fashion}/Fashion-MNIST", tmp_path / "out"
    shutil.copytree(fashion / "old", out)
    before = outputs_of(out)
    assert make_shards(source, out, name=None, num_shards=2)["reused"]
    assert outputs_of(out) == before
    make_idx_set(tmp_path / "more", num_train=33, num_test=7)
    settings = {"append": True, "num_shards": 1, "id_prefix": "more-"}
    manifest = make_shards(f"idx:{tmp_path}/more", out, name=None, **settings)
    assert manifest["name"] == "mnist" and manifest["last_append"]["written"] == 40
    assert "the set is named mnist" in capsys.readouterr().err
    # What is made anew is a new set.
    assert make_shards(source, out, name=None, overwrite=True)["name"] == "fashion_mnist"
    assert not list(out.glob("mnist-*"))


def test_an_unfinished_job_keeps_its_name(fashion, tmp_path, when_written):
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    source, out = f"idx:{fashion}/Fashion-MNIST", tmp_path / "out"
    when_written("out/manifest.json", die)
    with pytest.raises(Killed):
        make_shards(source, out, name="mnist", num_shards=2)
    make_shards(source, out, name=None, num_shards=2)
    assert outputs_of(out) == outputs_of(fashion / "old")


@pytest.mark.parametrize("name", ["../mnist", "", 3, None])
def test_a_name_that_no_job_writes_is_not_taken(tmp_path, name):
    from pipeline.stages import manifest as manifest_lib

    (tmp_path / ".progress").mkdir()
    job = {"stage": "preprocess", "made_from": {"name": name}, "names": []}
    (tmp_path / ".progress" / "job.json").write_bytes(manifest_lib.sealed_json(job))
    assert naming.existing_name(str(tmp_path)) is None
