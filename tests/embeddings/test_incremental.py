"""A repeated export computes only what is new, and ends in the same bytes."""

import hashlib
import json
import pathlib
import shutil

import pytest

from pipeline.cli.errors import SourceChanged, StageError, UsageError
from pipeline.embeddings import job
from pipeline.storage import lock
from tests.conftest import (
    die_at_file,
    make_embeddings,
    make_folder_set,
    make_idx_set,
    make_shards,
    outputs_of,
    run_command,
    smoke_config,
)
from tests.datasets.test_reader import damage_one_record


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
def calls(monkeypatch):
    """The number of images in each call of the model."""
    batch_sizes, embed = [], job.PublishedModel.embed

    def counting(self, images, outputs):
        if len(images):  # Tracing calls it without images.
            batch_sizes.append(len(images))
        return embed(self, images, outputs)

    monkeypatch.setattr(job.PublishedModel, "embed", counting)
    return batch_sizes


def test_exactly_the_appended_records_are_computed(grown, trained, tmp_path, calls):
    data, model, out = grown(1), trained / "export", tmp_path / "out"
    assert computed(make_embeddings(data, model, out)) == 51 == sum(calls)
    calls.clear()
    before = outputs_of(out)
    again = make_embeddings(data, model, out)
    assert (again["reused"], computed(again), calls) == (True, 0, [])
    assert outputs_of(out) == before

    grown(100)
    manifest = make_embeddings(data, model, out)
    assert computed(manifest) == 100 == sum(calls)
    assert manifest["records"] == {"read": 151, "written": 151, "quarantined": 0}
    timings = json.loads((out / "timings.json").read_text())
    done = timings["done"].values()
    assert sum(counts["computed"] for counts in done) == 100
    assert sum(counts["reused"] for counts in done) == 51
    # Step by step and at once: the same bytes, manifest included.
    make_embeddings(data, model, tmp_path / "at_once")
    assert outputs_of(tmp_path / "at_once") == outputs_of(out)
    unchanged = {n: data for n, data in before.items() if n.endswith((".parquet", ".png"))}
    assert outputs_of(out).items() >= unchanged.items()


def test_another_model_computes_everything_again(data_dir, trained, other_model, tmp_path, calls):
    out = tmp_path / "out"
    first = make_embeddings(data_dir, trained / "export", out)
    manifest = make_embeddings(data_dir, other_model, out)
    assert computed(manifest) == 50 and sum(calls) == 100
    assert manifest["export_id"] != first["export_id"]
    make_embeddings(data_dir, other_model, tmp_path / "fresh")
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


def test_overwrite_computes_everything_again_with_the_same_bytes(data_dir, trained, tmp_path):
    out = tmp_path / "out"
    make_embeddings(data_dir, trained / "export", out)
    before = outputs_of(out)
    assert computed(make_embeddings(data_dir, trained / "export", out, overwrite=True)) == 50
    assert outputs_of(out) == before


def test_fewer_shards_leave_no_file_of_the_earlier_shards(idx_dir, trained, tmp_path):
    data, model, out = tmp_path / "data", trained / "export", tmp_path / "out"
    make_shards(f"idx:{idx_dir}", data, num_shards=5)
    make_embeddings(data, model, out)
    make_shards(f"idx:{idx_dir}", data, num_shards=2, overwrite=True)
    make_embeddings(data, model, out)
    make_embeddings(data, model, tmp_path / "fresh")
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")
    assert len(list(out.glob("*.parquet"))) == 2


def test_other_settings_need_overwrite_and_leave_nothing_of_the_old(data_dir, trained, tmp_path):
    model, out = trained / "export", tmp_path / "out"
    make_embeddings(data_dir, model, out)
    before = outputs_of(out)
    for settings, message in (
        ({"images": "none"}, "images is 'sheets' there and 'none' here"),
        ({"embedding_format": "npy"}, "embedding_format is 'parquet' there"),
        ({"fields": ("mean",)}, "fields is"),
        ({"split": "train"}, "split is"),
        ({"z_seed": 1}, "z_seed is 0 there and 1 here"),
    ):
        with pytest.raises(StageError, match=f"made with other settings.*{message}"):
            make_embeddings(data_dir, model, out, **settings)
    assert outputs_of(out) == before
    settings = {"images": "all", "embedding_format": "npy"}
    make_embeddings(data_dir, model, out, overwrite=True, **settings)
    make_embeddings(data_dir, model, tmp_path / "fresh", **settings)
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


