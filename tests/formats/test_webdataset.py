import io
import json
import os
import tarfile

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.datasets import reader
from pipeline.formats import webdataset
from tests.conftest import make_embeddings
from tests.faults.hostile_source import IDS


@given(st.text(max_size=300))
def test_a_key_is_a_name_and_nothing_else(record_id):
    key = webdataset.key(record_id)
    assert key and not set(key) & set("/\\.\0 \n\t~:") and len(key.encode()) <= 200
    assert os.path.basename(os.path.normpath(f"/x/{key}.json")) == f"{key}.json"


@given(st.lists(st.text(max_size=300), unique=True, max_size=8))
def test_keys_of_different_ids_differ(ids):
    ids = list({*ids, *map(webdataset.key, ids)})
    by_key = {}
    for record_id in ids:
        by_key.setdefault(webdataset.key(record_id), []).append(record_id)
    for same in by_key.values():
        assert len(same) == 1, same


def test_usual_ids_are_their_own_keys():
    assert webdataset.key("test-0001234") == "test-0001234"
    assert webdataset.key("day2-class_7") == "day2-class_7"
    assert webdataset.key("train/cat/1.png") == "train%2Fcat%2F1%2Epng"


def test_no_member_leaves_the_directory_whatever_an_id_holds(trained, tmp_path):
    out = tmp_path / "deep" / "er" / "out"
    manifest = make_embeddings(
        "tests.faults.hostile_source.open_hostile:x",
        trained / "export",
        out,
        images="all",
        num_shards=2,
    )
    assert manifest["records"] == {"read": len(IDS), "written": len(IDS), "quarantined": 0}
    unpacked, ids = tmp_path / "deep" / "unpacked", []
    for path in sorted(out.glob("images/*.tar")):
        with tarfile.open(path) as tar:
            assert all(member.isfile() and "/" not in member.name for member in tar)
            tar.extractall(unpacked, filter="fully_trusted")
    for path in sorted(unpacked.iterdir()):
        if path.suffix == ".json":
            about = json.loads(path.read_text())
            ids.append(about["id"])
            assert path.name == f"{webdataset.key(about['id'])}.json"
    assert sorted(ids) == sorted(IDS)
    assert len(list(unpacked.iterdir())) == 3 * len(IDS)
    # Nothing beside the two directories, nor above them.
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["er", "unpacked"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]
    assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["out"]


def test_an_archive_holds_every_record_and_its_pictures(data_dir, trained, tmp_path):
    make_embeddings(data_dir, trained / "export", tmp_path / "a", images="all")
    make_embeddings(data_dir, trained / "export", tmp_path / "b", images="all")
    dataset = reader.Dataset(str(data_dir))
    for entry in dataset.shards("test"):
        shard = dataset.read_shard(entry)
        name = f"images/{entry['name'].replace('.tfrecord', '')}.tar"
        data = (tmp_path / "a" / name).read_bytes()
        assert data == (tmp_path / "b" / name).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        suffixes = ("original.png", "reconstruction.png", "json")
        assert list(members) == [f"{i}.{suffix}" for i in shard.ids for suffix in suffixes]
        for record_id, image, label in zip(shard.ids, shard.images, shard.labels, strict=True):
            original = np.asarray(Image.open(io.BytesIO(members[f"{record_id}.original.png"])))
            np.testing.assert_array_equal(original, image[..., 0])
            about = json.loads(members[f"{record_id}.json"])
            assert (about["id"], about["label"]) == (record_id, label)
            assert len(about["mean"]) == 3
