"""Night after night: each export computes only what is new, and has the bytes of a fresh one."""

import hashlib
import json
import pathlib
import shutil

import pyarrow.parquet as pq
import pytest

from pipeline.cli.errors import SourceChanged, StageError, UsageError
from pipeline.embeddings import job
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import pointer
from pipeline.stages.output_directory import Conflict
from pipeline.storage import lock
from tests.conftest import (
    die_at_file,
    make_embeddings,
    make_folder_set,
    make_idx_set,
    make_shards,
    outputs_of,
    smoke_config,
)
from tests.datasets.test_reader import damage_one_record
from tests.forked import run_command


def computed(manifest: dict) -> int:
    return sum(counts["computed"] for counts in manifest["done"].values())


@pytest.fixture(scope="module")
def other_model(data_dir, tmp_path_factory) -> pathlib.Path:
    from trainer.runs import train

    workdir = tmp_path_factory.mktemp("other") / "run"
    train.train(smoke_config(data_dir, seed=1), workdir=str(workdir))
    return workdir / "export"


@pytest.fixture
def grown(data_dir, tmp_path):
    """A function that appends test records to a copy of the data set."""
    directory, days = tmp_path / "data", iter(range(1, 100))
    shutil.copytree(data_dir, directory)

    def grow(count: int) -> pathlib.Path:
        day = next(days)
        new_set = make_idx_set(tmp_path / f"day{day}", num_train=1, num_test=count)
        settings = {"append": True, "id_prefix": f"day{day}-", "num_shards": 1}
        make_shards(f"idx:{new_set}", directory, **settings)
        return directory

    return grow


@pytest.fixture
def nights(tmp_path):
    """A function that exports into a new directory, and then moves `latest` to it."""
    numbers = iter(range(1, 100))

    def export(data, model, *, number=None, **settings) -> dict:
        out = tmp_path / "nights" / f"{number or f'{next(numbers):02d}'}"
        return make_embeddings(data, model, out, latest=tmp_path / "nights" / "latest", **settings)

    return export


def latest(tmp_path) -> pathlib.Path:
    return (tmp_path / "nights" / "latest").resolve()


def assert_as_fresh(directory, data, model, tmp_path, **settings) -> None:
    """An export has the bytes of one that takes no rows over, its manifest included."""
    fresh = tmp_path / f"fresh-{pathlib.Path(directory).name}"
    make_embeddings(data, model, fresh, **settings)
    assert outputs_of(pathlib.Path(directory)) == outputs_of(fresh)


def changes_of(directory) -> dict[tuple[str, str], str]:
    """(split, id) -> added, changed or removed."""
    table = pq.read_table(pathlib.Path(directory) / "changes.parquet").to_pylist()
    return {(row["split"], row["id"]): row["change"] for row in table}


@pytest.fixture
def calls(monkeypatch):
    """The number of images in each call of the model."""
    batch_sizes, embed = [], job.PublishedModel.embed

    def counting(self, images, outputs):
        if len(images):  # Tracing calls it without images.
            batch_sizes.append(len(images))
        return embed(self, images, outputs)

    monkeypatch.setattr(job.PublishedModel, "embed", counting)
    return batch_sizes


def test_exactly_the_appended_records_are_computed(grown, nights, trained, tmp_path, calls):
    data, model = grown(1), trained / "export"
    first = nights(data, model)
    assert computed(first) == 51 == sum(calls)
    calls.clear()
    before = outputs_of(latest(tmp_path))
    # Nothing new: no directory is made, and latest stays.
    again = nights(data, model)
    assert (again["reused"], computed(again), calls) == (True, 0, [])
    assert again["directory"] == first["directory"] and not (tmp_path / "nights" / "02").exists()

    grown(100)
    manifest = nights(data, model)
    out = latest(tmp_path)
    assert manifest["directory"] == str(out)
    assert computed(manifest) == 100 == sum(calls)
    assert manifest["records"] == {"read": 151, "written": 151, "quarantined": 0}
    timings = json.loads((out / "timings.json").read_text())
    done = timings["done"].values()
    assert sum(counts["computed"] for counts in done) == 100
    assert sum(counts["reused"] for counts in done) == 51
    # Step by step and at once: the same bytes, manifest included.
    assert_as_fresh(out, data, model, tmp_path)
    # The night before is as it was, and unchanged shards are the same files.
    assert outputs_of(pathlib.Path(first["directory"])) == before
    unchanged = [name for name in before if name.endswith((".parquet", ".png"))]
    assert len(unchanged) == 10
    for name in unchanged:
        assert (out / name).samefile(pathlib.Path(first["directory"]) / name)