# The files that the second export opens for writing: job.json; markers of five unchanged shards;
# rows, sheet, note and marker of a new shard; statistics, job.json, timings, manifest.
@pytest.mark.parametrize(
    "file_number", [8, 14, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 11))]
)
def test_killed_in_a_second_export_the_first_stays_and_the_rerun_completes(
    grown, trained, tmp_path, file_number
):
    data, model, out = grown(3), trained / "export", tmp_path / "out"
    make_embeddings(data, model, out)
    before = outputs_of(out)
    grown(30)
    flags = (f"--data_dir={data}", f"--model_dir={model}", f"--output_dir={out}", "--noreport")
    die_at_file(file_number, "pipeline.export", *flags)
    after = {n: d for n, d in outputs_of(out).items() if not n.startswith(".progress")}
    if file_number < 13:
        assert after == before  # Readers see the first export.
    manifest = make_embeddings(data, model, out)
    assert computed(manifest) == 30
    make_embeddings(data, model, tmp_path / "fresh")
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


@pytest.mark.parametrize("move_number", [1, 2, 5, 9])
def test_killed_while_files_are_moved(
    data_dir, trained, other_model, grown, tmp_path, monkeypatch, move_number
):
    """Then the set grows before the next try, and no file of an earlier state is left."""
    from pipeline.storage import files

    data, out = grown(2), tmp_path / "out"
    make_embeddings(data, trained / "export", out)
    moved, move = iter(range(1, 100)), files.move

    class Killed(BaseException):
        pass

    def moving(path, target):
        if next(moved) == move_number:
            raise Killed
        move(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(files, "move", moving)
        with pytest.raises(Killed):
            make_embeddings(data, other_model, out)
    assert not (out / "manifest.json").exists()
    grown(5)
    manifest = make_embeddings(data, other_model, out)
    assert sum(d["computed"] for d in manifest["done"].values() if not d["earlier_try"]) == 5
    make_embeddings(data, other_model, tmp_path / "fresh")
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


def test_killed_while_overwriting_the_same_command_goes_on(data_dir, trained, tmp_path):
    model, out = trained / "export", tmp_path / "out"
    make_embeddings(data_dir, model, out)
    flags = (f"--data_dir={data_dir}", f"--model_dir={model}", f"--output_dir={out}", "--noreport")
    die_at_file(8, "pipeline.export", *flags, "--overwrite")
    manifest = make_embeddings(data_dir, model, out, overwrite=True)
    earlier = [d["computed"] for d in manifest["done"].values() if d["earlier_try"]]
    assert earlier and computed(manifest) == 50


def test_a_bound_that_does_not_hold_publishes_nothing(grown, trained, tmp_path, calls):
    data, model, out = grown(1), trained / "export", tmp_path / "out"
    with pytest.raises(StageError, match=r"elbo>0 \(it is -.*nothing is published"):
        make_embeddings(data, model, out, require="elbo>0")
    assert list(outputs_of(out)) == [n for n in outputs_of(out) if n.startswith(".progress")]
    bounds = "elbo>-1e9, active_units>=0,kl<1e9,quarantined==0,written>=51"
    assert computed(make_embeddings(data, model, out, require=bounds)) == 51
    assert sum(calls) == 51  # Nothing is computed twice.
    before = outputs_of(out)
    grown(10)
    with pytest.raises(StageError, match=r"written<60 \(it is 61\), reconstruction_loss<1 \(it is"):
        make_embeddings(data, model, out, require="written<60,reconstruction_loss<1")
    after = {n: d for n, d in outputs_of(out).items() if not n.startswith(".progress")}
    assert after == before
    assert make_embeddings(data, model, out)["records"]["written"] == 61
    with pytest.raises(
        StageError, match="written<60"
    ):  # The bound applies to a finished export, too.
        make_embeddings(data, model, out, require="written<60")


def test_without_rows_no_bound_on_them_holds(grown, trained, other_model, tmp_path):
    data, out = grown(1), tmp_path / "out"
    make_embeddings(data, trained / "export", out, require="elbo>-1000")
    before = outputs_of(out)
    for path in data.glob("*-test.tfrecord*"):
        path.write_bytes(b"")
    settings = {"on_corrupt": "quarantine", "max_quarantined": "1.0"}
    for bound in ("elbo>-1000", "elbo<1000", "active_units>=0"):
        with pytest.raises(StageError, match=f"{bound} \\(there is none.*nothing is published"):
            make_embeddings(data, other_model, out, require=bound, **settings)
        after = {n: d for n, d in outputs_of(out).items() if not n.startswith(".progress")}
        assert after == before
    manifest = make_embeddings(data, other_model, out, require="written<=0", **settings)
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
    from pipeline.embeddings import gate

    with pytest.raises(UsageError, match="is no bound; expected NAME, one of"):
        gate.parse(text)


def test_a_bound_on_an_unknown_metric_is_refused(data_dir, trained, tmp_path):
    with pytest.raises(UsageError, match="no metric 'accuracy' in .*; expected one of reconstruct"):
        make_embeddings(data_dir, trained / "export", tmp_path / "out", require="accuracy>0.9")
    with pytest.raises(UsageError, match="no metric 'elbo' in .*; expected one of active_units"):
        make_embeddings(
            data_dir, trained / "export", tmp_path / "out", require="elbo>0", fields=("mean",)
        )


def test_a_shard_damaged_after_it_was_exported_costs_nothing(grown, trained, tmp_path):
    """A row is a function of the record, so an existing row does not need the record again."""
    data, model, out = grown(1), trained / "export", tmp_path / "out"
    make_embeddings(data, model, out)
    grown(4)
    damage_one_record(data, "blobs-test.tfrecord-00002-of-00004")
    manifest = make_embeddings(data, model, out)
    assert manifest["records"] == {"read": 55, "written": 55, "quarantined": 0}
    assert computed(manifest) == 4


def test_a_damaged_shard_is_read_again_until_it_is_repaired(grown, trained, tmp_path, calls):
    data, model, out = grown(1), trained / "export", tmp_path / "out"
    path = data / "blobs-test.tfrecord-00002-of-00004"
    whole = path.read_bytes()
    damage_one_record(data, path.name)
    settings = {"on_corrupt": "quarantine", "max_quarantined": "1"}
    manifest = make_embeddings(data, model, out, **settings)
    assert manifest["records"] == {"read": 51, "written": 50, "quarantined": 1}
    calls.clear()
    manifest = make_embeddings(data, model, out, **settings)
    assert (computed(manifest), sum(calls)) == (0, 0)
    path.write_bytes(whole)
    manifest = make_embeddings(data, model, out, **settings)
    assert manifest["records"] == {"read": 51, "written": 51, "quarantined": 0}
    # The repaired record, and the few others on the contact sheet of its shard.
    assert sum(calls) <= 20
    make_embeddings(data, model, tmp_path / "fresh")
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")
    assert not (out / "quarantine").exists()


def test_damaged_output_is_replaced(data_dir, trained, tmp_path):
    model, out = trained / "export", tmp_path / "out"
    make_embeddings(data_dir, model, out)
    before = outputs_of(out)
    (out / "blobs-test-00001-of-00004.parquet").unlink()
    (out / "blobs-test-00002-of-00004.png").write_bytes(b"no picture")
    manifest = make_embeddings(data_dir, model, out)
    assert 0 < computed(manifest) < 50
    assert not manifest["reused"]
    assert outputs_of(out) == before


def test_rows_do_not_depend_on_how_many_are_reused(data_dir, trained, tmp_path, monkeypatch):
    """Without pictures only the new records of a shard are computed."""
    from pipeline.embeddings import shard

    model, out, folder = trained / "export", tmp_path / "out", tmp_path / "set"
    monkeypatch.setattr(shard, "_SHEET_PAIRS", 4)
    make_folder_set(folder, num_train=40, num_test=40)
    paths = sorted((folder / "test").rglob("*.png"))
    later = tmp_path / "later"
    later.mkdir()
    for number, path in enumerate(paths[::5]):
        path.rename(later / f"{number}.png")
    source, settings = f"folder:{folder}", {"num_shards": 3, "images": "none"}
    first = make_embeddings(source, model, out, **settings)
    assert computed(first) == 32
    for number, path in enumerate(paths[::5]):
        (later / f"{number}.png").rename(path)
    assert computed(make_embeddings(source, model, out, **settings)) == 8
    make_embeddings(source, model, tmp_path / "fresh", **settings)
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


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


def test_of_a_changed_source_only_the_changes_are_computed(trained, tmp_path, calls):
    folder, out = make_folder_set(tmp_path / "set", num_train=9, num_test=60), tmp_path / "out"
    source, model = f"folder:{folder}", trained / "export"
    assert computed(make_embeddings(source, model, out)) == 60
    calls.clear()
    assert make_embeddings(source, model, out)["reused"] is True
    paths = sorted((folder / "test").rglob("*.png"))
    paths[0].write_bytes(paths[1].read_bytes())  # Another image under the same id.
    paths[7].unlink()
    paths[9].write_bytes(b"no image")
    manifest = make_embeddings(source, model, out, max_quarantined="1")
    assert manifest["records"] == {"read": 59, "written": 58, "quarantined": 1}
    [line] = (out / "quarantine").glob("*.jsonl")
    assert str(paths[9].relative_to(folder)) in line.read_text()
    make_embeddings(source, model, tmp_path / "fresh", max_quarantined="1")
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")
    calls.clear()
    assert computed(make_embeddings(source, model, out, max_quarantined="1")) == 0 == sum(calls)


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
            if name.endswith((".parquet", ".png")):
                assert (tmp_path / "both" / name).read_bytes() == data
    assert manifest["records"]["written"] == 322
    make_embeddings(data_dir, model, tmp_path / "turned", split="train,test")
    assert outputs_of(tmp_path / "both") == outputs_of(tmp_path / "turned")
    with pytest.raises(StageError, match="--split=tset: .* has train, validation, test"):
        make_embeddings(data_dir, model, tmp_path / "x", split="test,tset")


def test_embeddings_are_the_same_without_pictures(data_dir, trained, tmp_path):
    import pyarrow.parquet as pq

    model = trained / "export"
    make_embeddings(data_dir, model, tmp_path / "all")
    make_embeddings(data_dir, model, tmp_path / "few", fields=("mean", "log_var"), images="none")
    assert not list((tmp_path / "few").glob("*.png"))
    for path in sorted((tmp_path / "few").glob("*.parquet")):
        few, full = pq.read_table(path), pq.read_table(tmp_path / "all" / path.name)
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


def test_killed_while_publishing_and_then_while_overwriting(
    data_dir, trained, other_model, tmp_path, monkeypatch
):
    """Without a manifest, the directory still counts as one of export."""
    from pipeline.stages import tasks
    from pipeline.storage import files

    out = tmp_path / "out"
    make_embeddings(data_dir, trained / "export", out)

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    for owner, name, settings in (
        (files, "move", {}),
        (tasks.Tasks, "clear", {"overwrite": True}),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, kill)
            with pytest.raises(Killed):
                make_embeddings(data_dir, other_model, out, **settings)
        assert not (out / "manifest.json").exists()
    make_embeddings(data_dir, other_model, out)
    make_embeddings(data_dir, other_model, tmp_path / "fresh")
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


@pytest.mark.parametrize("embedding_format", ["parquet", "npy"])
def test_output_of_a_rejected_run_is_never_published(trained, tmp_path, embedding_format):
    """Good data, then bad data that a bound rejects, then good data with a new record."""
    model, out = trained / "export", tmp_path / "out"
    folder = make_folder_set(tmp_path / "set", num_train=9, num_test=60)
    source, settings = f"folder:{folder}", {"embedding_format": embedding_format}
    make_embeddings(source, model, out, **settings)
    paths = sorted((folder / "test").rglob("*.png"))
    good = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(good[0])
    with pytest.raises(StageError, match="nothing is published"):
        make_embeddings(source, model, out, require="elbo>1e9", **settings)
    for path, data in zip(paths, good, strict=True):
        path.write_bytes(data)
    paths[0].with_name("new.png").write_bytes(good[3])
    manifest = make_embeddings(source, model, out, **settings)
    for entry in manifest["files"]:
        data = (out / entry["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], entry["name"]
    make_embeddings(source, model, tmp_path / "fresh", **settings)
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


def test_outputs_inside_inputs_are_refused(data_dir, trained, tmp_path):
    model, folder = trained / "export", make_folder_set(tmp_path / "set", num_train=5, num_test=9)
    for data, inside in ((data_dir, data_dir), (f"folder:{folder}", folder), (data_dir, model)):
        with pytest.raises(UsageError, match="--output_dir=.*: lies in .*; name a directory"):
            make_embeddings(data, model, inside / "out")
        assert not (inside / "out").exists()
    make_embeddings(data_dir, model, tmp_path / "out")
    with pytest.raises(UsageError, match="is what --output_dir will replace; name another"):
        make_embeddings(data_dir, model, tmp_path / "out", reference=tmp_path / "out")
