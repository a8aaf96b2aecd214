"""The stages on an object store: a real one on loopback, which a test may let fail."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import urllib.parse

import numpy as np
import pytest

from pipeline.cli.errors import SourceChanged, StageError, UsageError
from pipeline.datasets import reader
from pipeline.datasets.building import finish as finish_set
from pipeline.embeddings import model as model_lib
from pipeline.reports import create as create_report
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import output_directory, pointer, verification
from pipeline.storage import files, trees
from tests import forked
from tests.conftest import (
    assert_same_run,
    make_embeddings,
    make_folder_set,
    make_shards,
    outputs_of,
    smoke_config,
)
from tests.forked import run_command
from tests.storage.object_stores import BUCKET, FAULTS, ObjectStore, failing_every

_PREPROCESS = ["--name=blobs", "--num_shards=4"]
_EXPORT = ["--split=test", "--fields=mean,z,kl"]
_NOWHERE = pathlib.Path(os.devnull)


@pytest.fixture
def place(object_store, request):
    """A URL of a directory of the test's own."""
    return f"gs://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"


def inside(url: str) -> str:
    """The name of an object, or the beginning of names, within the bucket."""
    return url.removeprefix(f"gs://{BUCKET}/")


def fetched(url: str, target: pathlib.Path) -> pathlib.Path:
    """A copy of a directory of the store as local files."""
    for name in trees.read_tree(url).stamps:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(files.read_bytes(files.join(url, *name.split("/"))))
    return target


def without_times(store: ObjectStore, url: str) -> dict[str, bytes]:
    """What `outputs_of` says of a local directory, of one of the store."""
    found = store.objects(f"{inside(url)}/")
    return {
        name: data
        for name, data in found.items()
        if name.rpartition("/")[2] not in ("timings.json", ".lock", "changes.parquet")
        and not name.startswith("index/source-")
    }


def preprocess(idx_dir, out, check=True) -> subprocess.CompletedProcess:
    return run_command(
        "pipeline.preprocess",
        *(f"--source=idx:{idx_dir}", f"--output_dir={out}", *_PREPROCESS),
        check=check,
    )


def train(data_dir, workdir, check=True) -> subprocess.CompletedProcess:
    return run_command(
        "trainer.main",
        *("--config=configs/smoke.py", "--config.batch_size=27"),
        *(f"--config.data_dir={data_dir}", f"--workdir={workdir}"),
        check=check,
    )


def export(data_dir, model_dir, out, check=True) -> subprocess.CompletedProcess:
    return run_command(
        "pipeline.export",
        *(f"--data_dir={data_dir}", f"--model_dir={model_dir}", f"--output_dir={out}", *_EXPORT),
        check=check,
    )


def test_the_whole_path(object_store, place, idx_dir, data_dir, trained, tmp_path):
    data, run, out = (f"{place}/{name}" for name in ("data", "run", "embeddings"))
    done = preprocess(idx_dir, data)
    assert (done.stderr.count("\n"), done.stdout.count("\n")) == (4, 1)
    assert without_times(object_store, data) == outputs_of(data_dir)

    train(data, run)
    assert_same_run(fetched(run, tmp_path / "run"), trained)
    assert any(n.startswith("tensorboard/events") for n in object_store.objects(f"{inside(run)}/"))

    export(data, f"{run}/export", out)
    local = tmp_path / "embeddings"
    # The SavedModel of the store, since those of two runs differ in bytes of no meaning.
    make_embeddings(
        data_dir, tmp_path / "run" / "export", local, fields=("mean", "z", "kl"), images="sheets"
    )
    there = without_times(object_store, out)
    for name, content in outputs_of(local).items():
        assert there[name] == content, name
    assert {"report.html", "report.json", "plots/curve_loss.png"} <= there.keys()
    run_command(
        "pipeline.report",
        *(f"--data_dir={data}", f"--model_dir={run}/export", f"--output_dir={out}"),
    )
    assert without_times(object_store, out) == there

    again = preprocess(idx_dir, data), train(data, run), export(data, f"{run}/export", out)
    for done in again:
        assert "already finished" in done.stdout + done.stderr
    # Nothing is left of what a stage needs on its way.
    left = object_store.objects(f"{inside(place)}/")
    assert not [name for name in left if ".progress" in name or name.endswith(".lock")]