def test_changes_name_what_is_new_changed_and_gone(trained, other_model, nights, tmp_path):
    folder = make_folder_set(tmp_path / "set", num_train=9, num_test=60)
    source, model = f"folder:{folder}", trained / "export"
    first = nights(source, model)
    paths = sorted((folder / "test").rglob("*.png"))
    ids = [str(path.relative_to(folder)) for path in paths]
    assert changes_of(first["directory"]) == {("test", record_id): "added" for record_id in ids}
    paths[0].write_bytes(paths[1].read_bytes())  # Another image under the same id.
    paths[7].unlink()
    (paths[9].parent / "new.png").write_bytes(paths[3].read_bytes())
    second = nights(source, model)
    changed = {
        ("test", ids[0]): "changed",
        ("test", ids[7]): "removed",
        ("test", str((paths[9].parent / "new.png").relative_to(folder))): "added",
    }
    assert changes_of(second["directory"]) == changed
    timings = json.loads((pathlib.Path(second["directory"]) / "timings.json").read_text())
    counts = timings["changes"]
    assert counts["against"] == first["export_id"]
    assert [counts[kind] for kind in ("added", "changed", "removed")] == [1, 1, 1]
    table = pq.read_table(f"{second['directory']}/changes.parquet").to_pylist()
    for row in table:  # The file holds the row.
        night = first if row["change"] == "removed" else second
        rows = pq.read_table(pathlib.Path(night["directory"]) / row["file"])
        assert row["id"] in rows["id"].to_pylist()
    # Another model changes all rows; another number of shards changes none.
    third = nights(source, other_model)
    assert set(changes_of(third["directory"]).values()) == {"changed"}
    fourth = nights(source, other_model, num_shards=2)
    assert changes_of(fourth["directory"]) == {}


def test_another_model_computes_everything_again(
    data_dir, trained, other_model, nights, tmp_path, calls
):
    first = nights(data_dir, trained / "export")
    manifest = nights(data_dir, other_model)
    assert computed(manifest) == 50 and sum(calls) == 100
    assert manifest["export_id"] != first["export_id"]
    assert_as_fresh(latest(tmp_path), data_dir, other_model, tmp_path)


def test_overwrite_computes_everything_again_with_the_same_bytes(data_dir, trained, tmp_path):
    out = tmp_path / "out"
    make_embeddings(data_dir, trained / "export", out)
    before = outputs_of(out)
    assert computed(make_embeddings(data_dir, trained / "export", out, overwrite=True)) == 50
    assert outputs_of(out) == before


def test_fewer_shards_leave_no_file_of_the_earlier_shards(idx_dir, trained, nights, tmp_path):
    data, model = tmp_path / "data", trained / "export"
    make_shards(f"idx:{idx_dir}", data, num_shards=5)
    nights(data, model)
    make_shards(f"idx:{idx_dir}", data, num_shards=2, overwrite=True)
    nights(data, model)
    assert_as_fresh(latest(tmp_path), data, model, tmp_path)
    assert len(list(latest(tmp_path).glob("embeddings/*.parquet"))) == 2


