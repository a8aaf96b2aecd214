"""Sets without labels: made, grown, trained on, exported, shown."""

import contextlib
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipeline.api import exports, keywords
from pipeline.cli.errors import UsageError
from pipeline.embeddings import inputs
from pipeline.sources import ArraySource
from pipeline.sources.source import UNLABELLED
from tests.conftest import (
    blobs,
    make_embeddings,
    make_shards,
    outputs_of,
    smoke_config,
    state_of,
)
from tests.forked import run_command
from tests.reports.test_report import make_report_of
from tests.sources.test_sources import records_in


def open_partly(which: str) -> ArraySource:
    """The blobs, with labels in the splits that are named."""
    splits = {
        split: (
            images[..., None],
            labels if split in which.split(",") else np.full(len(labels), UNLABELLED),
        )
        for split, (images, labels) in blobs().items()
    }
    return ArraySource(splits, name="partly")


PARTLY = f"{__name__}.open_partly"


@pytest.fixture(scope="module")
def unlabelled(idx_dir, tmp_path_factory):
    """The set of `data_dir` without its labels."""
    directory = tmp_path_factory.mktemp("unlabelled") / "blobs"
    make_shards(f"idx:{idx_dir}", directory, labels="none")
    return directory


def test_labels_are_left_out_and_nothing_else(unlabelled, data_dir):
    labelled, found = records_in(data_dir), records_in(unlabelled)
    assert found == {
        split: {(*record[:2], UNLABELLED) for record in records}
        for split, records in labelled.items()
    }
    manifest = json.loads((unlabelled / "manifest.json").read_text())
    assert manifest["class_names"] == [] and manifest["warnings"] == []
    assert manifest["made_from"]["source"]["labels"] == "none"
    assert (
        "labels" not in json.loads((data_dir / "manifest.json").read_text())["made_from"]["source"]
    )


def test_a_source_without_labels_is_the_same_set(unlabelled, tmp_path):
    make_shards(f"{PARTLY}:", tmp_path / "out")
    shards = {name: data for name, data in outputs_of(unlabelled).items() if "tfrecord" in name}
    found = outputs_of(tmp_path / "out")
    assert {name: found[name] for name in shards} == shards


def test_the_page_of_an_unlabelled_set_shows_no_classes(unlabelled):
    page = (unlabelled / "stats.html").read_text()
    assert "322 images" not in page and "350 images of 12×8×1, no labels" in page
    assert "Class balance" not in page and "outside" not in page and "-1" not in page
    statistics = json.loads((unlabelled / "statistics.json").read_text())["splits"]
    for part in statistics.values():
        assert part["num_unlabelled"] == part["num_examples"]
        assert part["num_per_class"] == part["num_outside_classes"] == {}


def test_a_labelled_and_an_unlabelled_split_make_one_set(tmp_path):
    manifest = make_shards(f"{PARTLY}:train", tmp_path / "out")
    assert manifest["warnings"] == [] and len(manifest["class_names"]) == 10
    labels = {
        split: {label for *_, label in records}
        for split, records in records_in(tmp_path / "out").items()
    }
    assert labels["test"] == {UNLABELLED} and UNLABELLED not in labels["train"]
    page = (tmp_path / "out" / "stats.html").read_text()
    assert "10 classes and 50 images without a label" in page
    assert "<td>unlabelled</td>" in page.replace(' class="text"', "")


@pytest.mark.parametrize("first, second", [("", "train,test"), ("train,test", "")])
def test_unlabelled_and_labelled_records_are_appended_to_each_other(tmp_path, first, second):
    out = tmp_path / "out"
    make_shards(f"{PARTLY}:{first}", out)
    manifest = make_shards(f"{PARTLY}:{second}", out, append=True, id_prefix="more-")
    assert manifest["records"]["written"] == 700 and len(manifest["class_names"]) == 10
    labels = [label for records in records_in(out).values() for *_, label in records]
    assert labels.count(UNLABELLED) == 350


@pytest.fixture(scope="module")
def exported(unlabelled, trained, tmp_path_factory):
    """An export of train and test of the unlabelled set, and the report."""
    directory, model = tmp_path_factory.mktemp("run"), trained / "export"
    make_embeddings(unlabelled, model, directory / "out", split="train,test")
    make_report_of(directory / "out", unlabelled, model, split=["train", "test"])
    return directory


@pytest.mark.long
def test_a_model_does_not_see_labels(unlabelled, trained, tmp_path):
    from trainer.runs import train

    train.train(smoke_config(unlabelled), workdir=str(tmp_path / "run"))
    labelled, found = state_of(trained), state_of(tmp_path / "run")
    assert labelled.keys() == found.keys()
    for name in (name for name in labelled if labelled[name].dtype == np.float32):
        np.testing.assert_array_equal(labelled[name], found[name], err_msg=name)


