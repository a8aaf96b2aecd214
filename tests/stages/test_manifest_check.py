"""What files of a stage say is looked at before it is used: a seal alone proves nothing."""

import copy
import json
import shutil

import pytest

from pipeline.cli.errors import StageError
from pipeline.datasets.building import create
from pipeline.reports import create as create_report
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import manifest_check, tasks
from tests.conftest import make_embeddings, make_shards
from tests.datasets.test_verify import reseal

ABSURD = (None, True, -1, 10**12, 10**400, 0.5, float("inf"), "", "../x", "\ud800", [], [[]], {})


@pytest.fixture(scope="module")
def directories(data_dir, trained, tmp_path_factory):
    """stage -> a finished directory of it."""
    export = tmp_path_factory.mktemp("embeddings") / "out"
    make_embeddings(data_dir, trained / "export", export)
    return {"preprocess": data_dir, "train": trained / "export", "export": export}


def changed(directory, tmp_path, change) -> str:
    """A directory with the changed manifest of another."""
    (tmp_path / "changed").mkdir()
    shutil.copy(directory / manifest_lib.MANIFEST, tmp_path / "changed")
    reseal(tmp_path / "changed", change)
    return str(tmp_path / "changed")


def first_file(**changes):
    return lambda manifest: manifest["files"][0].update(changes)


def without(key):
    return lambda manifest: manifest.pop(key)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("train", without("files"), "has no files; expected a list"),
        ("train", without("stage"), "has no stage; expected one of preprocess, train, export"),
        ("train", without("format_version"), "format version None, this program reads 1"),
        ("export", first_file(crc32c="AAAAAA"), r"files.0..crc32c is 'AAAAAA'; expected base64"),
        (
            "train",
            first_file(name="/etc/passwd"),
            r"files\[0\].name is '/etc/passwd'; expected a p",
        ),
        ("train", first_file(name="a/../../b"), r"files\[0\].name is 'a/../../b'; expected a path"),
        (
            "train",
            first_file(name="a\0b"),
            r"files\[0\].name is .*expected a path below the direct",
        ),
        ("train", first_file(name=7), r"files\[0\].name is 7; expected a path below the directory"),
        ("train", first_file(bytes=-1), r"files\[0\].bytes is -1; expected a whole number from 0"),
        ("train", first_file(sha256="../cache"), r"sha256 is '../cache'; expected 64 hex digits"),
        (
            "train",
            lambda m: m["config"].update(latent_dim=10**12),
            "config.latent_dim is 1000000000000; expected a whole number from 1 to 65536",
        ),
        (
            "train",
            lambda m: m.update(image_shape="28x28"),
            "image_shape is '28x28'; expected a list of 3",
        ),
        (
            "train",
            lambda m: m.update(class_names=["cat", 1]),
            r"class_names\[1\] is 1; expected text",
        ),
        (
            "preprocess",
            lambda m: m.update(image_shape=[12, 8, 0]),
            r"image_shape\[2\] is 0; expected a whole number from 1 to 65535",
        ),
        (
            "preprocess",
            first_file(num_examples=10**6),
            r"files\[0\].num_examples is 1000000; expected at most \d+ records of such images in",
        ),
        (
            "preprocess",
            first_file(split="dev"),
            r"files\[0\].split is 'dev'; expected a name in",
        ),
        (
            "export",
            lambda m: next(iter(m["shards"].values()))["files"].append("other"),
            "expected names that files lists",
        ),
    ],
)
def test_what_no_stage_writes_is_refused_in_a_line(directories, tmp_path, kind, change, message):
    directory = changed(directories[kind], tmp_path, change)
    with pytest.raises(StageError, match=message) as error:
        manifest_lib.read_manifest(directory, kind, "--dir")
    assert str(error.value).startswith(f"{directory}/manifest.json: ")
    assert "\n" not in str(error.value)


def test_no_value_in_place_of_another_ends_in_a_traceback(directories):
    """Whatever stands at a place of a manifest, it is a manifest or refused."""

    def places(value, path=()):
        yield path
        if isinstance(value, dict | list):
            keys = value if isinstance(value, dict) else range(min(2, len(value)))
            for key in keys:
                yield from places(value[key], (*path, key))

    num_refused = 0
    for directory in directories.values():
        manifest = json.loads((directory / manifest_lib.MANIFEST).read_text())
        manifest["files"] = manifest["files"][:2] + manifest["files"][-1:]
        if "shards" in manifest:
            manifest["shards"] = {}
        manifest_check.manifest("whole", manifest)
        for *above, last in (place for place in places(manifest) if place):
            for absurd in ABSURD:
                other = copy.deepcopy(manifest)
                inner = other
                for key in above:
                    inner = inner[key]
                inner[last] = absurd
                try:
                    manifest_check.manifest("changed", other)
                except StageError as error:
                    assert "\n" not in str(error)
                    str(error).encode()
                    num_refused += 1
    assert num_refused > 500


def test_records_that_the_bytes_cannot_hold(idx_dir, tmp_path):
    """Zeros are packed a thousand times smaller, and no further."""
    make_shards(f"idx:{idx_dir}", tmp_path / "packed", compression="gzip")
    manifest = json.loads((tmp_path / "packed" / manifest_lib.MANIFEST).read_text())
    entry = manifest["files"][0]
    entry["num_examples"] = entry["bytes"] * 1032 // (16 + 12 * 8)
    manifest_check.manifest("most", manifest)
    entry["num_examples"] += 1
    with pytest.raises(StageError, match="expected at most .* records of such images"):
        manifest_check.manifest("more", manifest)