def test_a_finished_export_never_changes(data_dir, trained, other_model, grown, tmp_path):
    model, out = trained / "export", tmp_path / "out"
    make_embeddings(data_dir, model, out)
    before = outputs_of(out)
    for data, settings, message in (
        (data_dir, {"images": "none"}, "images is 'sheets' there and 'none' here"),
        (data_dir, {"embedding_format": "npy"}, "embedding_format is 'parquet' there"),
        (data_dir, {"fields": ("mean",)}, "fields is"),
        (data_dir, {"split": "train"}, "split is"),
        (data_dir, {"z_seed": 1}, "z_seed is 0 there and 1 here"),
        (grown(1), {}, "dataset_id is"),
    ):
        expected = f"holds finished output of other inputs.*{message}.*--reuse_from.*--latest"
        with pytest.raises(StageError, match=expected):
            make_embeddings(data, model, out, **settings)
    with pytest.raises(StageError, match="model_id is"):
        make_embeddings(data_dir, other_model, out)
    assert outputs_of(out) == before
    settings = {"images": "all", "embedding_format": "npy"}
    make_embeddings(data_dir, model, out, overwrite=True, **settings)
    make_embeddings(data_dir, model, tmp_path / "fresh", **settings)
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


# The files that the second export opens for writing: job.json; markers of five linked shards;
# rows, sheet and marker of a new shard; statistics, changes, timings, manifest.
@pytest.mark.parametrize(
    "file_number", [8, 13, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 9, 11, 12))]
)
def test_killed_in_a_second_night_the_first_stays_and_the_rerun_completes(
    grown, nights, trained, tmp_path, file_number
):
    data, model = grown(3), trained / "export"
    nights(data, model)
    first, before = latest(tmp_path), outputs_of(latest(tmp_path))
    grown(30)
    flags = (f"--data_dir={data}", f"--model_dir={model}", "--noreport")
    flags += (f"--output_dir={tmp_path}/nights/02", f"--latest={tmp_path}/nights/latest")
    die_at_file(file_number, "pipeline.export", *flags)
    assert latest(tmp_path) == first and outputs_of(first) == before
    assert not (tmp_path / "nights" / "02" / "manifest.json").exists()
    manifest = nights(data, model)
    assert manifest["directory"].endswith("02") and computed(manifest) == 30
    assert_as_fresh(latest(tmp_path), data, model, tmp_path)
    assert outputs_of(first) == before


def test_killed_while_overwriting_the_same_command_goes_on(data_dir, trained, tmp_path):
    model, out = trained / "export", tmp_path / "out"
    make_embeddings(data_dir, model, out)
    flags = (f"--data_dir={data_dir}", f"--model_dir={model}", f"--output_dir={out}", "--noreport")
    die_at_file(8, "pipeline.export", *flags, "--overwrite")
    manifest = make_embeddings(data_dir, model, out, overwrite=True)
    assert computed(manifest) == 50
    assert_as_fresh(out, data_dir, model, tmp_path)


def test_a_rejected_export_is_finished_and_latest_refuses_it(
    grown, nights, trained, tmp_path, calls
):
    data, model = grown(1), trained / "export"
    with pytest.raises(StageError, match=r"elbo>0 \(it is -.*the export is rejected"):
        nights(data, model, require="elbo>0")
    rejected = tmp_path / "nights" / "01"
    manifest = json.loads((rejected / "manifest.json").read_text())
    assert len(manifest["rejected"]) == 1 and "elbo>0" in manifest["rejected"][0]
    assert not (tmp_path / "nights" / "latest").exists()
    # A rerun ends as before, and computes nothing.
    calls.clear()
    with pytest.raises(StageError, match="was rejected by --require .elbo>0"):
        nights(data, model, number="01", require="elbo>0")
    with pytest.raises(
        Conflict, match="was rejected by --require.*the bounds of this command hold"
    ):
        nights(data, model, number="01", require="elbo<0")
    with pytest.raises(StageError, match="was rejected by --require.*stays where it is"):
        pointer.move(str(tmp_path / "nights" / "latest"), str(rejected), seen=None)
    # Its rows are taken over.
    bounds = "elbo>-1e9, active_units>=0,kl<1e9,quarantined==0,written>=51"
    manifest = nights(data, model, require=bounds, reuse_from=rejected)
    assert computed(manifest) == 0 and not calls
    before = outputs_of(latest(tmp_path))
    grown(10)
    good = latest(tmp_path)
    with pytest.raises(StageError, match=r"written<60 \(it is 61\), reconstruction_loss<1 \(it is"):
        nights(data, model, require="written<60,reconstruction_loss<1")
    assert latest(tmp_path) == good and outputs_of(good) == before
    assert nights(data, model)["records"]["written"] == 61
    with pytest.raises(StageError, match="written<60"):  # The bound applies to a finished export.
        nights(data, model, require="written<60")