def test_rows_have_the_label_of_none(exported):
    tables = [
        pq.read_table(path) for path in sorted((exported / "out").glob("embeddings/*.parquet"))
    ]
    labels = [label for table in tables for label in table["label"].to_pylist()]
    assert labels == [UNLABELLED] * 322


def test_the_report_shows_no_classes_and_no_probes(exported):
    page = (exported / "out" / "report.html").read_text()
    assert 'id="latent-space"' in page
    assert 'id="probes"' not in page and 'id="class-losses"' not in page
    page = re.sub("<(script|style).*?</", "", page, flags=re.DOTALL)
    for word in ("labelled", "coloured by class", "classes", ">-1", ": -1", "unlabelled"):
        assert word not in page, word
    lines = (exported / "out" / "projector" / "metadata.tsv").read_text().splitlines()
    assert lines[0] == "class\tid\tlabel" and all(
        line.startswith("unlabelled\t") and line.endswith("\t-1") for line in lines[1:]
    )


def test_a_report_of_partly_labelled_rows_probes_those_with_labels(trained, tmp_path):
    from pipeline.datasets.building import create as create_set
    from pipeline.sources import conversion

    source = f"{PARTLY}:train"
    make_embeddings(source, trained / "export", tmp_path / "out", split="train,test")
    settings = create_set.Settings("blobs", 4, 0.1, 0, "none")
    input_ = inputs.SourceInput(conversion.SourceSpec(source), settings, ["train", "test"])
    page = make_report_of(tmp_path / "out", input_, trained / "export").read_text()
    assert "by 5-fold cross-validation on 272 rows" in page.lower()
    assert "unlabelled" in page and ">-1<" not in page


def test_what_contradicts_is_refused(tmp_path):
    for flags, message in (
        (["--labels=none", "--class_names=a,b"], "no class is left to be named"),
        (["--grayscale", "--rgb"], "contradict each other; set one of them"),
        (["--background=grey"], "expected white, black or #rrggbb"),
        (["--pixel_range=1,0"], "expected LOW,HIGH, two numbers with LOW < HIGH"),
        (
            ["--pixel_range=0,1"],
            "applies to npz:… and npy:… and idx:… only, and the source is sample",
        ),
        (["--class_level=0"], "class_level"),
    ):
        command = ["--source=sample", f"--output_dir={tmp_path}/out", *flags]
        done = run_command("pipeline.preprocess", *command, check=False)
        assert (done.returncode, message in done.stderr) == (2, True), (flags, done.stderr)
    assert not (tmp_path / "out").exists()


def test_all_of_a_source_is_embedded_and_test_of_a_data_set(idx_dir, data_dir):
    source, shards = {"source": f"idx:{idx_dir}"}, {"data_dir": data_dir}
    everything = ["train", "validation", "test"]
    for image_set, split, expected in (
        (source, None, everything),
        (source, "all", everything),
        (source, "test", ["test"]),
        (shards, None, ["test"]),
        (shards, "all", everything),
        (source, "all,test", None),
        (source, "", None),
        (source, "test,", None),
    ):
        refused = contextlib.nullcontext() if expected else pytest.raises(UsageError)
        with refused:
            given = keywords.ExportKeywords(**image_set, split=split)
            with exports.opened_input(given, PipelineOptions([]), on_corrupt="fail") as images:
                assert list(dict.fromkeys(images.splits.values())) == expected


def test_of_a_source_without_splits_all_is_embedded(trained, tmp_path, capsys):
    images, _ = blobs()["train"]
    np.save(tmp_path / "one.npy", images[:40])
    source, settings = f"npy:{tmp_path}/one.npy", {"num_shards": 1, "images": "none"}
    manifest = make_embeddings(source, trained / "export", tmp_path / "all", split=None, **settings)
    assert manifest["records"]["written"] == 40
    assert "export: embeds train, validation, test" in capsys.readouterr().err
    manifest = make_embeddings(source, trained / "export", tmp_path / "test", **settings)
    assert manifest["records"]["written"] < 20
    assert "export: embeds test" in capsys.readouterr().err


def test_a_split_that_lacks_some_labels_is_said(tmp_path):
    (images, labels), _ = blobs().values()
    labels = np.where(np.arange(len(labels)) % 3, labels.astype(np.int64), UNLABELLED)
    np.savez(tmp_path / "set.npz", x=images, y=labels)
    manifest = make_shards(f"npz:{tmp_path}/set.npz", tmp_path / "out", num_shards=1)
    assert any("without a label among" in warning for warning in manifest["warnings"])
