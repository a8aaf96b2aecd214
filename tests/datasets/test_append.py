"""Growing a finished set: what is there stays as it is, byte for byte; what is new is added."""

import json
import random
import shutil

import numpy as np
import pytest

from pipeline.cli.errors import SourceChanged, StageError
from pipeline.datasets import reader, verification
from tests.conftest import (
    die_at_file,
    make_folder_set,
    make_idx_set,
    make_shards,
    outputs_of,
    write_idx,
)
from tests.forked import run_command
from tests.sources.test_sources import records_in

# What describes the set as a whole, and has to change.
DESCRIPTIONS = {
    "manifest.json",
    "croissant.json",
    "dataset_info.json",
    "statistics.json",
    "stats.html",
    "duplicates.jsonl",
    "manifest.json.previous",
    *(f"index/statistics-{split}.npz" for split in ("train", "validation", "test")),
}


def grown_idx(directory, base, *, extra: int = 60):
    """The set in `base` with more train images behind those it has."""
    shutil.copytree(base, directory)
    generator = np.random.default_rng(9)
    for kind, size in (("images-idx3", 12 * 8), ("labels-idx1", 1)):
        path = directory / f"train-{kind}-ubyte"
        old = np.frombuffer(path.read_bytes(), np.uint8)[16 if size > 1 else 8 :]
        new = generator.integers(0, 255 if size > 1 else 10, extra * size).astype(np.uint8)
        both = np.concatenate([old, new])
        write_idx(path, both.reshape(-1, 12, 8) if size > 1 else both)
    return directory


@pytest.fixture
def out(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def grown(idx_dir, tmp_path):
    return grown_idx(tmp_path / "grown", idx_dir)


def files_untouched(before, directory) -> bool:
    after = outputs_of(directory)
    return all(after[name] == data for name, data in before.items() if name not in DESCRIPTIONS)


def test_new_records_are_added_and_old_files_stay(idx_dir, out, grown):
    before, old = outputs_of(out), records_in(out)
    old_id = json.loads(before["manifest.json"])["dataset_id"]
    manifest = make_shards(f"idx:{grown}", out, append=True, num_shards=2)
    assert manifest["last_append"] == {"read": 410, "written": 60, "quarantined": 0, "there": 350}
    assert manifest["records"] == {"read": 410, "written": 410, "quarantined": 0}
    assert manifest["dataset_id"] != old_id
    assert files_untouched(before, out)
    assert (out / "manifest.json.previous").read_bytes() == before["manifest.json"]
    assert set(outputs_of(out)) - set(before) - {"manifest.json.previous"} == {
        name
        for split in ("train", "validation")
        for shard in (4, 5)
        for name in (
            f"blobs-{split}.tfrecord-{shard:05d}-of-00004",
            f"index/blobs-{split}-{shard:05d}-of-00004.npy",
        )
    }
    # The same records in the same splits as a set made at once.
    make_shards(f"idx:{grown}", out.parent / "at-once")
    assert records_in(out) == records_in(out.parent / "at-once")
    assert old["test"] == records_in(out)["test"]
    statistics = [
        json.loads((d / "statistics.json").read_text()) for d in (out, out.parent / "at-once")
    ]
    assert statistics[0] == statistics[1]
    assert run_command("pipeline.verify", out).returncode == 0


def test_other_readers_see_all_of_it(out, grown):
    import tensorflow_datasets as tfds

    make_shards(f"idx:{grown}", out, append=True, num_shards=2)
    builder = tfds.builder_from_directory(str(out))
    dataset = reader.Dataset(str(out))
    in_order = tfds.ReadConfig(interleave_cycle_length=1)
    for split in dataset.splits:
        read = builder.as_dataset(split=split, read_config=in_order)
        images = [example["image"] for example in tfds.as_numpy(read)]
        np.testing.assert_array_equal(images, dataset.read_images(split))


def test_the_bytes_do_not_depend_on_the_workers(out, grown, tmp_path):
    shutil.copytree(out, tmp_path / "other")
    make_shards(f"idx:{grown}", out, append=True, num_shards=2)
    workers = ["--direct_num_workers=2"]
    make_shards(f"idx:{grown}", tmp_path / "other", append=True, num_shards=2, beam_args=workers)
    assert outputs_of(out) == outputs_of(tmp_path / "other")


def test_a_second_time_there_is_nothing_to_append(idx_dir, out, grown):
    for source in (idx_dir, grown):
        make_shards(f"idx:{source}", out, append=True)
        before = outputs_of(out)
        again = make_shards(f"idx:{source}", out, append=True)
        assert again["reused"] is True
        assert outputs_of(out) == before
    # A subset of the data set, from other files.
    subset = make_idx_set(out.parent / "subset")
    for path in subset.glob("train-*"):
        path.unlink()
    assert make_shards(f"idx:{subset}", out, append=True)["reused"] is True
    assert outputs_of(out) == before
    assert not (out / ".progress").exists()


def test_appended_again_and_again(out, grown, tmp_path):
    make_shards(f"idx:{grown}", out, append=True, num_shards=2)
    before = outputs_of(out)
    more = grown_idx(tmp_path / "more", grown, extra=90)
    manifest = make_shards(f"idx:{more}", out, append=True, num_shards=1)
    assert manifest["last_append"]["written"] == 90
    assert files_untouched(before, out)
    assert "blobs-train.tfrecord-00006-of-00004" in outputs_of(out)
    make_shards(f"idx:{more}", tmp_path / "at-once")
    assert records_in(out) == records_in(tmp_path / "at-once")
    assert run_command("pipeline.verify", out).returncode == 0


def test_an_id_with_other_content_is_refused_and_nothing_changes(idx_dir, out, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(idx_dir, other)
    data = bytearray((other / "t10k-labels-idx1-ubyte").read_bytes())
    data[-1] ^= 1
    (other / "t10k-labels-idx1-ubyte").write_bytes(bytes(data))
    before = outputs_of(out)
    with pytest.raises(
        StageError, match=r"the id 'test-0000049' is already in blobs-test.*test\[49\]"
    ):
        make_shards(f"idx:{other}", out, append=True)
    assert outputs_of(out) == before
    assert not (out / ".progress").exists()
    # With a prefix its ids are new ones.
    manifest = make_shards(f"idx:{other}", out, append=True, id_prefix="day2-")
    assert manifest["records"]["written"] == 700
    assert {record[0] for record in records_in(out)["test"]} >= {
        "test-0000049",
        "day2-test-0000049",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "created with other settings .seed is 0 there and 1 here"),
        ({"name": "other"}, "name is 'blobs' there"),
        ({"compression": "gzip"}, "compression is 'none' there"),
        ({"image_size": (6, 4)}, "expected the same shape: pass --image_size=12x8 --grayscale"),
    ],
)
def test_what_does_not_fit_is_refused(out, grown, settings, message):
    before = outputs_of(out)
    with pytest.raises(StageError, match=message):
        make_shards(f"idx:{grown}", out, append=True, **settings)
    assert outputs_of(out) == before