def test_without_rows_no_bound_on_them_holds(grown, nights, trained, other_model, tmp_path):
    data = grown(1)
    nights(data, trained / "export", require="elbo>-1000")
    good, before = latest(tmp_path), outputs_of(latest(tmp_path))
    for path in data.glob("*-test.tfrecord*"):
        path.write_bytes(b"")
    settings = {"on_corrupt": "quarantine", "max_quarantined": "1.0"}
    for bound in ("elbo>-1000", "elbo<1000", "active_units>=0"):
        with pytest.raises(StageError, match=f"{bound} \\(there is none.*the export is rejected"):
            nights(data, other_model, require=bound, **settings)
        assert latest(tmp_path) == good and outputs_of(good) == before
    manifest = nights(data, other_model, require="written<=0", **settings)
    assert manifest["records"]["written"] == 0 < manifest["records"]["quarantined"]


def test_bounds_on_the_model_are_checked_first(data_dir, trained, tmp_path, calls):
    model = trained / "export"
    split = next(iter(json.loads((model / "manifest.json").read_text())["metrics"]))
    for bound in (f"model.{split}.elbo>0", f"model.{split}.kl<-1"):
        with pytest.raises(StageError, match=f"{bound[:12]}.*does not hold"):
            make_embeddings(data_dir, model, tmp_path / "out", require=bound)
    assert not calls and not (tmp_path / "out").exists()
    make_embeddings(data_dir, model, tmp_path / "out", require=f"model.{split}.elbo>-1e9")


@pytest.mark.parametrize(
    "text", ["elbo", "elbo>", "elbo=3", "elbo>x", ">3", "elbo>nan", "elbo>1,,kl<2", "a b>3"]
)
def test_malformed_bounds_are_refused(text):
    from pipeline.stages import gate

    with pytest.raises(UsageError, match="is no bound; expected NAME, one of"):
        gate.parse(text)


def test_a_bound_on_an_unknown_metric_is_refused(data_dir, trained, tmp_path):
    with pytest.raises(UsageError, match="no metric 'accuracy'; expected one of reconstruct"):
        make_embeddings(data_dir, trained / "export", tmp_path / "out", require="accuracy>0.9")
    with pytest.raises(UsageError, match="no metric 'elbo'; expected one of active_units"):
        make_embeddings(
            data_dir, trained / "export", tmp_path / "out", require="elbo>0", fields=("mean",)
        )


def test_a_shard_damaged_after_it_was_exported_costs_nothing(grown, nights, trained):
    """A row is a function of the record, so an existing row does not need the record again."""
    data, model = grown(1), trained / "export"
    nights(data, model)
    grown(4)
    damage_one_record(data, "blobs-test.tfrecord-00002-of-00004")
    manifest = nights(data, model)
    assert manifest["records"] == {"read": 55, "written": 55, "quarantined": 0}
    assert computed(manifest) == 4


