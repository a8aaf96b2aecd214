"""tensorflow-datasets reads (image, label) and the class names of every set."""

import json
import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from pipeline.datasets import reader, tfds_metadata
from pipeline.datasets.building import removal
from pipeline.runners import options
from tests.conftest import REPOSITORY, make_folder_set, make_shards
from tests.datasets.test_repair import mend

# Class -> how tensorflow-datasets names it.
_ODD = {
    "a\nb": '"a\\nb"',
    " cat": '" cat"',
    '"quoted"': '"\\"quoted\\""',
    "cat": "cat",
    "dog's, house; 3 %": "dog's, house; 3 %",
    "日本": "日本",
}
# The class names; split -> (image, label) of each record, in order.
Supervised = tuple[list[str], dict[str, list[tuple[bytes, int]]]]


def supervised(directory: object) -> Supervised:
    """What tensorflow-datasets reads of a set."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(directory))
    config = tfds.ReadConfig(interleave_cycle_length=1)
    pairs = {}
    for split in builder.info.splits:
        read = builder.as_dataset(split=split, as_supervised=True, read_config=config)
        pairs[split] = [(image.tobytes(), int(label)) for image, label in tfds.as_numpy(read)]
    return builder.info.features["label"].names, pairs


def written(directory: object) -> Supervised:
    """What this package reads of a set."""
    dataset = reader.Dataset(str(directory))
    pairs = {}
    for split in dataset.splits:
        shards = map(dataset.read_shard, dataset.shards(split))
        pairs[split] = [
            (image.tobytes(), label)
            for shard in shards
            for image, label in zip(shard.images, shard.labels.tolist(), strict=True)
        ]
    return dataset.manifest["class_names"], pairs


def folder(directory: pathlib.Path, class_names: list[str], *, of: int = 3) -> str:
    """A source of `of` images a class, all of them to train on."""
    for name in class_names:
        generator = np.random.default_rng(list(name.encode()))
        (directory / "train" / name).mkdir(parents=True, exist_ok=True)
        for number in range(of):
            image = Image.fromarray(generator.integers(0, 256, (6, 4)).astype(np.uint8))
            image.save(directory / "train" / name / f"{number}.png")
    return f"folder:{directory}"


def test_labelled_and_unlabelled_sets(data_dir, idx_dir, tmp_path):
    assert supervised(data_dir) == written(data_dir)
    assert supervised(data_dir)[0] == list("0123456789")
    make_shards(f"idx:{idx_dir}", tmp_path / "none", labels="none", num_shards=1)
    names, pairs = supervised(tmp_path / "none")
    assert (names, pairs) == written(tmp_path / "none")
    assert names == [] and {label for split in pairs.values() for _, label in split} == {-1}
    assert not (tmp_path / "none" / "label.labels.txt").exists()
    make_shards(f"idx:{idx_dir}", tmp_path / "gz", compression="gzip", num_shards=1)
    assert not any((tmp_path / "gz" / name).exists() for name in tfds_metadata.NAMES)


def test_the_snippet_of_the_docs_and_what_show_examples_says(data_dir, capsys):
    import tensorflow_datasets as tfds

    page = (REPOSITORY / "docs" / "preprocess.md").read_text()
    [snippet] = re.findall(r"```python\n(import tensorflow_datasets.*?)```", page, re.S)
    exec(snippet.replace("/tmp/mnist", str(data_dir)), namespace := {})
    labels = [label for _, label in supervised(data_dir)[1]["train"]]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("(12, 8, 1) ") and int(line.split()[-1]) in labels
    builder = namespace["builder"]
    with pytest.raises(ValueError, match="Visualisation not supported"):
        tfds.show_examples(builder.as_dataset(split="train"), builder.info)


@pytest.mark.parametrize("named", [{"the only class": "the only class"}, _ODD])
def test_one_class_and_odd_names(tmp_path, named):
    source = folder(tmp_path / "set", list(named))
    manifest = make_shards(source, tmp_path / "out", num_shards=1, validation_fraction=0)
    assert sorted(manifest["class_names"]) == sorted(named)
    names, pairs = supervised(tmp_path / "out")
    assert names == [named[name] for name in manifest["class_names"]]
    assert pairs == written(tmp_path / "out")[1]


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(st.lists(st.text(st.characters(codec=None), max_size=4), unique=True, min_size=1))
@hypothesis.example(["a", "a ", "a\n", "a\r", '"a\\n"', "", " ", "\ud800", "\ufeff"])
def test_any_names_stay_as_many_and_distinct(tmp_path_factory, class_names):
    import tensorflow_datasets as tfds

    path = tmp_path_factory.getbasetemp() / "names.txt"
    files = tfds_metadata.tfds_files(
        name="x", image_shape=(1, 1, 1), class_names=class_names, splits={}, num_shards={}
    )
    path.write_bytes(files["label.labels.txt"])
    read = tfds.features.ClassLabel(names_file=path).names  # Refuses names that are equal.
    assert len(read) == len(class_names)
    for name, line in zip(class_names, read, strict=True):
        assert line == name or json.loads(line) == name


def test_a_set_that_grows_shrinks_and_is_mended(tmp_path):
    out, source = tmp_path / "out", tmp_path / "set"
    settings = {"num_shards": 1, "validation_fraction": 0}
    make_shards(folder(source, ["cat", "eel"]), out, **settings)
    make_shards(folder(source, ["ant", "cat", "eel"]), out, append=True, **settings)
    assert supervised(out) == written(out)
    assert supervised(out)[0] == ["cat", "eel", "ant"]
    beam = options.parse_options([])
    removal.remove_records(
        str(out), ["train/ant/0.png", "train/cat/1.png"], overwrite=False, options=beam
    )
    names, pairs = supervised(out)
    assert (names, pairs) == written(out) and sum(map(len, pairs.values())) == 7
    expected = (out / "label.labels.txt").read_bytes()
    (out / "label.labels.txt").write_bytes(b"cat\n")
    mend(out)
    assert (out / "label.labels.txt").read_bytes() == expected and supervised(out)[0] == names
    make_shards(f"folder:{make_folder_set(tmp_path / 'other')}", out, labels="none", overwrite=True)
    assert supervised(out) == written(out) and supervised(out)[0] == []