def test_a_count_of_nothing_is_not_published(data_dir, trained, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")

    def change(manifest):
        [*_, entry] = [e for e in manifest["files"] if e.get("split") == "test"]
        entry["num_examples"] = 10**9

    reseal(tmp_path / "data", change)
    settings = {"on_corrupt": "quarantine", "max_quarantined": "100%"}
    with pytest.raises(StageError, match="num_examples is 1000000000; expected at most"):
        make_embeddings(tmp_path / "data", trained / "export", tmp_path / "out", **settings)


def test_brackets_in_brackets(tmp_path):
    (tmp_path / manifest_lib.MANIFEST).write_text("[" * 200_000)
    with pytest.raises(StageError, match="not as this program wrote it"):
        manifest_lib.read_manifest(str(tmp_path), "train", "--dir")


def test_a_model_of_other_latents_than_its_manifest_says(data_dir, trained, tmp_path):
    shutil.copytree(trained / "export", tmp_path / "model")
    reseal(tmp_path / "model", lambda manifest: manifest["config"].update(latent_dim=5))
    with pytest.raises(StageError, match=r"its SavedModel .* \(\(12, 8, 1\), 3\), manifest.json"):
        make_embeddings(data_dir, tmp_path / "model", tmp_path / "out")


def test_a_config_that_cannot_be_trained_with_is_not_evaluated(data_dir, trained, tmp_path):
    from trainer.runs import measure

    for change in ({"filters": "many"}, {"kernel_size": "3"}, {"beta": None}):
        shutil.copytree(trained / "export", tmp_path / "model", dirs_exist_ok=True)
        reseal(tmp_path / "model", lambda manifest, c=change: manifest["config"].update(c))
        with pytest.raises(StageError, match="this version cannot use the model.s config"):
            measure.measure(
                model_dir=str(tmp_path / "model"),
                data_dir=str(data_dir),
                split="test",
                num_importance_samples=1,
            )


# What is noted of unfinished jobs.


def job_that_names(directory, about, *names):
    (directory / tasks.DIRECTORY).mkdir(parents=True)
    job = {**about, "names": list(names)}
    (directory / tasks.DIRECTORY / tasks.JOB).write_bytes(manifest_lib.sealed_json(job))


@pytest.mark.parametrize("name", ["..", "", "../witness", "quarantine/..", "/witness"])
def test_a_job_removes_nothing_outside_of_its_directory(tmp_path, name):
    (tmp_path / "witness").write_text("still here")
    about = {"stage": "preprocess", "made_from": {}}
    job_that_names(tmp_path / "set", about, "file", name)
    (tmp_path / "set" / "file").touch()
    output = create.output_directory(str(tmp_path / "set"), {})
    with pytest.raises(StageError, match=r"job.json: names\[1\] is .* expected a path below"):
        with output.opened([], overwrite=False):
            pass
    with pytest.raises(StageError, match="holds 'file' and neither an intact manifest.json"):
        with output.opened([], overwrite=True):
            pass
    (tmp_path / "set" / "file").unlink()
    with output.opened([], overwrite=True):
        pass
    assert (tmp_path / "witness").read_text() == "still here"


def test_a_job_of_another_stage_is_refused_beside_a_manifest_too(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "out")
    job_that_names(tmp_path / "out", {"stage": "export", "made_from": {}}, "file")
    output = create.output_directory(str(tmp_path / "out"), {})
    with pytest.raises(StageError, match="is the output of another stage"):
        with output.opened(["file"], overwrite=True):
            pass


def test_a_marker_reads_nothing_outside_of_its_directory(tmp_path):
    there = tasks.Tasks(str(tmp_path / "out"))
    (tmp_path / "out" / tasks.DIRECTORY).mkdir(parents=True)
    (tmp_path / "witness").write_bytes(b"1")
    entry = {**manifest_lib.file_entry("x", b"1"), "name": "../witness"}
    marker = {"entries": [entry], "secs": {}}
    (tmp_path / "out" / tasks.DIRECTORY / "task.json").write_bytes(manifest_lib.sealed_json(marker))
    assert there.marker("task") is None
    with pytest.raises(StageError, match=r"task.json: entries\[0\].name is '../witness'"):
        there.markers(["task"])
    made = {"entries": [], "secs": {}}
    assert there.make_once("task", lambda: made) == {**made, "reused": False}


def test_a_report_removes_nothing_outside_of_its_export(directories, tmp_path):
    export = tmp_path / "out"
    shutil.copytree(directories["export"], export)
    (tmp_path / "witness").write_text("still here")
    other = "0" * 16
    for export_id, entry in (
        (other, manifest_lib.file_entry("../witness", b"")),
        ("", {"name": "../witness"}),
        (other, {"name": "report.html"}),
        (other, "report.html"),
    ):
        state = {"format_version": 1, "export_id": export_id, "files": [entry]}
        (export / "report.json").write_bytes(manifest_lib.sealed_json(state))
        create_report.remove_stale(str(export), "1" * 16)
        assert not create_report.is_current(str(export), other)
    assert (tmp_path / "witness").read_text() == "still here"