def test_a_damaged_shard_is_read_again_until_it_is_repaired(
    grown, nights, trained, tmp_path, calls
):
    data, model = grown(1), trained / "export"
    path = data / "blobs-test.tfrecord-00002-of-00004"
    whole = path.read_bytes()
    damage_one_record(data, path.name)
    settings = {"on_corrupt": "quarantine", "max_quarantined": "1"}
    manifest = nights(data, model, **settings)
    assert manifest["records"] == {"read": 51, "written": 50, "quarantined": 1}
    calls.clear()
    # The same result again: no directory is left, and latest stays.
    again = nights(data, model, **settings)
    assert (computed(again), sum(calls), again["directory"]) == (0, 0, manifest["directory"])
    with pytest.raises(StageError, match="written<9"):  # Another bound leaves no directory either.
        nights(data, model, require="written<9", **settings)
    assert not list((tmp_path / "nights").glob("0[23]"))
    # The same directory again: it stays as it is, and a repaired shard asks for a new one.
    assert nights(data, model, number="01", **settings)["reused"]
    path.write_bytes(whole)
    with pytest.raises(Conflict, match="1 quarantined records of .*00002-of-00004, which was rep"):
        nights(data, model, number="01", **settings)
    manifest = nights(data, model, **settings)
    assert manifest["records"] == {"read": 51, "written": 51, "quarantined": 0}
    # The repaired record, and the few others on the contact sheet of its shard.
    assert sum(calls) <= 20
    assert_as_fresh(latest(tmp_path), data, model, tmp_path)
    assert not (latest(tmp_path) / "quarantine").exists()


def test_damaged_output_is_computed_again(data_dir, nights, trained, tmp_path):
    model = trained / "export"
    nights(data_dir, model)
    first = latest(tmp_path)
    before = outputs_of(first)
    (first / "embeddings" / "blobs-test-00001-of-00004.parquet").unlink()
    (first / "images" / "blobs-test-00002-of-00004.png").write_bytes(b"no picture")
    manifest = nights(data_dir, model)
    assert 0 < computed(manifest) < 50
    assert not manifest["reused"] and latest(tmp_path) != first
    assert changes_of(latest(tmp_path)) == {}  # The same rows again.
    assert outputs_of(latest(tmp_path)) == before


def test_an_export_with_odd_names_of_shards_gives_no_rows(data_dir, trained, tmp_path):
    model, first = trained / "export", tmp_path / "first"
    make_embeddings(data_dir, model, first)
    manifest = manifest_lib.manifest_of(str(first))
    manifest["made_from"]["name"] = "odd"
    (first / "manifest.json").write_bytes(manifest_lib.sealed_json(manifest))
    assert computed(make_embeddings(data_dir, model, tmp_path / "out", reuse_from=first)) == 50


@pytest.mark.parametrize("embedding_format", ["tfrecord", "npy"])
def test_a_shard_without_records_fills_later(trained, nights, tmp_path, embedding_format):
    folder, model = make_folder_set(tmp_path / "set", num_train=9, num_test=2), trained / "export"
    settings = {"num_shards": 4, "embedding_format": embedding_format}
    first = nights(f"folder:{folder}", model, **settings)
    assert 0 in [shard["written"] for shard in first["shards"].values()]
    make_folder_set(folder, num_train=9, num_test=40)
    assert nights(f"folder:{folder}", model, **settings)["records"]["written"] == 40
    changed = list(changes_of(latest(tmp_path)).values())
    assert changed.count("added") == 38


def test_changes_after_a_kill_are_against_the_export_that_was_taken_over(
    grown, nights, trained, tmp_path, when_written
):
    data, model = grown(1), trained / "export"
    nights(data, model)
    grown(5)
    nights(data, model)
    grown(7)

    def stop() -> None:
        raise KeyboardInterrupt

    when_written("03/statistics.json", stop)
    with pytest.raises(KeyboardInterrupt):
        nights(data, model)
    # Meanwhile `latest` is moved back.
    pointer_path, first = str(tmp_path / "nights" / "latest"), str(tmp_path / "nights" / "01")
    pointer.move(pointer_path, first, seen=pointer.read(pointer_path))
    manifest = nights(data, model, number="03")
    assert manifest["directory"].endswith("03") and computed(manifest) == 7
    assert list(changes_of(latest(tmp_path)).values()) == ["added"] * 12