def dies_at_change(store: ObjectStore, number: int, command: list[str]) -> bool:
    """Kills a command at its n-th change of the store; returns whether it came so far.

    Every other time the store has carried it out by then.
    """
    process, seen = None, 0

    def decide(request) -> str | None:
        nonlocal seen
        seen += request.changes
        if request.changes and seen == number:
            if number % 2:
                os.kill(process.pid, signal.SIGKILL)
                return "drop"
            return "lose"
        if seen >= number:  # It is told by the lost answer; whatever it does then is too late.
            os.kill(process.pid, signal.SIGKILL)
            return "drop"
        return None

    with store.deciding(decide):
        process = forked.start(*command, stdout=_NOWHERE, stderr=_NOWHERE)
        process.join()
        return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    "number", [1, 14, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 5, 8, 11, 19))]
)
def test_preprocess_killed_at_any_change_ends_in_the_same_bytes(
    object_store, place, idx_dir, data_dir, number
):
    flags = [f"--source=idx:{idx_dir}", f"--output_dir={place}", *_PREPROCESS]
    assert dies_at_change(object_store, number, ["pipeline.preprocess", *flags])
    with pytest.raises(StageError, match="no such directory|has no manifest"):
        reader.Dataset(place)
    make_shards(f"idx:{idx_dir}", place)
    assert without_times(object_store, place) == outputs_of(data_dir)


@pytest.mark.parametrize("number", [6, *(pytest.param(n, marks=pytest.mark.long) for n in (3, 21))])
def test_a_run_killed_at_any_change_resumes_to_the_last_bit(
    object_store, place, data_dir, trained, tmp_path, number
):
    flags = ["--config=configs/smoke.py", "--config.batch_size=27", f"--workdir={place}"]
    command = ["trainer.main", *flags, f"--config.data_dir={data_dir}"]
    assert dies_at_change(object_store, number, command)
    train(data_dir, place)
    assert_same_run(fetched(place, tmp_path / "run"), trained)


@pytest.mark.parametrize(
    "number", [12, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 4, 7, 9, 14, 17))]
)
def test_an_export_killed_at_any_change_ends_in_the_same_bytes(
    object_store, place, data_dir, trained, tmp_path, number
):
    model_dir = trained / "export"
    flags = [f"--data_dir={data_dir}", f"--model_dir={model_dir}", f"--output_dir={place}"]
    command = ["pipeline.export", *flags, *_EXPORT, "--noreport"]
    assert dies_at_change(object_store, number, command)
    make_embeddings(data_dir, model_dir, place, fields=("mean", "z", "kl"))
    make_embeddings(data_dir, model_dir, tmp_path / "local", fields=("mean", "z", "kl"))
    assert without_times(object_store, place) == outputs_of(tmp_path / "local")


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25, 26, 27, 28])
def test_a_night_killed_at_any_change_leaves_latest_at_a_whole_export(
    object_store, place, idx_dir, trained, tmp_path, number
):
    """Killed as it writes rows, the manifest and the pointer."""
    from tests.conftest import make_idx_set

    data, latest, model = f"{place}/data", f"{place}/latest", trained / "export"
    make_shards(f"idx:{idx_dir}", data)
    make_embeddings(data, model, f"{place}/dt=1", latest=latest)
    more = make_idx_set(tmp_path / "more", num_train=2, num_test=9)
    make_shards(f"idx:{more}", data, append=True, id_prefix="more-", num_shards=1)
    flags = [f"--data_dir={data}", f"--model_dir={model}", f"--output_dir={place}/dt=2"]
    command = ["pipeline.export", *flags, f"--latest={latest}", "--noreport"]
    dies_at_change(object_store, number, command)  # The last numbers may come too late.
    finished: list[bool] = []
    whole_or_unfinished(object_store, inside(pointer.resolve(latest)), finished)
    assert finished == [True]
    run_command(*command)
    assert pointer.resolve(latest) == f"{place}/dt=2"
    make_embeddings(data, model, tmp_path / "local")
    assert without_times(object_store, f"{place}/dt=2") == outputs_of(tmp_path / "local")


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23])
@pytest.mark.parametrize("job", ["remove", "append"])
def test_a_set_killed_at_any_change_is_the_old_one_or_the_new_one(
    object_store, place, data_dir, tmp_path, job, number
):
    from tests.conftest import make_idx_set

    data, local = f"{place}/data", tmp_path / "local"
    trees.copy_tree(str(data_dir), data)
    shutil.copytree(data_dir, local)
    if job == "remove":
        (tmp_path / "ids").write_text("test-0000003\ntest-0000004\n")
        command = ["pipeline.remove", f"--ids={tmp_path}/ids", "--data_dir={}"]
    else:
        more = make_idx_set(tmp_path / "more", num_train=20, num_test=5)
        command = ["pipeline.preprocess", f"--source=idx:{more}", "--output_dir={}", "--append"]
        command += ["--name=blobs", "--id_prefix=more-", "--num_shards=1"]
    run_command(*(part.format(local) for part in command))
    there = [part.format(data) for part in command]
    dies_at_change(object_store, number, there)
    assert reader.Dataset(data).read_images("test").shape[0] in (48, 50, 55)
    run_command(*there)
    assert without_times(object_store, data) == outputs_of(local)


