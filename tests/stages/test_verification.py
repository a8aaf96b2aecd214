"""Damaged files of a model directory: named, and published again."""

import hashlib
import shutil

import pytest

from pipeline.cli.errors import StageError
from pipeline.embeddings import model as model_lib
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import verification
from tests.conftest import smoke_config, state_of
from tests.datasets.test_verify import reseal
from tests.embeddings.test_verify_export import DAMAGES, damage
from tests.forked import run_command


@pytest.fixture
def workdir(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def faults(directory) -> list[str]:
    return [str(fault) for fault in verification.verify_model(str(directory))[1]]


def file_names(workdir) -> list[str]:
    manifest = manifest_lib.manifest_of(str(workdir / "export"))
    return [entry["name"] for entry in manifest["files"]]


def test_a_whole_model_is_whole(workdir):
    done = run_command("pipeline.verify", workdir / "export")
    manifest = manifest_lib.manifest_of(str(workdir / "export"))
    about = f"the model of step {manifest['step']}, {len(manifest['files'])} files"
    assert done.stdout == (
        f"verify: whole: {about}, model_id {manifest['model_id']}, {workdir}/export\n"
    )
    done = run_command("pipeline.verify", workdir, check=False)
    assert done.returncode == 1 and f"did you mean {workdir}/export?" in done.stderr


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damaged_file_is_named(workdir, trained, kind):
    names = file_names(workdir)
    assert {"saved_model.pb", "weights.npz"} < set(names)
    for name in names:
        path = workdir / "export" / name
        damage(path, kind)
        [fault] = faults(workdir / "export")
        assert fault.startswith(f"{path}: ")
        shutil.copyfile(trained / "export" / name, path)
    done = run_command("pipeline.verify", workdir / "export")
    assert done.stdout.startswith("verify: whole: ")


def train_again(workdir, data_dir) -> None:
    from trainer.runs import train

    model_id = manifest_lib.manifest_of(str(workdir / "export"))["model_id"]
    assert train.train(smoke_config(data_dir), workdir=str(workdir))["model_id"] == model_id
    assert faults(workdir / "export") == []


def test_a_damaged_model_is_published_again(workdir, trained, data_dir):
    damage(workdir / "export" / "weights.npz", "page")
    done = run_command("pipeline.verify", workdir / "export", check=False)
    assert done.returncode == 1
    assert "1 fault in the model of step" in done.stderr
    assert "run the training command again, which publishes the model again" in done.stderr
    train_again(workdir, data_dir)
    weights = [(run / "export" / "weights.npz").read_bytes() for run in (workdir, trained)]
    assert weights[0] == weights[1]
    assert state_of(workdir)["name"] == state_of(trained)["name"]


# What TensorFlow looks for, and what a SavedModel may name.
UNLISTED = (
    *("saved_model.pbtxt", "saved_model.cpb", "debug/saved_model_debug_info.pb"),
    *("assets/words.txt", "assets.extra/x", "variables/variables.data-00001-of-00002"),
)


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_file_of_a_saved_model_is_named_and_never_loaded(workdir, name):
    path = workdir / "export" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    [fault] = faults(workdir / "export")
    assert fault.startswith(f"{path}: is not in the manifest") and fault.endswith(": remove it")
    manifest = manifest_lib.manifest_of(str(workdir / "export"))
    with pytest.raises(StageError, match=f"^{path}: is not in manifest.json, but TensorFlow"):
        model_lib.PublishedModel(str(workdir / "export"), manifest)


def test_a_model_with_an_unlisted_file_is_published_again(workdir, data_dir):
    (workdir / "export" / "saved_model.cpb").write_bytes(b"")
    train_again(workdir, data_dir)


def test_files_beside_a_saved_model_are_allowed(workdir):
    for name in ("evaluation-test.json", "README.md", ".DS_Store", "assets/.DS_Store"):
        (workdir / "export" / name).write_bytes(b"")
    assert faults(workdir / "export") == []


def test_what_is_loaded_is_what_was_checked(workdir):
    export, manifest = workdir / "export", manifest_lib.manifest_of(str(workdir / "export"))
    with model_lib._checked_files(str(export), manifest["files"]) as directory:
        shutil.rmtree(export)  # Somebody writes to the directory meanwhile.
        for entry in manifest["files"]:
            with open(f"{directory}/{entry['name']}", "rb") as file:
                assert hashlib.sha256(file.read()).hexdigest() == entry["sha256"]


@pytest.mark.long
@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damaged_file_is_published_again(workdir, data_dir, kind):
    for name in file_names(workdir):
        damage(workdir / "export" / name, kind)
        train_again(workdir, data_dir)


def test_an_id_that_is_not_that_of_its_inputs_is_named(workdir):
    reseal(workdir / "export", lambda manifest: manifest["made_from"].update(step=1))
    [fault] = faults(workdir / "export")
    assert fault.startswith(f"{workdir}/export/manifest.json: model_id is ")
