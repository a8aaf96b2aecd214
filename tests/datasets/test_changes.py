"""Records that come again otherwise, that are removed, and that are gone from their source."""

import json
import os
import random
import shutil

import numpy as np
import pytest

from pipeline.cli.errors import StageError
from pipeline.datasets import index, placement, reader
from pipeline.datasets.building import removal
from pipeline.runners import options as beam_options
from tests.conftest import die_at_file, make_embeddings, make_idx_set, make_shards, outputs_of
from tests.forked import run_command
from tests.sources.test_sources import records_in


def arrays(num_records: int, seed: int = 0):
    """Images with some equal ones, and labels, of one split."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_records, 6, 5), np.uint8)
    images[num_records // 2 :: 7] = images[3]
    return images, np.arange(num_records) % 4


def save(path, images, labels) -> str:
    np.savez(path, x_train=images, y_train=labels)
    os.utime(path, (1e9, 1e9))  # As a file that was written some time ago, which is trusted.
    return f"npz:{path}"


def remove(directory, ids):
    return removal.remove_records(
        str(directory), ids, overwrite=False, options=beam_options.parse_options([])
    )


def described(directory) -> dict[str, object]:
    """What describes the records of a set, whatever its shards."""
    statistics = json.loads((directory / "statistics.json").read_text())
    lines = (directory / "duplicates.jsonl").read_text()
    sums = {
        path.name: path.read_bytes() for path in sorted((directory / "index").glob("statistics-*"))
    }
    return {"statistics": statistics, "duplicates": lines, "sums": sums}


def same_sets(directory, other) -> bool:
    assert run_command("pipeline.verify", directory).returncode == 0
    assert records_in(directory) == records_in(other)
    assert described(directory) == described(other)
    return True


@pytest.fixture
def out(tmp_path):
    make_shards(save(tmp_path / "a.npz", *arrays(120)), tmp_path / "out", num_shards=3)
    return tmp_path / "out"


def test_an_index_holds_every_record_of_its_shard(out):
    dataset = reader.Dataset(str(out))
    indexes = index.Indexes(str(out), dataset.manifest["files"])
    assert len(indexes.shards) == 6
    for shard in indexes.shards:
        rows, read = indexes[shard].rows, dataset.read_shard(shard)
        ids = [record_id.encode() for record_id in read.ids]
        assert (rows["id"] == placement.id_hashes(0, ids)).all()
        assert (rows["image"] == index.image_hashes(read.images)).all()
        assert (rows["label"] == read.labels).all()
        flat = read.images.reshape(len(ids), -1)
        assert (rows["lowest"] == flat.min(axis=1)).all()
        assert (rows["highest"] == flat.max(axis=1)).all()
        assert reader.read_ids(str(out), shard, rows["offset"]) == read.ids
        assert (np.diff(rows["id"][:, 1].astype(np.float64)) >= 0).all()


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_a_set_with_replaced_records_equals_one_made_of_the_new_ones(tmp_path, compression):
    images, labels = arrays(120)
    settings = {"num_shards": 3, "compression": compression}
    out = tmp_path / "out"
    make_shards(save(tmp_path / "a.npz", images, labels), out, **settings)
    before = outputs_of(out)
    new_images, new_labels = arrays(150)
    new_images[[5, 17]] = 255 - images[[5, 17]]
    new_images[40] = images[41]  # A new pair of equal images.
    new_labels[60] += 1
    changed = save(tmp_path / "b.npz", new_images, new_labels)
    settings |= {"append": True, "num_shards": 1}
    with pytest.raises(StageError, match=r"train-0000005.*; [0-9]+ more records differ"):
        make_shards(changed, out, **settings)
    assert outputs_of(out) == before
    # Records 60 to 74 differ too: the equal images begin at 75.
    manifest = make_shards(changed, tmp_path / "copy", **{**settings, "append": False})
    shutil.copytree(out, tmp_path / "kept")
    manifest = make_shards(changed, tmp_path / "kept", on_changed="keep", **settings)
    num_changed = manifest["last_append"]["changed"]
    assert num_changed >= 4 and manifest["last_append"]["written"] == 30
    # A kept record is compared again in each run, and counted again.
    manifest = make_shards(changed, out, on_changed="replace", **settings)
    assert manifest["last_append"]["written"] == 30 + num_changed
    assert manifest["records"] == {"read": 150, "written": 150, "quarantined": 0}
    assert same_sets(out, tmp_path / "copy")
    assert make_shards(changed, out, on_changed="replace", **settings)["reused"] is True
    # The old source would change these records back; it is not taken for known.
    with pytest.raises(StageError, match="train-0000005"):
        make_shards(f"npz:{tmp_path}/a.npz", out, **settings)


def test_removed_records_are_gone_and_stay_out(out, tmp_path):
    import tensorflow_datasets as tfds

    images, labels = arrays(120)
    numbers = [3, 5, 60, 61, 80]
    ids = [f"train-{number:07d}" for number in numbers]
    old_id = json.loads((out / "manifest.json").read_text())["dataset_id"]
    manifest = remove(out, ids)
    assert manifest["num_removed"] == 5 and manifest["dataset_id"] != old_id
    assert run_command("pipeline.verify", out).returncode == 0
    records = {record for split in records_in(out).values() for record in split}
    assert len(records) == 115 and not {record[0] for record in records} & set(ids)
    assert remove(out, ids)["reused"] is True
    # The same source brings them back no more, and other records come.
    source = save(tmp_path / "b.npz", *arrays(130))
    settings = {"append": True, "num_shards": 1, "on_changed": "keep"}
    make_shards(source, out, **settings)
    assert len([r for split in records_in(out).values() for r in split]) == 125
    builder = tfds.builder_from_directory(str(out))
    for split in reader.Dataset(str(out)).splits:
        assert builder.info.splits[split].num_examples == len(records_in(out)[split])
        read = [e["id"] for e in tfds.as_numpy(builder.as_dataset(split=split))]
        assert len(read) == len(records_in(out)[split])


def test_a_set_after_a_removal_equals_one_made_without(tmp_path):
    """In records, statistics and duplicates: for any draw of records, twice in a row."""
    generator = random.Random(5)
    for seed in range(3):
        images, labels = arrays(90, seed)
        images[generator.randrange(90)] = 0  # The only black pixels, perhaps.
        out, fresh = tmp_path / f"out{seed}", tmp_path / f"fresh{seed}"
        path = tmp_path / f"{seed}.csv"
        header = "id,label," + ",".join(f"pixel{i}" for i in range(25)) + "\n"
        rows = [
            ",".join(map(str, [f"r{i}", labels[i], *images[i].ravel()[:25]])) + "\n"
            for i in range(90)
        ]
        path.write_text(header + "".join(rows))
        make_shards(f"csv:{path}", out, num_shards=2)
        gone = generator.sample(range(90), 20)
        for part in (gone[:12], gone[12:]):
            remove(out, [f"{_prefix(out)}r{i}" for i in part])
        path.write_text(header + "".join(r for i, r in enumerate(rows) if i not in gone))
        make_shards(f"csv:{path}", fresh, num_shards=2)
        assert same_sets(out, fresh)


def _prefix(directory) -> str:
    return next(iter(next(iter(records_in(directory).values()))))[0].partition("r")[0]


@pytest.mark.parametrize(
    "number", [2, 9, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 30))]
)
@pytest.mark.parametrize("job", ["remove", "replace"])
def test_killed_anywhere_the_set_is_the_old_one_or_the_new_one(out, tmp_path, job, number):
    images, labels = arrays(120)
    if job == "remove":
        (tmp_path / "ids").write_text("train-0000003\ntrain-0000060\ntrain-0000090\n")
        command = ["pipeline.remove", f"--data_dir={out}", f"--ids={tmp_path}/ids"]
    else:
        images[[3, 60]] = 7
        source = save(tmp_path / "b.npz", images, labels)
        command = ["pipeline.preprocess", f"--source={source}", f"--output_dir={out}"]
        command += ["--name=blobs", "--append", "--num_shards=1", "--on_changed=replace"]
    shutil.copytree(out, tmp_path / "undisturbed")
    other = [part.replace(str(out), f"{tmp_path}/undisturbed") for part in command]
    run_command(*other)
    old = json.loads((out / "manifest.json").read_text())
    try:
        die_at_file(number, *command)
    except AssertionError:  # Fewer files are written.
        assert number > 9
    manifest = json.loads((out / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry.get("num_examples"):
            assert (out / entry["name"]).stat().st_size == entry["bytes"]
    if manifest == old:
        assert reader.Dataset(str(out)).read_images("train").shape[0] > 0
    run_command(*command)
    left, right = outputs_of(out), outputs_of(tmp_path / "undisturbed")
    assert left == right
    assert not (out / ".progress").exists()


@pytest.mark.parametrize("damage", ["gone", "cut", "of another shard", "bit", "older version"])
def test_an_index_that_does_not_fit_is_made_anew(out, tmp_path, damage, capfd):
    shutil.copytree(out, tmp_path / "whole")
    paths = sorted((out / "index").glob("*-train-*"))
    if damage == "older version":
        from pipeline.stages import manifest as manifest_lib

        manifest = manifest_lib.read_sealed(str(out / "manifest.json"))
        manifest["files"] = [e for e in manifest["files"] if "index/" not in e["name"]]
        (out / "manifest.json").write_bytes(manifest_lib.sealed_json(manifest))
        shutil.rmtree(out / "index")
    elif damage == "gone":
        paths[0].unlink()
        (out / "index" / "statistics-train.npz").unlink()
    elif damage == "cut":
        paths[0].write_bytes(paths[0].read_bytes()[:-7])
        (out / "duplicates.jsonl").write_bytes(b"")
    elif damage == "of another shard":
        shutil.copy(paths[1], paths[0])
    else:
        data = bytearray(paths[0].read_bytes())
        data[-1] ^= 1
        paths[0].write_bytes(bytes(data))
    source = save(tmp_path / "b.npz", *arrays(130))
    for directory in (out, tmp_path / "whole"):
        make_shards(source, directory, append=True, num_shards=1, on_changed="keep")
    assert "makes what is missing or damaged" in capfd.readouterr().err
    left, right = outputs_of(out), outputs_of(tmp_path / "whole")
    if damage == "older version":  # The files stand in another order.
        for outputs in (left, right):
            del outputs["manifest.json.previous"]
            manifest = json.loads(outputs.pop("manifest.json"))
            outputs["files"] = sorted(entry["name"] for entry in manifest["files"])
    assert left == right
    assert run_command("pipeline.verify", out).returncode == 0


def test_records_that_are_gone_from_a_source_are_named(tmp_path, capfd):
    from tests.conftest import make_folder_set

    folder, out = make_folder_set(tmp_path / "set", num_train=30, num_test=6), tmp_path / "out"
    make_shards(f"folder:{folder}", out, num_shards=1)
    gone = sorted((folder / "train").rglob("*.png"))[:3]
    for path in gone:
        path.unlink()
    for _ in range(2):  # Each night says so, until the records are removed.
        make_shards(f"folder:{folder}", out, append=True, num_shards=None)
        text = capfd.readouterr().err
        assert "the source has lost 3 records that the data set holds" in text
    [path] = (out / "index").glob("source-*.gone.txt")
    ids = path.read_text().splitlines()
    assert ids == sorted(str(p.relative_to(folder)) for p in gone)
    assert len([r for split in records_in(out).values() for r in split]) == 36
    remove(out, ids)
    make_shards(f"folder:{folder}", out, append=True, num_shards=None)
    assert "has lost" not in capfd.readouterr().err
    assert not list((out / "index").glob("source-*.gone.txt"))


def test_a_growing_folder_is_read_where_it_has_changed(tmp_path):
    """Of a folder that grows, only new and changed files are opened, in a process of its own."""
    from tests.conftest import make_folder_set

    folder, out = make_folder_set(tmp_path / "set", num_train=200, num_test=40), tmp_path / "out"
    for path in folder.rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    make_shards(f"folder:{folder}", out, num_shards=1)
    first = sorted(folder.rglob("*.png"))
    for number in range(5):
        shutil.copy(first[number], new := first[number].with_name(f"new{number}.png"))
        os.utime(new, (1e9, 1e9))
    first[0].write_bytes(first[1].read_bytes())
    os.utime(first[0], (1e9 + 1, 1e9 + 1))  # A file of the last two seconds would be read again.
    command = ["tests.faults.list_opened", tmp_path / "opened", "pipeline.preprocess"]
    command += [f"--source=folder:{folder}", f"--output_dir={out}", "--name=blobs", "--append"]
    command += ["--num_shards=1"]
    done = run_command(*command, "--on_changed=keep")
    assert "1 records have another image or label" in done.stderr
    opened = {line for line in (tmp_path / "opened").read_text().splitlines() if ".png" in line}
    assert len(opened) == 6, opened
    assert len([r for split in records_in(out).values() for r in split]) == 245
    # The changed record is compared again each night, and nothing else.
    (tmp_path / "opened").unlink()
    done = run_command(*command, "--on_changed=keep")
    assert "1 records have another image or label" in done.stderr
    opened = {line for line in (tmp_path / "opened").read_text().splitlines() if ".png" in line}
    assert opened == {str(first[0])}
    done = run_command(*command, "--on_changed=replace")
    assert records_in(out) and "1 replace others of the same id" in done.stderr
    (tmp_path / "opened").unlink()
    run_command(*command)
    opened = (tmp_path / "opened").read_text().splitlines()
    assert not any(".png" in line for line in opened)
    # Of a shard the ends are looked at, once; no shard is read.
    shards = [line for line in opened if ".tfrecord-" in line]
    assert len(shards) == len(set(shards)) == len(list(out.glob("*.tfrecord-*")))
    run_command(*command, "--reread")
    opened = {line for line in (tmp_path / "opened").read_text().splitlines() if ".png" in line}
    assert len(opened) == 245


def test_a_reader_whose_shard_is_gone_says_what_has_happened(out):
    dataset = reader.Dataset(str(out))
    remove(out, ["train-0000003"])
    gone = [entry for entry in dataset.shards("train") if not (out / entry["name"]).exists()]
    with pytest.raises(StageError, match="records were removed or replaced since this job"):
        dataset.read_shard(gone[0])


def test_an_export_takes_over_the_rows_of_a_rewritten_shard(data_dir, trained, tmp_path):
    data, model = tmp_path / "data", trained / "export"
    shutil.copytree(data_dir, data)
    settings = {"images": "none"}
    make_embeddings(data, model, tmp_path / "1", **settings)
    for record_id in ("test-0000003", "test-0000004"):  # Two removals between two nights.
        remove(data, [record_id])
    make_embeddings(data, model, tmp_path / "2", reuse_from=tmp_path / "1", **settings)
    timings = json.loads((tmp_path / "2" / "timings.json").read_text())
    done = timings["done"].values()
    assert sum(counts["computed"] for counts in done) == 0
    assert sum(counts["reused"] for counts in done) == 48
    assert timings["changes"]["removed"] == 2 and timings["changes"]["added"] == 0
    make_embeddings(data, model, tmp_path / "fresh", **settings)
    assert outputs_of(tmp_path / "2") == outputs_of(tmp_path / "fresh")


def test_a_list_of_lost_records_is_of_now(tmp_path, capfd):
    """Records that come back, that another source brings, and ids that are no line of a file."""
    from tests.conftest import make_folder_set

    folder, out = make_folder_set(tmp_path / "set", num_train=30, num_test=0), tmp_path / "out"
    paths = sorted(folder.rglob("*.png"))
    shutil.copy(paths[0], odd := paths[0].with_name("x\ny.png"))
    make_shards(f"folder:{folder}", out, num_shards=1)
    settings = {"append": True, "num_shards": None}

    text = ""

    def lost() -> list[str]:
        make_shards(f"folder:{folder}", out, **settings)
        nonlocal text
        text = capfd.readouterr().err
        return [line for p in (out / "index").glob("*.gone*") for line in p.read_text().split("\n")]

    data = paths[5].read_bytes()
    paths[5].unlink()
    odd.unlink()
    assert lost() == [str(paths[5].relative_to(folder)), ""]
    paths[5].write_bytes(data)  # The source is as it was, but for the odd name.
    assert lost() == [] and "has lost 1 record" in text and "pipeline.remove" not in text
    shutil.copy(paths[0], odd)
    assert lost() == [] and "has lost" not in text
    # A removal of another record does not make the set forget the lost ones.
    paths[5].unlink()
    assert len(lost()) == 2
    remove(out, [str(paths[7].relative_to(folder))])
    assert len(lost()) == 2
    # Another source still brings the record.
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / paths[5].relative_to(folder)).write_bytes(data)
    make_shards(f"folder:{tmp_path / 'other'}", out, **settings)
    assert lost() == []


def test_an_older_copy_of_a_set_does_not_trust_a_newer_memory(out, tmp_path):
    shutil.copytree(out, tmp_path / "copy")
    images, labels = arrays(120)
    images[3] = 7
    source = save(tmp_path / "b.npz", images, labels)
    settings = {"append": True, "num_shards": 1, "on_changed": "replace"}
    make_shards(source, out, **settings)
    for path in (tmp_path / "copy").rglob("*"):  # The files of the manifest come back.
        if path.is_file():
            shutil.copy(path, out / path.relative_to(tmp_path / "copy"))
    for name in set(outputs_of(out)) - set(outputs_of(tmp_path / "copy")):
        (out / name).unlink()
    manifest = make_shards(source, out, **settings)
    assert manifest["last_append"]["written"] >= 1
    make_shards(source, tmp_path / "fresh", num_shards=1)
    assert same_sets(out, tmp_path / "fresh")


def test_a_finished_removal_that_was_killed_is_completed_by_any_later_job(out, tmp_path):
    (tmp_path / "ids").write_text("train-0000003\ntrain-0000060\n")
    shards = set(out.glob("*.tfrecord-*"))
    command = ["pipeline.remove", f"--data_dir={out}", f"--ids={tmp_path}/ids"]
    run_command("tests.faults.die_at_removal", 3, *command, check=False)  # The first after it.
    assert json.loads((out / "manifest.json").read_text())["made_from"].get("removed-0001")
    assert shards < set(out.glob("*.tfrecord-*"))  # The old ones are there.
    source = save(tmp_path / "b.npz", *arrays(130))
    make_shards(source, out, append=True, num_shards=1, on_changed="keep", overwrite=True)
    done = run_command("pipeline.verify", f"--absent={tmp_path}/ids", out, check=False)
    assert done.returncode == 0, done.stdout
    assert run_command("pipeline.verify", out).returncode == 0


@pytest.mark.parametrize("lost", ["source-*", "source-*.memory"])
def test_a_kill_after_the_manifest_costs_no_memory_of_the_source(tmp_path, lost):
    source, out = f"idx:{make_idx_set(tmp_path / 'set')}", tmp_path / "out"
    make_shards(source, out)
    before = {path.name: path.read_bytes() for path in (out / "index").iterdir()}
    for path in (out / "index").glob(lost):
        path.unlink()
    make_shards(source, out)
    assert {path.name: path.read_bytes() for path in (out / "index").iterdir()} == before
