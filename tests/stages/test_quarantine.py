"""No record is lost: what is not in the output is in quarantine, with its place and its reason."""

import json
import re
import shutil

import numpy as np
import pytest

from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import reader
from pipeline.stages import quarantine
from tests.conftest import (
    blobs,
    make_embeddings,
    make_folder_set,
    make_shards,
    outputs_of,
    smoke_config,
    write_csv,
)
from tests.datasets.test_reader import damage_one_record
from tests.forked import run_command


def faults_in(directory) -> dict[str, dict]:
    """id (or place) -> fault, of all files in quarantine."""
    lines = [
        json.loads(line)
        for path in sorted(directory.glob("quarantine/*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return {line.get("id", line["where"]): line for line in lines}


def accounted_for(manifest, out, num_read: int) -> bool:
    records = manifest["records"]
    whole = reader.Dataset(str(out))
    in_shards = sum(len(whole.read_images(split)) for split in whole.splits)
    return (
        records["read"] == num_read == records["written"] + records["quarantined"]
        and records["written"] == in_shards
        and records["quarantined"] == len(faults_in(out))
    )


@pytest.fixture
def folder(tmp_path):
    """A folder of 70 images, seven of them bad in seven ways."""
    from PIL import Image

    directory = make_folder_set(tmp_path / "set", num_train=60, num_test=10)
    paths = sorted((directory / "train").rglob("*.png"))
    whole = paths[0].read_bytes()
    paths[0].write_bytes(b"")
    paths[1].write_bytes(whole[: len(whole) // 2])
    paths[2].write_bytes(b"GIF89a but no more")
    Image.new("L", (9, 12)).save(paths[3])
    Image.new("RGB", (8, 12)).save(paths[4])
    Image.new("RGBA", (8, 12), (1, 2, 3, 0)).save(paths[5])
    Image.new("F", (8, 12)).save(paths[6], "TIFF")
    (directory / "train" / "stray.png").write_bytes(whole)
    return directory


REASONS = [
    "0 bytes that are no image",
    "a damaged image",
    "no image",
    r"is 12×9×1, expected 12×8×1; --image_size scales",
    r"is 12×8×3, expected 12×8×1; --grayscale makes",
    "transparent",
    "is a TIFF, which is not read unless asked for; .* set --allow_tiff",
]


def test_every_bad_image_is_named_with_its_reason(folder, tmp_path):
    out = tmp_path / "out"
    manifest = make_shards(f"folder:{folder}", out, max_quarantined="8")
    assert accounted_for(manifest, out, 71)
    faults = faults_in(out)
    paths = sorted((folder / "train").rglob("*/*.png"))
    for path, reason in zip(paths, REASONS, strict=False):
        fault = faults[str(path.relative_to(folder))]
        assert fault["where"] == str(path)
        assert re.search(reason, fault["reason"]), fault
    assert "lies in no class directory" in faults["train/stray.png"]["reason"]
    statistics = json.loads((out / "statistics.json").read_text())
    assert sum(part["num_quarantined"] for part in statistics["splits"].values()) == 8
    assert sum(statistics["quarantined"].values()) == 8
    assert "8 quarantined" in (out / "stats.html").read_text()


def test_what_can_be_converted_is_not_quarantined(folder, tmp_path):
    out = tmp_path / "out"
    manifest = make_shards(
        f"folder:{folder}", out, max_quarantined="6", image_size=(6, 4), grayscale=True
    )
    assert manifest["image_shape"] == [6, 4, 1]
    assert manifest["records"] == {"read": 71, "written": 65, "quarantined": 6}
    assert accounted_for(manifest, out, 71)


@pytest.mark.parametrize("limit", ["7", "9%", "0", "0.05", "0.1%"])
def test_too_many_are_a_failure_that_a_higher_limit_turns_into_a_set(folder, tmp_path, limit):
    out = tmp_path / "out"
    with pytest.raises(
        StageError, match=rf"8 of 71 .* --max_quarantined={limit} allows fewer .*png"
    ):
        make_shards(f"folder:{folder}", out, max_quarantined=limit)
    assert not (out / "manifest.json").exists()
    make_shards(f"folder:{folder}", out, max_quarantined="12%")
    timings = json.loads((out / "timings.json").read_text())
    assert timings["num_tasks_reused"] == timings["num_tasks"]
    make_shards(f"folder:{folder}", tmp_path / "at-once", max_quarantined="1.0")
    assert outputs_of(out) == outputs_of(tmp_path / "at-once")


@pytest.mark.parametrize("text", ["-1", "x", "", "101%", "1.5", "nan", "1e400", "٣%x"])
def test_limits_that_are_none(text):
    with pytest.raises(UsageError, match="expected a count of records such as 25"):
        quarantine.parse_limit(text)


@pytest.mark.parametrize(
    ("text", "num_records", "allowed"),
    [("0.1%", 200, 1), ("0.1%", 3_000, 3), ("0.5%", 500, 2), ("1e-9", 1, 1), ("0%", 200, 0)],
)
def test_a_share_above_0_allows_a_record_at_least(text, num_records, allowed):
    limit = quarantine.parse_limit(text)
    assert limit.allows(allowed, num_records)
    assert not limit.allows(allowed + 1, num_records)


def test_every_bad_row_of_a_csv_is_named_with_its_line(tmp_path):
    images, labels = blobs(size=(8, 8))["train"]
    path = write_csv(tmp_path / "set.csv", images, labels)
    lines = path.read_text().splitlines()
    bad = {
        3: lines[3] + ",1",
        7: "x" + lines[7],
        11: lines[11].rsplit(",", 1)[0] + ",256",
        12: lines[12].rsplit(",", 1)[0] + ",-1",
        13: lines[13].rsplit(",", 1)[0] + ",1.5",
        20: "just text",
        30: lines[30].replace(",", ";"),
        40: "99999999999999999999" + lines[40][1:],
    }
    for number, line in bad.items():
        lines[number] = line
    lines.insert(50, "")  # An empty line is no record, and the count of lines goes on.
    lines[60] = "," + lines[60]
    path.write_text("\n".join(lines))
    out = tmp_path / "out"
    manifest = make_shards(f"csv:{path}", out, max_quarantined="9")
    assert accounted_for(manifest, out, 300)
    found = {fault["where"]: fault["reason"] for fault in faults_in(out).values()}
    assert set(found) == {f"{path} line {number + 1}" for number in [*bad, 60]}
    assert found[f"{path} line 4"] == "66 columns, expected 65"
    assert found[f"{path} line 8"].startswith("label 'x")
    assert found[f"{path} line 12"] == "pixel 63 is '256', expected a whole number 0 to 255"
    assert found[f"{path} line 14"] == "pixel 63 is '1.5', expected a whole number 0 to 255"


@pytest.mark.parametrize("kind", ["sample", "idx", "npz"])
def test_sources_in_which_no_record_can_be_bad_lose_none(idx_dir, tmp_path, kind):
    (x, y), (u, v) = blobs().values()
    np.savez(tmp_path / "set.npz", x_train=x, y_train=y, x_test=u, y_test=v)
    spec, number = {
        "sample": ("sample", 10_000),
        "idx": (f"idx:{idx_dir}", 350),
        "npz": (f"npz:{tmp_path}/set.npz", 350),
    }[kind]
    manifest = make_shards(spec, tmp_path / "out")
    assert accounted_for(manifest, tmp_path / "out", number)


def test_an_id_that_stands_twice_is_an_error_that_names_both_places(tmp_path, monkeypatch):
    (tmp_path / "twice.py").write_text(
        "import numpy as np\n"
        "from pipeline.sources import ArraySource\n"
        "class Twice(ArraySource):\n"
        "    def ids(self, indices):\n"
        "        return [b'same' if i in (3, 17) else b'%d' % i for i in indices]\n"
        "def open_twice(rest):\n"
        "    return Twice({'train': (np.zeros((20, 4, 4, 1), np.uint8), np.arange(20))})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StageError, match=r"the id 'same' appears twice, at .*\[3\] and .*\[17\]"):
        make_shards("twice.open_twice:", tmp_path / "out")


# The stages that read shards.


@pytest.fixture
def damaged(data_dir, tmp_path):
    """A data set with one record damaged in train and one in test."""
    out = tmp_path / "data"
    shutil.copytree(data_dir, out)
    damage_one_record(out, "blobs-train.tfrecord-00001-of-00004")
    damage_one_record(out, "blobs-test.tfrecord-00002-of-00004")
    return out


def test_the_trainer_refuses_damage_and_goes_on_without_it_on_request(damaged, tmp_path):
    from trainer.runs import train

    workdir, config = tmp_path / "run", smoke_config(damaged)
    with pytest.raises(StageError, match="blobs-train.tfrecord-00001-of-00004: damaged"):
        train.train(config, workdir=str(workdir))
    limit = quarantine.parse_limit("1")
    with pytest.raises(StageError, match="2 of 350 records are unreadable, --max_quarantined=1"):
        train.train(config, workdir=str(workdir), on_corrupt="quarantine", max_quarantined=limit)
    settings = {"on_corrupt": "quarantine", "max_quarantined": quarantine.parse_limit("1%")}
    manifest = train.train(config, workdir=str(workdir), **settings)
    assert manifest["records"] == {"read": 350, "used": 348, "quarantined": 2}
    faults = faults_in(workdir)
    assert len(faults) == 2
    assert any("blobs-train.tfrecord-00001-of-00004 byte " in where for where in faults)
    # Another day, another damage: not the state to go on from.
    damage_one_record(damaged, "blobs-train.tfrecord-00003-of-00004")
    with pytest.raises(UsageError, match="holds the state of another run .quarantined"):
        train.train(config, workdir=str(workdir), **settings)


def test_a_whole_set_trains_the_same_whether_or_not_damage_would_be_borne(
    data_dir, trained, tmp_path
):
    from trainer.runs import train

    manifest = train.train(
        smoke_config(data_dir), workdir=str(tmp_path / "run"), on_corrupt="quarantine"
    )
    there = json.loads((trained / "export" / "manifest.json").read_text())
    assert manifest["model_id"] == there["model_id"]
    assert not (tmp_path / "run" / "quarantine").exists()


def test_export_refuses_damage_and_goes_on_without_it_on_request(damaged, trained, tmp_path):
    import pyarrow.parquet as pq

    model, out = trained / "export", tmp_path / "out"
    with pytest.raises(StageError, match="blobs-test.tfrecord-00002-of-00004: damaged"):
        make_embeddings(damaged, model, out)
    with pytest.raises(StageError, match="1 of 50 records are unreadable"):
        make_embeddings(damaged, model, out, on_corrupt="quarantine", max_quarantined="0%")
    settings = {"on_corrupt": "quarantine", "max_quarantined": "1"}
    manifest = make_embeddings(damaged, model, out, **settings)
    assert manifest["records"] == {"read": 50, "written": 49, "quarantined": 1}
    of_shard = manifest["shards"]["blobs-test.tfrecord-00002-of-00004"]
    assert (
        of_shard["read"] == of_shard["written"] + 1 == of_shard["written"] + of_shard["quarantined"]
    )
    assert sum(pq.read_metadata(path).num_rows for path in out.glob("embeddings/*.parquet")) == 49
    [fault] = faults_in(out).values()
    assert fault["where"].startswith(f"{damaged}/blobs-test.tfrecord-00002-of-00004 byte ")
    before = outputs_of(out)
    again = make_embeddings(damaged, model, out, **settings)
    assert again["reused"] is True
    assert not any(of_shard["computed"] for of_shard in again["done"].values())
    assert outputs_of(out) == before
    # Finished, it is finished without the flag, too.
    assert make_embeddings(damaged, model, out)["reused"] is True
    assert outputs_of(out) == before


def test_the_flags_reach_the_commands(damaged, trained, tmp_path):
    flags = ("--on_corrupt=quarantine", "--max_quarantined=1")
    done = run_command(
        "pipeline.export",
        f"--data_dir={damaged}",
        f"--model_dir={trained / 'export'}",
        f"--output_dir={tmp_path / 'out'}",
        "--noreport",
        *flags,
    )
    assert "50 read = 49 written + 1 quarantined" in done.stdout
    done = run_command(
        "trainer.main",
        "--config=configs/smoke.py",
        f"--config.data_dir={damaged}",
        f"--workdir={tmp_path / 'run'}",
        *flags,
        check=False,
    )
    assert done.returncode == 1
    assert "2 of 350 records are unreadable, --max_quarantined=1 allows fewer" in done.stderr