def test_rows_do_not_depend_on_how_many_are_reused(
    data_dir, nights, trained, tmp_path, monkeypatch
):
    """Without pictures only the new records of a shard are computed."""
    from pipeline.embeddings import files as row_files

    model, folder = trained / "export", tmp_path / "set"
    monkeypatch.setattr(row_files, "SHEET_PAIRS", 4)
    make_folder_set(folder, num_train=40, num_test=40)
    paths = sorted((folder / "test").rglob("*.png"))
    later = tmp_path / "later"
    later.mkdir()
    for number, path in enumerate(paths[::5]):
        path.rename(later / f"{number}.png")
    source, settings = f"folder:{folder}", {"num_shards": 3, "images": "none"}
    assert computed(nights(source, model, **settings)) == 32
    for number, path in enumerate(paths[::5]):
        (later / f"{number}.png").rename(path)
    assert computed(nights(source, model, **settings)) == 8
    assert_as_fresh(latest(tmp_path), source, model, tmp_path, **settings)


def test_a_source_gives_the_bytes_of_its_shards(idx_dir, data_dir, trained, tmp_path):
    model = trained / "export"
    for images in ("sheets", "all"):
        settings = {"split": "test,validation", "images": images}
        make_embeddings(data_dir, model, tmp_path / f"shards-{images}", **settings)
        manifest = make_embeddings(
            f"idx:{idx_dir}", model, tmp_path / f"source-{images}", **settings
        )
        described = ("manifest.json", "statistics.json")
        assert {
            n: d for n, d in outputs_of(tmp_path / f"source-{images}").items() if n not in described
        } == {
            n: d for n, d in outputs_of(tmp_path / f"shards-{images}").items() if n not in described
        }
        assert manifest["records"]["written"] == 50 + 28


def test_of_a_changed_source_only_the_changes_are_computed(
    trained, nights, tmp_path, calls, capsys
):
    folder = make_folder_set(tmp_path / "set", num_train=9, num_test=60)
    source, model = f"folder:{folder}", trained / "export"
    assert computed(nights(source, model)) == 60
    calls.clear()
    assert nights(source, model)["reused"] is True and not calls
    paths = sorted((folder / "test").rglob("*.png"))
    paths[0].write_bytes(paths[1].read_bytes())  # Another image under the same id.
    paths[7].unlink()
    paths[9].write_bytes(b"no image")
    manifest = nights(source, model, max_quarantined="1")
    assert manifest["records"] == {"read": 59, "written": 58, "quarantined": 1}
    [line] = (latest(tmp_path) / "quarantine").glob("*.jsonl")
    assert str(paths[9].relative_to(folder)) in line.read_text()
    assert_as_fresh(latest(tmp_path), source, model, tmp_path, max_quarantined="1")
    calls.clear()
    assert computed(nights(source, model, max_quarantined="1")) == 0 == sum(calls)
    # Files of rows are damaged, and one shard changes: its rows are the only lines.
    night = latest(tmp_path)
    for path in (night / "embeddings").iterdir():
        path.write_bytes(path.read_bytes()[:-9] + b"?" * 9)
    paths[0].write_bytes(paths[2].read_bytes())
    nights(source, model, max_quarantined="1")
    changed = changes_of(latest(tmp_path))
    assert 1 < len(changed) < 30 and set(changed.values()) == {"added"}
    expected = (
        f"export: warning: cannot read 1 of the changed shards of {night}; in changes.parquet"
    )
    assert expected in capsys.readouterr().err


