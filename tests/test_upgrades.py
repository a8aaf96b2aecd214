"""Outputs of an earlier version are read, resumed, appended to and exported from.

The archive's name says the commit that made it, by upgrades/make.py of that commit. Floats are
compared with a tolerance, since the archive was made on another machine.
"""

import json
import pathlib
import tarfile

import numpy as np
import pyarrow.parquet
import pytest

from pipeline.cli.errors import StageError
from pipeline.datasets import croissant, reader, tfds_metadata, verification
from pipeline.reports import create as create_report
from tests.conftest import make_embeddings, make_shards, outputs_of, smoke_config
from tests.datasets.test_tfds_metadata import supervised, written
from tests.forked import run_command

_ARCHIVES = sorted((pathlib.Path(__file__).parent / "upgrades").glob("made_by_*.tar.gz"))
# Nats per image and units of a latent, between kinds of CPU.
_TOLERANCE = 1e-3
# As in upgrades/make.py.
_PREPROCESS = {"num_shards": 3, "validation_fraction": 0.2}
_SECOND = {"append": True, "id_prefix": "second-"}
_TRAIN = {"num_epochs": 3, "early_stopping_patience": 3}


@pytest.fixture(params=_ARCHIVES, ids=lambda path: path.name)
def earlier(request, tmp_path) -> pathlib.Path:
    """A directory with the outputs of an earlier version."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def manifest_of(directory: pathlib.Path) -> dict:
    return json.loads((directory / "manifest.json").read_text())


def grow(earlier: pathlib.Path, name: str, **changes) -> dict:
    settings = _PREPROCESS | _SECOND | changes
    return make_shards(f"idx:{earlier / 'second'}", earlier / name, **settings)


def train(earlier: pathlib.Path, run: str, **changes) -> dict:
    from trainer.runs import train

    config = smoke_config(earlier / "set", **_TRAIN | changes)
    return train.train(config, workdir=str(earlier / run))


def export(earlier: pathlib.Path, name: str, **settings) -> dict:
    model, data = earlier / "finished_run" / "export", earlier / "appended"
    return make_embeddings(data, model, earlier / name, split="validation,test", **settings)


def assert_same_rows(a: pathlib.Path, b: pathlib.Path) -> None:
    """An export has the records of one in the earlier layout, in order, and the same numbers."""
    names = sorted(path.name for path in (a / "embeddings").glob("*.parquet"))
    assert names and names == sorted(path.name for path in b.glob("*.parquet"))
    for name in names:
        first = pyarrow.parquet.read_table(a / "embeddings" / name).to_pydict()
        second = pyarrow.parquet.read_table(b / name).to_pydict()
        assert first.keys() - second.keys() == {"class", "split"}
        for column in ("id", "label", "record_sha"):
            assert first[column] == second[column]
        for column in ("mean", "log_var", "reconstruction_loss", "kl"):
            np.testing.assert_allclose(first[column], second[column], atol=_TOLERANCE)


def test_data_sets(earlier):
    for name in ("set", "appended"):
        manifest, faults = verification.verify(str(earlier / name))
        assert list(faults) == []
        dataset = reader.Dataset(str(earlier / name))
        num_read = sum(len(dataset.read_images(split)) for split in dataset.splits)
        assert num_read == manifest["records"]["written"]
    before = outputs_of(earlier / "set")
    assert make_shards(f"idx:{earlier / 'first'}", earlier / "set", **_PREPROCESS)["reused"]
    assert outputs_of(earlier / "set") == before
    # Files that describe the set are made anew together.
    (earlier / "set" / "dataset_info.json").write_bytes(b"")
    assert make_shards(f"idx:{earlier / 'first'}", earlier / "set", **_PREPROCESS)["reused"]
    assert supervised(earlier / "set") == written(earlier / "set")
    assert list(verification.verify(str(earlier / "set"))[1]) == []


def without_indexes(directory):
    """The files that the earlier version made alike, with the id of the set for its manifest."""
    outputs = outputs_of(directory)
    outputs["manifest.json"] = json.loads(outputs["manifest.json"])["dataset_id"]
    outputs.pop("manifest.json.previous", None)
    return {
        name: data
        for name, data in outputs.items()
        if not name.startswith("index/") and name not in (croissant.FILE, *tfds_metadata.NAMES)
    }


def test_a_set_grows_and_unfinished_jobs_end_well(earlier):
    whole, grown = without_indexes(earlier / "set"), without_indexes(earlier / "appended")
    make_shards(f"idx:{earlier / 'first'}", earlier / "half_set", **_PREPROCESS)
    assert without_indexes(earlier / "half_set") == whole
    for name in ("half_append", "set"):
        grow(earlier, name)
        assert without_indexes(earlier / name) == grown
    assert outputs_of(earlier / "half_append").keys() == outputs_of(earlier / "set").keys()
    for name in ("half_set", "half_append", "set"):
        assert supervised(earlier / name) == written(earlier / name)
    assert run_command("pipeline.verify", earlier / "half_append").returncode == 0
    num_reused = {
        name: json.loads((earlier / name / "timings.json").read_text())["num_tasks_reused"]
        for name in ("half_set", "half_append", "set")
    }
    assert num_reused == {"half_set": 2, "half_append": 5, "set": 0}


def test_a_finished_run_is_known_and_a_stopped_one_goes_on(earlier, capsys):
    finished = outputs_of(earlier / "finished_run")
    train(earlier, "finished_run")
    assert outputs_of(earlier / "finished_run") == finished
    train(earlier, "stopped_run")
    captured = capsys.readouterr()
    assert "already finished: " in captured.out and "from step 5 to step 12" in captured.err
    lines = [
        [json.loads(line) for line in (earlier / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("stopped_run", "finished_run")
    ]
    assert len(lines[0]) == len(lines[1])
    for resumed, undisturbed in zip(*lines, strict=True):
        assert resumed.keys() == undisturbed.keys()
        for key, value in undisturbed.items():
            assert resumed[key] == pytest.approx(value, abs=_TOLERANCE)
    manifests = [manifest_of(earlier / run / "export") for run in ("stopped_run", "finished_run")]
    assert manifests[0]["config"] == manifests[1]["config"]
    assert manifests[0].keys() - {"class_names"} == manifests[1].keys()
    # Published again, the finished model has a class list as well, and its id.
    (earlier / "finished_run" / "export" / "manifest.json").unlink()
    train(earlier, "finished_run")
    again = manifest_of(earlier / "finished_run" / "export")
    assert again["class_names"] == manifest_of(earlier / "set")["class_names"]
    assert again["model_id"] == manifests[1]["model_id"]


def test_exports(earlier):
    finished = outputs_of(earlier / "export")
    assert export(earlier, "export")["reused"]
    assert outputs_of(earlier / "export") == finished
    # Rows in the earlier layout are taken over, and not as files, which hold other columns now.
    directory = earlier / "export"
    again = export(earlier, "again", reuse_from=directory, reference=directory)
    assert sum(done["computed"] for done in again["done"].values()) == 0
    assert again["drift"]["warnings"] == []
    for name in ("export", "again", "finished_run/export"):
        assert run_command("pipeline.verify", earlier / name).returncode == 0
    assert_same_rows(earlier / "again", directory)
    # The report needs nothing that the earlier version did not write.
    page = create_report.make_report(str(directory), input_=None, model_dir=None, run_dir=None)
    assert 'id="scatter-data"' in pathlib.Path(page).read_text()
    with pytest.raises(StageError, match="job.json: has no names.*again with --overwrite"):
        export(earlier, "half_export")
    # The set grows: what the earlier version computed is not computed again.
    grow(earlier, "appended", id_prefix="third-")
    grown = export(earlier, "grown", reuse_from=directory)
    num_computed = sum(done["computed"] for done in grown["done"].values())
    num_new = grown["records"]["read"] - again["records"]["read"]
    assert num_computed == num_new > 0


def test_a_model_is_evaluated_and_begun_from(earlier):
    from trainer.runs import measure

    model = str(earlier / "finished_run" / "export")
    measured = measure.measure(
        model_dir=model,
        data_dir=str(earlier / "set"),
        split="test",
        num_importance_samples=2,
        num_virtual_devices=0,
    )
    at_training = manifest_of(pathlib.Path(model))["metrics"]["test"]["elbo"]
    assert measured["elbo"] == pytest.approx(at_training, abs=0.1)  # Of other noise.
    train(earlier, "warm", warm_start_from=model, num_epochs=1)
    line = json.loads((earlier / "warm" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] < 66.4  # Of the model that it began from; from nothing it is 67.0.