def whole_or_unfinished(store: ObjectStore, directory: str, finished: list[bool]) -> None:
    """Whoever looks now finds a stage with all its files, or none.

    But for what describes a data set: an append makes it anew just before the manifest.
    """
    found = store.objects(f"{directory}/")
    finished.append(manifest_lib.MANIFEST in found)
    if finished[-1]:
        entries = json.loads(found[manifest_lib.MANIFEST])["files"]
        splits = {entry["split"] for entry in entries if "split" in entry}
        described = finish_set.descriptions(splits) if splits else ()
        for entry in (entry for entry in entries if entry["name"] not in described):
            data = found.get(entry["name"])
            assert data is not None, entry["name"]
            assert manifest_lib.file_entry(entry["name"], data)["sha256"] == entry["sha256"]


def test_a_reader_never_sees_half_a_stage(
    object_store, place, idx_dir, data_dir, trained, tmp_path
):
    from tests.conftest import make_idx_set

    finished: list[bool] = []
    failures: list[BaseException] = []
    looked_at = f"{inside(place)}/out"

    def look(request) -> None:
        if request.changes:
            try:
                whole_or_unfinished(object_store, looked_at, finished)
            except AssertionError as error:
                failures.append(error)

    with object_store.deciding(look):
        make_shards(f"idx:{idx_dir}", f"{place}/out")
        more = make_idx_set(tmp_path / "more", num_train=20, num_test=5)
        make_shards(f"idx:{more}", f"{place}/out", append=True, id_prefix="more-")
        assert {True, False} == set(finished)
        for number, data in enumerate((data_dir, f"{place}/out")):
            looked_at = f"{inside(place)}/dt={number}"
            settings = {"latest": f"{place}/latest"}
            make_embeddings(data, trained / "export", f"{place}/dt={number}", **settings)
            assert not failures
            whole_or_unfinished(object_store, looked_at, finished)
            assert finished[-1]


@pytest.mark.parametrize(
    "fault", [*FAULTS[2:], *(pytest.param(f, marks=pytest.mark.long) for f in FAULTS[:2])]
)
def test_single_requests_may_fail(object_store, place, idx_dir, data_dir, fault):
    with object_store.deciding(lambda request: None if request.number % 30 else fault):
        make_shards(f"idx:{idx_dir}", place)
    assert without_times(object_store, place) == outputs_of(data_dir)