def test_a_source_that_changes_under_an_export_is_not_published(trained, tmp_path, when_written):
    folder, out = make_folder_set(tmp_path / "set", num_train=9, num_test=30), tmp_path / "out"
    source, model = f"folder:{folder}", trained / "export"
    path = max((folder / "test").rglob("*.png"))
    data = path.read_bytes()
    when_written("statistics.json", lambda: path.write_bytes(data + b"x"))
    name = str(path.relative_to(folder))
    with pytest.raises(SourceChanged, match=f"{name} was changed since the job began"):
        make_embeddings(source, model, out)
    assert not (out / "manifest.json").exists()
    path.write_bytes(data)
    make_embeddings(source, model, out)
    make_embeddings(source, model, tmp_path / "fresh")
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


def test_several_splits_at_once_give_the_files_of_each(data_dir, trained, tmp_path):
    model = trained / "export"
    manifest = make_embeddings(data_dir, model, tmp_path / "both", split="test,train")
    for split, count in (("train", 272), ("test", 50)):
        alone = make_embeddings(data_dir, model, tmp_path / split, split=split)
        assert alone["records"]["written"] == count
        for name, data in outputs_of(tmp_path / split).items():
            if name.startswith(("embeddings/", "images/")):
                assert (tmp_path / "both" / name).read_bytes() == data
    assert manifest["records"]["written"] == 322
    make_embeddings(data_dir, model, tmp_path / "turned", split="train,test")
    assert outputs_of(tmp_path / "both") == outputs_of(tmp_path / "turned")
    with pytest.raises(StageError, match="--split=tset: .* has train, validation, test"):
        make_embeddings(data_dir, model, tmp_path / "x", split="test,tset")


def test_embeddings_are_the_same_without_pictures(data_dir, trained, tmp_path):
    model = trained / "export"
    make_embeddings(data_dir, model, tmp_path / "all")
    make_embeddings(data_dir, model, tmp_path / "few", fields=("mean", "log_var"), images="none")
    assert not (tmp_path / "few" / "images").exists()
    for path in sorted((tmp_path / "few").glob("embeddings/*.parquet")):
        few, full = pq.read_table(path), pq.read_table(tmp_path / "all" / "embeddings" / path.name)
        assert few.equals(full.select(few.column_names))


def test_drift_is_judged_by_its_size(data_dir, trained, other_model, grown, tmp_path):
    model, reference = trained / "export", tmp_path / "reference"
    make_embeddings(data_dir, model, reference)
    same = make_embeddings(data_dir, model, tmp_path / "same", reference=reference)["drift"]
    assert same["warnings"] == [] and same["same_model"] is True
    assert [latent["statistic"] for latent in same["latents"]] == [0.0] * 3
    data = grown(300)
    dark = tmp_path / "dark"
    shutil.copytree(tmp_path / "day1", dark)
    for path in dark.glob("t10k-images*"):
        raw = path.read_bytes()
        path.write_bytes(raw[:16] + bytes(255 - byte for byte in raw[16:]))
    make_shards(f"idx:{dark}", data, append=True, id_prefix="dark-", num_shards=1)
    drifted = make_embeddings(data, model, tmp_path / "drifted", reference=reference)["drift"]
    assert any("reconstruction_loss has drifted" in warning for warning in drifted["warnings"])
    before, after = drifted["reconstruction_loss"]["mean"]
    assert after > before
    other = make_embeddings(data_dir, other_model, tmp_path / "o", reference=reference)["drift"]
    assert other["same_model"] is False and "latents" not in other
    with pytest.raises(StageError, match="reference=.*no such directory"):
        make_embeddings(data_dir, model, tmp_path / "x", reference=tmp_path / "nothing")