def test_other_classes_are_refused_and_named_ones_fit(idx_dir, grown, tmp_path):
    out, names = tmp_path / "named", tuple("abcdefghij")
    make_shards(f"idx:{idx_dir}", out, class_names=names)
    with pytest.raises(
        StageError, match="the classes are 0, 1, .* pass the data set's names by --class_names=@"
    ):
        make_shards(f"idx:{grown}", out, append=True)
    manifest = make_shards(f"idx:{grown}", out, append=True, class_names=names)
    assert manifest["class_names"] == list(names)


def test_more_shards_than_new_records_are_as_many_as_these(out, grown):
    manifest = make_shards(f"idx:{grown}", out, append=True, num_shards=61)
    assert manifest["last_append"]["written"] == 60
    assert run_command("pipeline.verify", out).returncode == 0


def test_only_a_finished_and_whole_set_grows(out, grown, tmp_path):
    with pytest.raises(StageError, match="no such directory"):
        make_shards(f"idx:{grown}", tmp_path / "none", append=True)
    (out / "blobs-test.tfrecord-00001-of-00004").unlink()
    (grown / "t10k-images-idx3-ubyte").unlink()
    (grown / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(StageError, match="missing or damaged: blobs-test.tfrecord-00001-of"):
        make_shards(f"idx:{grown}", out, append=True)


def test_old_shards_are_not_read_and_verify_finds_their_damage(out, grown):
    path = out / "blobs-test.tfrecord-00001-of-00004"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(bytes(data))
    make_shards(f"idx:{grown}", out, append=True)
    done = run_command("pipeline.verify", out, check=False)
    assert done.returncode == 1 and "blobs-test.tfrecord-00001-of-00004" in done.stdout
    make_shards(f"idx:{grown}", out, append=True, reread=True)
    assert run_command("pipeline.verify", out).returncode == 0


def test_a_source_that_changes_under_an_append_leaves_the_set_as_it_was(tmp_path, when_written):
    folder, out = make_folder_set(tmp_path / "set", num_train=30, num_test=6), tmp_path / "out"
    make_shards(f"folder:{folder}", out, num_shards=1)
    before = (out / "manifest.json").read_bytes()
    path = folder / "train" / "class 1" / "new.png"
    shutil.copy(next(folder.rglob("*.png")), path)
    data = path.read_bytes()
    when_written("statistics.json", lambda: path.write_bytes(data + b"x"))
    with pytest.raises(
        SourceChanged, match="train/class 1/new.png was changed since the job began"
    ):
        make_shards(f"folder:{folder}", out, append=True, num_shards=None)
    assert (out / "manifest.json").read_bytes() == before
    path.write_bytes(data)
    manifest = make_shards(f"folder:{folder}", out, append=True, num_shards=None)
    assert manifest["records"]["written"] == 37
    assert run_command("pipeline.verify", out).returncode == 0


def test_a_new_class_keeps_the_numbers_of_the_old_ones(tmp_path):
    first = make_folder_set(tmp_path / "set", num_train=40, num_test=10)
    out = tmp_path / "out"
    make_shards(f"folder:{first}", out, num_shards=1)
    old = records_in(out)
    path = first / "train" / "aardvark" / "1.png"
    path.parent.mkdir()
    shutil.copy(next(first.rglob("*.png")), path)
    manifest = make_shards(f"folder:{first}", out, append=True, num_shards=None)
    assert manifest["class_names"] == [f"class {label}" for label in range(10)] + ["aardvark"]
    [added] = {r for split in records_in(out).values() for r in split} - {
        r for split in old.values() for r in split
    }
    assert (added[0], added[2]) == ("train/aardvark/1.png", 10)


def test_what_was_quarantined_is_not_quarantined_twice_and_is_added_once_it_is_mended(tmp_path):
    folder = make_folder_set(tmp_path / "set", num_train=40, num_test=10)
    bad = sorted(folder.rglob("*.png"))[7]
    good = bad.read_bytes()
    bad.write_bytes(b"none")
    out = tmp_path / "out"
    make_shards(f"folder:{folder}", out, num_shards=1, max_quarantined="1")
    before = outputs_of(out)
    (bad.parent / "extra.txt").write_text("no image")
    settings = {"append": True, "num_shards": None, "max_quarantined": "1"}
    assert make_shards(f"folder:{folder}", out, **settings)["reused"] is True
    shutil.copy(sorted(folder.rglob("*.png"))[0], bad.parent / "new.png")
    manifest = make_shards(f"folder:{folder}", out, **settings)
    counts = {"read": 51, "written": 1, "quarantined": 0, "there": 50}
    assert manifest["last_append"] == {**counts, "ignored": {".txt": 1}}
    assert manifest["records"] == {"read": 51, "written": 50, "quarantined": 1}
    assert files_untouched(before, out)
    bad.write_bytes(good)
    manifest = make_shards(f"folder:{folder}", out, **settings)
    assert manifest["last_append"]["written"] == 1
    assert run_command("pipeline.verify", out).returncode == 0


def command(grown, out, *more):
    return (
        "pipeline.preprocess",
        f"--source=idx:{grown}",
        f"--output_dir={out}",
        "--name=blobs",
        "--num_shards=2",
        "--append",
        *more,
    )


@pytest.mark.parametrize("file_number", [1, 3, 8, 9, 11, 14, 17, 19, 20, 21, 22])
def test_killed_at_any_file_it_stays_the_old_set_and_the_rerun_completes(
    out, grown, tmp_path, file_number
):
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    make_shards(f"idx:{grown}", whole, append=True, num_shards=2)
    before = outputs_of(out)
    die_at_file(file_number, *command(grown, out))
    assert files_untouched(before, out)
    assert (out / "manifest.json").read_bytes() == before["manifest.json"]
    assert records_in(out)  # It reads as the set that it was.
    problems = list(verification.verify(str(out))[1])
    assert len(problems) <= 1 and all(problem.is_unfinished_append for problem in problems), (
        problems
    )
    make_shards(f"idx:{grown}", out, append=True, num_shards=2)
    assert outputs_of(out) == outputs_of(whole)


def test_an_unfinished_append_is_finished_or_undone(idx_dir, data_dir, out, grown, tmp_path):
    die_at_file(14, *command(grown, out))
    assert (out / ".progress").exists()
    # The set that it was is finished, and says so, whatever has been begun.
    assert make_shards(f"idx:{idx_dir}", out)["reused"] is True
    assert (out / ".progress").exists()
    more = grown_idx(tmp_path / "more", grown, extra=90)
    with pytest.raises(StageError, match="holds an unfinished --append or removal of other inputs"):
        make_shards(f"idx:{more}", out, append=True, num_shards=1)
    make_shards(f"idx:{more}", out, append=True, num_shards=1, overwrite=True)
    shutil.copytree(data_dir, tmp_path / "fresh")
    make_shards(f"idx:{more}", tmp_path / "fresh", append=True, num_shards=1)
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


def test_an_append_that_was_killed_is_named_by_verify_and_undone_on_request(
    idx_dir, data_dir, out, grown
):
    die_at_file(14, *command(grown, out))
    assert list(out.glob("*-00004-of-00004"))
    done = run_command("pipeline.verify", out, check=False)
    assert done.returncode == 1
    [line] = done.stdout.splitlines()
    assert (
        "an --append or a removal did not finish: run the same command again to finish it, or undo"
        in line
    )
    assert make_shards(f"idx:{idx_dir}", out, append=True, overwrite=True)["reused"] is True
    assert outputs_of(out) == outputs_of(data_dir)
    assert run_command("pipeline.verify", out).returncode == 0


def test_what_an_unfinished_append_has_begun_to_describe_is_no_damage(out, grown):
    die_at_file(24, *command(grown, out))
    done = run_command("pipeline.verify", out, check=False)
    [line] = done.stdout.splitlines()
    assert "did not finish, and has already rewritten statistics.json, stats.html" in line
    assert (
        ": run the same command again to finish it; all other files of the data set are un" in line
    )
    assert "1 fault in 350 records" in done.stderr
    assert "expected none: finish the append or the removal\n" in done.stderr
    # What the append leaves alone is damaged beside it.
    shard = out / "blobs-test.tfrecord-00001-of-00004"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    done = run_command("pipeline.verify", out, check=False)
    assert f"{shard}: {len(whole) - 1} bytes, expected {len(whole)}\n" in done.stdout
    assert "append the source of lost records with --append --reread" in done.stderr
    shard.write_bytes(whole)
    make_shards(f"idx:{grown}", out, append=True, num_shards=2)
    assert not list(verification.verify(str(out))[1])


def test_what_describes_a_grown_set_is_checked_too(out, grown):
    make_shards(f"idx:{grown}", out, append=True, num_shards=2)
    before = outputs_of(out)
    for name in ("stats.html", "dataset_info.json", "croissant.json"):
        (out / name).write_bytes(before[name][:-1] + b"x")
        make_shards(f"idx:{grown}", out, append=True, num_shards=2)
        assert outputs_of(out) == before
    (out / "blobs-train.tfrecord-00001-of-00004").unlink()
    done = run_command("pipeline.verify", out, check=False)
    assert "append the source of lost records with --append --reread" in done.stderr


def test_overwrite_takes_what_an_unfinished_append_wrote_along(out, grown, tmp_path):
    die_at_file(17, *command(grown, out))
    make_shards(f"idx:{grown}", out, num_shards=3, overwrite=True)
    make_shards(f"idx:{grown}", tmp_path / "fresh", num_shards=3)
    assert outputs_of(out) == outputs_of(tmp_path / "fresh")


def test_it_works_on_a_url(out, grown, tmp_path):
    import fsspec

    url = f"memory://{tmp_path.name}/out"
    fs = fsspec.filesystem("memory")
    (out / ".lock").unlink()  # On a store, a lease of this name would be waited for.
    fs.put(str(out), url, recursive=True)
    make_shards(f"idx:{grown}", url, append=True, num_shards=2)
    make_shards(f"idx:{grown}", out, append=True, num_shards=2)
    fs.get(url, str(tmp_path / "copy"), recursive=True)
    assert outputs_of(tmp_path / "copy") == outputs_of(out)


@pytest.mark.parametrize("seed", range(3))
def test_grown_in_any_steps_it_is_the_set_made_at_once(tmp_path, seed):
    """But for the shards its records lie in: records, splits, statistics, duplicates."""
    generator = random.Random(seed)
    source = make_idx_set(
        tmp_path / "0", num_train=generator.randint(1, 80), num_test=generator.randint(1, 20)
    )
    settings = {
        "validation_fraction": 0.3,
        "compression": generator.choice(["none", "gzip"]),
        "num_shards": generator.choice([1, None]),
    }
    make_shards(f"idx:{source}", tmp_path / "grown", **settings)
    for step in range(1, 4):
        source = grown_idx(tmp_path / str(step), source, extra=generator.randint(1, 30))
        make_shards(f"idx:{source}", tmp_path / "grown", append=True, **settings)
        assert run_command("pipeline.verify", tmp_path / "grown").returncode == 0
    make_shards(f"idx:{source}", tmp_path / "at-once", **settings)
    grown, at_once = tmp_path / "grown", tmp_path / "at-once"
    assert records_in(grown) == records_in(at_once)
    for name in ("statistics.json", "duplicates.jsonl"):
        assert (grown / name).read_bytes() == (at_once / name).read_bytes()