@pytest.mark.long
@pytest.mark.parametrize("number", [5, 9])
def test_every_few_requests_fail_on_the_whole_path(
    object_store, place, idx_dir, data_dir, trained, tmp_path, number
):
    data, run, out = (f"{place}/{name}" for name in ("data", "run", "embeddings"))
    with object_store.deciding(failing_every(number)):
        preprocess(idx_dir, data)
        train(data, run)
        export(data, f"{run}/export", out)
    assert without_times(object_store, data) == outputs_of(data_dir)
    assert_same_run(fetched(run, tmp_path / "run"), trained)
    manifest = manifest_lib.read_manifest(out, "export", "output_dir")
    assert manifest["records"] == {"read": 50, "written": 50, "quarantined": 0}
    for entry in manifest["files"]:
        manifest_lib.read_file(out, entry)


@pytest.mark.long
def test_a_store_that_is_gone_is_an_error_and_no_loss(object_store, place, idx_dir, data_dir):
    with object_store.deciding(lambda request: "refuse" if request.number > 12 else None):
        done = preprocess(idx_dir, place, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the storage has failed for" in done.stderr
    assert "run the same command again when it answers" in done.stderr
    preprocess(idx_dir, place)
    assert without_times(object_store, place) == outputs_of(data_dir)


def test_no_such_bucket(object_store, idx_dir):
    done = preprocess(idx_dir, "gs://nosuchbucket/data", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the bucket does not exist" in done.stderr
    config = smoke_config("gs://nosuchbucket/data")
    from trainer.runs import train as train_lib

    with pytest.raises(StageError, match="no such directory"):
        train_lib.train(config, workdir="gs://nosuchbucket/run")


def test_thousands_of_objects(object_store, place):
    names = [f"{number:05d}.txt" for number in range(1_200)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: object_store.put(f"{inside(place)}/{name}", b"1"), names))
    object_store.put(f"{inside(place)}/below/this", b"1")
    # As a console's "create folder" leaves it.
    object_store.put(f"{inside(place)}/", b"")
    assert files.list_names(place) == sorted([*names, "below"])
    assert [*trees.read_tree(place).stamps] == sorted([*names, "below/this"])
    files.remove(place)
    assert not object_store.objects(inside(place))


@pytest.mark.parametrize("name", ["../../x", "a/../../x", "/etc/x", "a//x", "./x"])
def test_objects_named_as_to_lead_elsewhere_are_refused_in_listings(object_store, place, name):
    for whole in ("a", "folder/", "folder/a.png"):
        object_store.put(f"{inside(place)}/{whole}", b"")
    assert [*trees.read_tree(place).stamps] == ["a", "folder/a.png"]
    assert files.list_names(place) == ["a", "folder"]
    object_store.put(f"{inside(place)}/{name}", b"1")
    with pytest.raises(StageError, match=f"{place}: holds an object named '{name}'; expected a pa"):
        trees.read_tree(place)
    if name.startswith("."):
        with pytest.raises(StageError, match="holds an object named '[.]+'; expected a path below"):
            files.list_names(place)


def test_a_model_is_fetched_once_and_by_its_manifest_alone(
    object_store, place, data_dir, trained, tmp_path, monkeypatch
):
    """The bytes that are checked are those that are loaded, and no other object is read."""
    model = trained / "export"
    names = [str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()]
    for name in names:
        object_store.put(f"{inside(place)}/{name}", (model / name).read_bytes())
    object_store.put(f"{inside(place)}/other", b"1")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    read: list[str] = []

    def note(request) -> None:
        if "alt=media" in request.path:
            path = urllib.parse.unquote(request.path).partition("?")[0]
            read.append(path.partition(f"/{inside(place)}/")[2])

    with object_store.deciding(note):
        loaded = model_lib.PublishedModel(place, manifest_lib.manifest_of(place))
    assert sorted(read) == sorted(names)
    assert not list(scratch.iterdir()) and [p.name for p in tmp_path.iterdir()] == ["scratch"]
    images = reader.Dataset(str(data_dir)).read_images("test")
    local = model_lib.PublishedModel(str(model), manifest_lib.manifest_of(str(model)))
    np.testing.assert_array_equal(loaded.reconstruct(images), local.reconstruct(images))
    data = "variables/variables.data-00000-of-00001"
    object_store.put(f"{inside(place)}/{data}", (model / data).read_bytes()[::-1])
    with pytest.raises(StageError, match=f"{place}/{data}: damaged"):
        model_lib.PublishedModel(place, manifest_lib.manifest_of(place))
    object_store.put(f"{inside(place)}/saved_model.pbtxt", b"1")
    with pytest.raises(StageError, match=f"{place}/saved_model.pbtxt: is not in manifest.json"):
        model_lib.PublishedModel(place, manifest_lib.manifest_of(place))
    for name in ("../../x", f"/{tmp_path}/x"):
        object_store.put(f"{inside(place)}/{name}", b"1")
        with pytest.raises(StageError, match="holds an object named .*; expected a path below"):
            model_lib.PublishedModel(place, manifest_lib.manifest_of(place))
    assert not list(scratch.iterdir()) and [p.name for p in tmp_path.iterdir()] == ["scratch"]


def test_a_report_made_from_the_store(object_store, place, data_dir, trained):
    from pipeline.embeddings import inputs

    make_embeddings(data_dir, trained / "export", place)
    input_ = inputs.ShardsInput(str(data_dir), ["test"], "fail")
    page = create_report.make_report(
        place, input_=input_, model_dir=str(trained / "export"), run_dir=None
    )
    assert page == f"{place}/report.html"
    assert b"loss" in files.read_bytes(page)


def test_shards_are_fetched_once_with_a_cache(object_store, place, idx_dir, tmp_path):
    make_shards(f"idx:{idx_dir}", place)
    fetched_shards, cache = [], str(tmp_path / "cache")

    def note(request) -> None:
        if request.method == "GET" and "alt=media" in request.path and "tfrecord-" in request.path:
            fetched_shards.append(request.path)

    with object_store.deciding(note):
        dataset = reader.Dataset(place, cache_dir=cache)
        first = dataset.read_images("train")
        num_shards = len(dataset.shards("train"))
        assert len(fetched_shards) == num_shards
        assert len(os.listdir(cache)) == num_shards
        np.testing.assert_array_equal(dataset.read_images("train"), first)
        assert len(fetched_shards) == num_shards
        # What the disk has damaged is fetched again, and whole from then on.
        damaged = pathlib.Path(cache) / os.listdir(cache)[0]
        damaged.write_bytes(damaged.read_bytes()[:-1])
        for _ in range(2):
            np.testing.assert_array_equal(dataset.read_images("train"), first)
            assert len(fetched_shards) == num_shards + 1
    with pytest.raises(UsageError, match="--cache_dir=gs://a: is a URL; expected a local dir"):
        reader.Dataset(place, cache_dir="gs://a")


def test_an_object_that_is_replaced_is_refused_and_to_list_takes_no_request_more(
    object_store, place, tmp_path
):
    from pipeline.sources import conversion

    folder = make_folder_set(tmp_path / "set", num_train=12, num_test=3)
    for path in folder.rglob("*.png"):
        object_store.put(f"{inside(place)}/{path.relative_to(folder)}", path.read_bytes())
    requests = []
    with object_store.deciding(lambda request: requests.append(request.path)):
        source = conversion.open_converted(conversion.SourceSpec(f"folder:{place}"))
    # Two of whether it is a directory, and a list; then each image, for the shape of most.
    assert len(requests) == 2 + 1 + 15, requests
    source_spec = source.for_workers()
    assert len(source.read(np.arange(15)).places) == 15
    name = str(path.relative_to(folder))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    object_store.put(f"{inside(place)}/{name}", bytes(data))
    with pytest.raises(SourceChanged, match=f"{name}: was changed while it was in use"):
        source.read(np.arange(15))
    with pytest.raises(SourceChanged, match=f"folder:{place}: {name} was changed since the job"):
        source.check_unchanged()
    conversion.open_source_once.cache_clear()
    with pytest.raises(SourceChanged, match="a worker finds other files"):
        conversion.open_converted(source_spec)


@pytest.fixture
def on_store(place, data_dir, trained, tmp_path):
    """A URL of an export of four shards, and the same export on the disk."""
    local = tmp_path / "local"
    make_embeddings(data_dir, trained / "export", local)
    trees.copy_tree(str(local), f"{place}/dt=1")
    return f"{place}/dt=1", local


def fetched_names(requests: list[str], url: str) -> set[str]:
    """Names of the objects below a URL whose bytes were asked for."""
    paths = [urllib.parse.unquote(path).partition("?")[0] for path in requests if "media" in path]
    prefix = f"/{inside(url)}/"
    return {path.partition(prefix)[2] for path in paths if prefix in path}


def replace_object(store: ObjectStore, url: str, name: str) -> None:
    """Puts another object of the same size in an object's place."""
    data = files.read_bytes(files.join(url, name))
    store.put(f"{inside(url)}/{name}", bytes(byte ^ 0xFF for byte in data))


def test_a_replaced_object_is_found_by_its_checksum_and_not_read(object_store, on_store, trained):
    url, local = on_store
    entries = manifest_lib.manifest_of(url)["files"]
    requests: list[str] = []
    with object_store.deciding(lambda request: requests.append(request.path)):
        assert output_directory.are_complete(url, entries)
        replace_object(object_store, url, rows := "embeddings/blobs-test-00001-of-00004.parquet")
        requests.clear()
        assert not output_directory.are_complete(url, entries)
        assert not output_directory.are_complete(url, entries, records_by_size=True)
    assert not fetched_names(requests, url)
    done = run_command("pipeline.verify", url, check=False)
    assert done.stdout == f"{url}/{rows}: its sha256 differs from the manifest\n"
    files.write_bytes(f"{url}/{rows}", (local / rows).read_bytes())
    pointer.move(latest := url.replace("dt=1", "latest"), url, seen=None)
    done = run_command("pipeline.verify", latest)
    assert done.stdout.startswith("verify: whole: 50 rows, 9 files") and f", {url}\n" in done.stdout
    trees.copy_tree(str(trained / "export"), model := url.replace("dt=1", "model"))
    assert list(verification.verify_model(model)[1]) == []


def test_a_night_copies_no_replaced_object(object_store, on_store, place, data_dir, trained):
    url, local = on_store
    replace_object(object_store, url, rows := "embeddings/blobs-test-00001-of-00004.parquet")
    requests: list[str] = []
    with object_store.deciding(lambda request: requests.append(request.path)):
        manifest = make_embeddings(data_dir, trained / "export", f"{place}/dt=2", reuse_from=url)
    assert fetched_names(requests, url) == {
        "manifest.json",
        "statistics.json",
        "timings.json",
        rows,
    }
    computed = {task: counts["computed"] for task, counts in manifest["done"].items()}
    assert [name for name, count in computed.items() if count] == [
        "blobs-test.tfrecord-00001-of-00004"
    ]
    assert without_times(object_store, f"{place}/dt=2") == outputs_of(local)


def test_objects_of_an_export_without_checksums_are_read(
    object_store, on_store, place, data_dir, trained
):
    """As an earlier version wrote the manifest."""
    url, local = on_store
    manifest = manifest_lib.manifest_of(url)
    for entry in manifest["files"]:
        del entry["crc32c"]
    files.write_bytes(f"{url}/manifest.json", manifest_lib.sealed_json(manifest))
    sheet = "images/blobs-test-00002-of-00004.png"
    replace_object(object_store, url, sheet)
    requests: list[str] = []
    with object_store.deciding(lambda request: requests.append(request.path)):
        assert not output_directory.are_complete(url, manifest["files"])
        few = [entry for entry in manifest["files"] if entry["name"] != sheet]
        requests.clear()
        # Too large to be read each night to find that there is nothing to do.
        assert output_directory.are_complete(url, few)
        assert not [name for name in fetched_names(requests, url) if "parquet" in name]
        make_embeddings(data_dir, trained / "export", f"{place}/dt=2", reuse_from=url)
    names = {entry["name"] for entry in manifest["files"]}
    assert names <= fetched_names(requests, url)
    assert without_times(object_store, f"{place}/dt=2") == outputs_of(local)