def test_the_command_accounts_for_every_record(data_dir, trained, tmp_path):
    flags = (f"--data_dir={data_dir}", f"--model_dir={trained}/export", "--noreport")
    done = run_command("pipeline.export", *flags, f"--output_dir={tmp_path}/out")
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and all("computed" in line for line in lines)
    assert "50 read = 50 written + 0 quarantined (50 computed, 0 reused)" in lines[-1]
    done = run_command(
        "pipeline.export", *flags, f"--output_dir={tmp_path}/out", "--require=elbo>0", check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("export: --require: elbo>0 (it is -")
    done = run_command(
        "pipeline.export",
        *flags,
        f"--output_dir={tmp_path}/out",
        "--require=elbo>0",
        "--status_on_rejection=3",
        check=False,
    )
    assert done.returncode == 3 and done.stderr.startswith("export: --require: elbo>0 (it is -")
    for bad, message in (
        ("--fields=mean,mean", "none of them twice"),
        ("--source=sample", "expected one of the two"),
        ("--split=", "expected names of splits"),
    ):
        done = run_command(
            "pipeline.export", *flags, f"--output_dir={tmp_path}/x", bad, check=False
        )
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("options", [[], ["--direct_running_mode=multi_threading"]])
def test_the_model_is_loaded_once_and_shared(data_dir, trained, tmp_path, monkeypatch, options):
    loads, init = [], job.PublishedModel.__init__

    def counting(self, *args, **kwargs):
        loads.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(job.PublishedModel, "__init__", counting)
    beam_args = [*options, "--direct_num_workers=2"] if options else []
    make_embeddings(data_dir, trained / "export", tmp_path / "out", beam_args=beam_args)
    assert len(loads) == 1
    make_embeddings(data_dir, trained / "export", tmp_path / "fresh")
    assert outputs_of(tmp_path / "out") == outputs_of(tmp_path / "fresh")


def test_two_jobs_on_one_directory(data_dir, trained, tmp_path):
    out = tmp_path / "out"
    make_embeddings(data_dir, trained / "export", out)
    with lock.hold(str(out)):
        with pytest.raises(StageError, match="another process is writing here"):
            make_embeddings(data_dir, trained / "export", out, overwrite=True)


@pytest.mark.parametrize("embedding_format", ["parquet", "npy"])
def test_rows_of_a_rejected_night_are_not_mixed_in(nights, trained, tmp_path, embedding_format):
    """Good data, then bad data that a bound rejects, then good data with a new record."""
    model = trained / "export"
    folder = make_folder_set(tmp_path / "set", num_train=9, num_test=60)
    source, settings = f"folder:{folder}", {"embedding_format": embedding_format}
    nights(source, model, **settings)
    paths = sorted((folder / "test").rglob("*.png"))
    good = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(good[0])
    with pytest.raises(StageError, match="the export is rejected"):
        nights(source, model, require="elbo>1e9", **settings)
    for path, data in zip(paths, good, strict=True):
        path.write_bytes(data)
    paths[0].with_name("new.png").write_bytes(good[3])
    manifest = nights(source, model, **settings)
    for entry in manifest["files"]:
        data = (latest(tmp_path) / entry["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], entry["name"]
    assert_as_fresh(latest(tmp_path), source, model, tmp_path, **settings)


def test_outputs_inside_inputs_are_refused(data_dir, trained, tmp_path):
    model, folder = trained / "export", make_folder_set(tmp_path / "set", num_train=5, num_test=9)
    for data, inside in ((data_dir, data_dir), (f"folder:{folder}", folder), (data_dir, model)):
        with pytest.raises(UsageError, match="--output_dir=.*: lies in .*; name a directory"):
            make_embeddings(data, model, inside / "out")
        assert not (inside / "out").exists()
    make_embeddings(data_dir, model, tmp_path / "out")
    (tmp_path / "latest").symlink_to("out")
    with pytest.raises(
        UsageError, match="lies in --latest, .*/out; name a directory outside of it"
    ):
        make_embeddings(data_dir, model, tmp_path / "out" / "more", latest=tmp_path / "latest")
    with pytest.raises(UsageError, match="is the directory to write; name another"):
        make_embeddings(data_dir, model, tmp_path / "out", reference=tmp_path / "out")
