"""Classes of images that are exported straight from a source have the model's numbers."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest

from pipeline.api import keywords
from pipeline.datasets.building import create as create_set
from pipeline.embeddings import inputs
from pipeline.sources import conversion
from pipeline.sources.source import UNLABELLED
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import output_directory
from tests.conftest import (
    make_embeddings,
    make_folder_set,
    make_idx_set,
    make_shards,
    outputs_of,
    smoke_config,
)
from tests.datasets.test_unlabelled import PARTLY
from tests.datasets.test_verify import reseal
from tests.forked import run_command

OLD_NAMES = [f"class {number}" for number in range(10)]
NAMES = [*OLD_NAMES, "aardvark"]
SMALL = {"num_train": 40, "num_test": 60}


def add_class(folder, name: str) -> None:
    for split in ("train", "test"):
        path = folder / split / name / "1.png"
        path.parent.mkdir()
        shutil.copy(next((folder / split).rglob("*.png")), path)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A folder whose newest class sorts first, a data set that grew with it, and its model."""
    from trainer.runs import train

    directory = tmp_path_factory.mktemp("grown")
    folder = make_folder_set(directory / "folder", **SMALL)
    make_shards(f"folder:{folder}", directory / "set", num_shards=1)
    add_class(folder, "aardvark")
    make_shards(f"folder:{folder}", directory / "set", append=True, num_shards=None)
    train.train(smoke_config(directory / "set", num_epochs=1), workdir=str(directory / "run"))
    return directory


@pytest.fixture
def without_list(grown, tmp_path):
    """The model as an earlier version published it."""
    directory = tmp_path / "earlier_model"
    shutil.copytree(grown / "run" / "export", directory)
    reseal(directory, lambda manifest: manifest.pop("class_names"))
    return directory


def rows_of(export) -> dict[str, tuple[int, str | None]]:
    """id -> (label, class)."""
    table = pyarrow.parquet.read_table(export / "embeddings").to_pydict()
    return dict(zip(table["id"], zip(table["label"], table["class"], strict=True), strict=True))


def source_input(source: str, **settings) -> inputs.SourceInput:
    spec = conversion.SourceSpec(source, **settings)
    return inputs.SourceInput(spec, create_set.Settings("blobs", 1, 0.1, 0, "none"), ["test"])


def export_by_command(grown, out, *more) -> str:
    """Exports the split test straight from a source; returns standard error."""
    model = f"--model_dir={grown / 'run' / 'export'}"
    where = (f"--output_dir={out}", "--split=test", "--images=none", "--noreport")
    return run_command("pipeline.export", model, *where, *more).stderr


def test_labels_from_a_source_are_those_from_the_data_set(grown, tmp_path):
    model = grown / "run" / "export"
    assert json.loads((model / "manifest.json").read_text())["class_names"] == NAMES
    make_embeddings(grown / "set", model, tmp_path / "by_set")
    source = f"folder:{grown / 'folder'}"
    manifest = make_embeddings(source, model, tmp_path / "by_source", num_shards=1)
    by_set = rows_of(tmp_path / "by_set")
    assert len(by_set) == 61 and by_set == rows_of(tmp_path / "by_source")
    assert by_set["test/aardvark/1.png"] == (10, "aardvark")
    assert manifest["class_names"] == NAMES
    # A report finds the names without the model, too, and the name of the set in the export.
    run_command("pipeline.report", f"--output_dir={tmp_path / 'by_source'}", "--split=test",
                f"--source={source}", "--num_shards=1", "--validation_fraction=0.1")  # fmt: skip
    metadata = (tmp_path / "by_source" / "projector" / "metadata.tsv").read_text()
    assert "aardvark\ttest/aardvark/1.png\t10\n" in metadata
    page = (tmp_path / "by_source" / "report.html").read_text()
    assert "fingerprint" not in page and "model_class_names" not in page  # Long.


def test_classes_that_the_model_lacks_follow_after_its_list(grown, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(grown / "folder", folder)
    for name in ("bee", "ant"):
        add_class(folder, name)
    errors = export_by_command(grown, tmp_path / "out", f"--source=folder:{folder}")
    line = "export: classes that the model's class list lacks are numbered after it: ant 11, bee 12"
    assert line in errors.splitlines()
    assert "export: the set is named folder: its files begin with folder-" in errors.splitlines()
    assert [path.name.partition("-")[0] for path in tmp_path.glob("out/*/*.parquet")] == ["folder"]
    rows = rows_of(tmp_path / "out")
    assert (rows["test/ant/1.png"], rows["test/bee/1.png"]) == ((11, "ant"), (12, "bee"))
    assert rows["test/aardvark/1.png"] == (10, "aardvark")
    for record_id, (label, name) in rows.items():
        assert record_id.split("/")[1] == name == [*NAMES, "ant", "bee"][label]


@pytest.mark.long
def test_an_export_keeps_the_name_of_the_one_before(grown, tmp_path):
    source, model, old = f"folder:{grown / 'folder'}", grown / "run" / "export", tmp_path / "old"
    settings = {"name": "mnist", "num_shards": None, "images": "none"}
    make_embeddings(source, model, old, **settings)
    before = outputs_of(old)
    flag = f"--source={source}"
    assert export_by_command(grown, old, flag) == "" and outputs_of(old) == before
    export_by_command(grown, tmp_path / "new", flag, f"--reuse_from={old}")
    assert outputs_of(tmp_path / "new") == before
    export_by_command(grown, old, flag, "--overwrite")
    assert [path.name.partition("-")[0] for path in old.glob("*/*.parquet")] == ["folder"]


def test_a_source_of_other_names_is_said(idx_dir):
    opened = source_input(f"idx:{idx_dir}", model_class_names=("shirt", "dress"))
    assert opened.class_names == ["shirt", "dress", *"0123456789"]
    [line] = [note for note in opened.notes if "class list" in note]
    assert line.startswith(
        "the model's class list (shirt, dress) has none of the source's classes, which are "
        "numbered after it: 0 2, 1 3, "
    )
    assert "--class_names=@DATA_DIR" in line


def test_no_class_of_the_model_is_taken_for_that_of_a_label_without_a_name(grown, tmp_path):
    idx = make_idx_set(tmp_path / "idx", **SMALL)
    common = f"--source=idx:{idx}", "--class_names=class 1,class 0"
    export_by_command(grown, tmp_path / "out", *common)
    rows = set(rows_of(tmp_path / "out").values())
    # Of eleven names two are the source's; labels 2 to 9 have none and follow after the eleven.
    assert rows == {(1, "class 1"), (0, "class 0"), *((label, None) for label in range(11, 19))}


def test_a_source_without_labels_gets_no_classes(idx_dir):
    opened = source_input(f"idx:{idx_dir}", labels="none", model_class_names=tuple(NAMES))
    assert opened.class_names == [] and "model_class_names" not in opened.identity
    assert not any("class list" in note for note in opened.notes)


def test_records_without_a_label_stay_without():
    spec = conversion.SourceSpec(f"{PARTLY}:train", model_class_names=("none", "9", "0"))
    source = conversion.open_converted(spec)
    of_train, of_test = source.read(np.arange(300)).labels, source.read(np.arange(300, 350)).labels
    assert set(of_test.tolist()) == {UNLABELLED}
    assert set(of_train.tolist()) == {1, 2, *range(3, 11)}  # No record has the class "none".


def test_an_append_keeps_a_label_without_a_name(idx_dir):
    names = {"class_names": ("1", "0"), "base_class_names": tuple("0123456789")}
    source = conversion.open_converted(conversion.SourceSpec(f"idx:{idx_dir}", **names))
    # The list grows from append to append, and the label must not seem to change.
    assert set(source.read(np.arange(300)).labels.tolist()) == set(range(10))


def test_an_export_with_other_labels_is_not_finished(grown, without_list, tmp_path):
    source = f"folder:{grown / 'folder'}"
    out = tmp_path / "out"
    earlier = make_embeddings(source, without_list, out)
    assert "model_class_names" not in earlier["made_from"]
    assert rows_of(out)["test/aardvark/1.png"] == (0, "aardvark")
    with pytest.raises(output_directory.Conflict, match="model_class_names"):
        make_embeddings(source, grown / "run" / "export", out)


def test_a_list_that_changes_no_number_changes_no_byte(trained, idx_dir, tmp_path):
    shutil.copytree(trained / "export", tmp_path / "model")
    reseal(tmp_path / "model", lambda manifest: manifest.pop("class_names"))
    for model, name in ((trained / "export", "now"), (tmp_path / "model", "earlier")):
        make_embeddings(f"idx:{idx_dir}", model, tmp_path / name)
    assert outputs_of(tmp_path / "now") == outputs_of(tmp_path / "earlier")


def test_the_list_is_no_part_of_the_models_id(grown, without_list):
    for directory in (grown / "run" / "export", without_list):
        manifest = manifest_lib.read_manifest(str(directory), "train", "--model_dir")
        identity = {key: manifest[key] for key in ("format_version", "made_from")}
        assert "class_names" not in manifest["made_from"]
        assert manifest["model_id"] == manifest_lib.content_id(identity)


def test_the_class_list_of_a_data_set(grown, tmp_path):
    idx = make_idx_set(tmp_path / "idx", **SMALL)
    common = (f"--source=idx:{idx}", f"--output_dir={tmp_path / 'set'}")
    spelled = run_command("pipeline.preprocess", *common, f"--class_names={','.join(NAMES)}")
    in_home = {"HOME": str(grown)}  # Nothing else looks there.
    for place in (grown / "set", f"file://{grown / 'set'}", "~/set"):
        again = run_command("pipeline.preprocess", *common, f"--class_names=@{place}", env=in_home)
        assert "already finished" in again.stdout
        assert again.stdout.split("dataset_id")[1] == spelled.stdout.split("dataset_id")[1]
    names = f"--class_names=@{grown / 'set'}"
    export_by_command(grown, tmp_path / "out", f"--source=idx:{idx}", names)
    rows = rows_of(tmp_path / "out").values()
    assert len(rows) == 60 and {name for _, name in rows} == set(OLD_NAMES)
    assert all(name == NAMES[label] for label, name in rows)
    made_from = json.loads((tmp_path / "out" / "manifest.json").read_text())["made_from"]
    assert made_from["class_names"] == NAMES and "model_class_names" not in made_from


def test_each_call_gets_the_list_of_the_set_as_it_is(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "set")
    settings = keywords.PreprocessKeywords(class_names=f"@{tmp_path / 'set'}")
    first = settings.source_spec("sample").class_names
    reseal(tmp_path / "set", lambda manifest: manifest["class_names"].append("new"))
    assert first == tuple("0123456789")
    assert settings.source_spec("sample").class_names == (*first, "new")


@pytest.mark.parametrize(
    ("value", "status", "message"),
    [
        ("@{tmp}/absent", 1, "/absent: no such directory; expected the output of"),
        ("@{tmp}", 1, "has no manifest.json"),
        ("@{tmp}/plain", 1, "/plain: the data set has no classes; expected a labelled one"),
        ("@", 2, "or @DATA_DIR alone"),
        ("@{tmp}/a,b", 2, "none of them with @ at its start"),
    ],
)
def test_a_class_list_that_is_not_there(idx_dir, tmp_path, value, status, message):
    if "plain" in value:
        make_shards(f"idx:{idx_dir}", tmp_path / "plain", labels="none")
    value = value.format(tmp=tmp_path)
    common = (f"--source=idx:{idx_dir}", f"--class_names={value}", "--dry_run")
    done = run_command("pipeline.preprocess", *common, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
    assert message in done.stderr
