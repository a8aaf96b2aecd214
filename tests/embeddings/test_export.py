import hashlib
import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli.errors import StageError
from pipeline.datasets import reader
from pipeline.embeddings import job
from pipeline.embeddings import model as model_lib
from pipeline.formats import png, tf_example
from pipeline.machine import gpus
from pipeline.stages import manifest as manifest_lib
from tests.conftest import (
    die_at_file,
    make_embeddings,
    make_idx_set,
    make_shards,
    outputs_of,
    smoke_config,
)


@pytest.fixture(scope="module")
def exported(data_dir, trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "out"
    make_embeddings(data_dir, trained / "export", directory)
    return directory


def test_each_record_has_its_row(data_dir, trained, exported):
    import tensorflow as tf

    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["records"] == {"read": 50, "written": 50, "quarantined": 0}
    model = tf.saved_model.load(str(trained / "export"))
    dataset = reader.Dataset(str(data_dir))
    for entry in dataset.shards("test"):
        shard = dataset.read_shard(entry)
        table = pq.read_table(
            exported / "embeddings" / f"{entry['name'].replace('.tfrecord', '')}.parquet"
        )
        assert table.schema.metadata[b"model_id"].decode() == manifest["model_id"]
        assert table["id"].to_pylist() == shard.ids
        assert table["label"].to_pylist() == shard.labels.tolist()
        assert table["record_sha"].to_pylist() == [
            hashlib.sha256(record).hexdigest() for record in shard.records
        ]
        expected = model.signatures["embed"](images=tf.constant(shard.images))
        for name in ("mean", "log_var", "reconstruction_loss", "kl"):
            np.testing.assert_allclose(
                np.array(table[name].to_pylist()), expected[name], rtol=1e-4, atol=1e-5
            )


def test_sheets_show_originals_above_reconstructions(data_dir, exported):
    dataset = reader.Dataset(str(data_dir))
    entry = dataset.shards("test")[0]
    shard = dataset.read_shard(entry)
    path = exported / "images" / f"{entry['name'].replace('.tfrecord', '')}.png"
    sheet = np.asarray(Image.open(path))
    scale = 6  # 8 pixels of width become at least 48.
    assert sheet.shape[1] == min(16, len(shard.ids)) * (8 * scale + 4) + 4
    first = sheet[4 : 4 + 12 * scale : scale, 4 : 4 + 8 * scale : scale]
    np.testing.assert_array_equal(first, shard.images[0, :, :, 0])


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 16, 17])
def test_a_sheet_of_any_size_and_number_of_channels(count, channels):
    pictures = np.random.default_rng(0).integers(0, 256, (count, 5, 7, channels)).astype(np.uint8)
    image = Image.open(io.BytesIO(png.contact_sheet(pictures, pictures)))
    assert image.mode == ("RGB" if channels == 3 else "L")
    assert image.height == -(-count // 16) * (2 * 5 * 10 + 4) + 4


def test_rows_do_not_depend_on_their_neighbours(data_dir, trained):
    manifest = manifest_lib.read_manifest(str(trained / "export"), "train", "model_dir")
    model = model_lib.PublishedModel(str(trained / "export"), manifest)
    images = reader.Dataset(str(data_dir)).read_images("train")[:250]
    outputs = ("mean", "log_var", "reconstruction_loss", "kl", "reconstruction")
    values = model.embed(images, outputs)
    for chosen in (slice(0, 1), slice(3, 6), slice(0, 250, 5), slice(249, None, -1), slice(0, 0)):
        part = model.embed(images[chosen], outputs)
        for name in part:
            np.testing.assert_array_equal(part[name], values[name][chosen])
    # Nor do they depend on which other outputs are requested.
    for name in outputs:
        np.testing.assert_array_equal(model.embed(images, (name,))[name], values[name])


def test_the_bytes_do_not_depend_on_the_workers(
    data_dir, trained, exported, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv(gpus.VISIBLE)
    if gpus.visible():
        pytest.skip("the workers would use the GPUs of this machine, whose bits are others")
    for name in ("nvidia0", "nvidia1"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpus, "DEVICES", str(tmp_path))
    devices = [gpus.environment_of(number, 2)["CUDA_VISIBLE_DEVICES"] for number in range(2)]
    beam_args = ["--direct_num_workers=2"]
    make_embeddings(data_dir, trained / "export", tmp_path / "out", beam_args=beam_args)
    message = f"export: GPUs of the worker processes: 0: {devices[0]}, 1: {devices[1]}\n"
    assert message in capsys.readouterr().err
    assert outputs_of(tmp_path / "out") == outputs_of(exported)


@pytest.mark.parametrize("file_number", [1, 9])
def test_killed_at_any_file_the_rerun_gives_the_same_bytes(
    data_dir, trained, exported, tmp_path, file_number
):
    out = tmp_path / "out"
    flags = (f"--data_dir={data_dir}", f"--model_dir={trained}/export", f"--output_dir={out}")
    die_at_file(file_number, "pipeline.export", *flags)
    assert not (out / "manifest.json").exists()
    make_embeddings(data_dir, trained / "export", out)
    assert outputs_of(out) == outputs_of(exported)


def test_a_finished_export_loads_no_model(data_dir, trained, exported, monkeypatch):
    monkeypatch.setattr(job, "PublishedModel", None)
    before = outputs_of(exported)
    assert make_embeddings(data_dir, trained / "export", exported)["reused"] is True
    assert outputs_of(exported) == before


def test_another_split_needs_another_directory(data_dir, trained, exported):
    with pytest.raises(StageError, match=r"split is \['test'\] there and \['train'\] here"):
        make_embeddings(data_dir, trained / "export", exported, split="train")


def test_one_damaged_shard_fails_the_job_and_keeps_the_rest(data_dir, trained, exported, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data_dir, data)
    shard = data / "blobs-test.tfrecord-00001-of-00004"
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-1] + b"x")
    with pytest.raises(StageError, match=f"{shard}: damaged.* keeps the 3 completed files"):
        make_embeddings(data, trained / "export", out)
    assert not (out / "manifest.json").exists()
    shard.write_bytes(intact)
    make_embeddings(data, trained / "export", out)
    assert outputs_of(out) == outputs_of(exported)
    assert json.loads((out / "timings.json").read_text())["num_tasks_reused"] == 3


def test_a_damaged_model_is_refused(data_dir, trained, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(trained / "export", model)
    weights = model / "variables" / "variables.data-00000-of-00001"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(StageError, match=f"{weights}: damaged"):
        make_embeddings(data_dir, model, tmp_path / "out")


def test_no_model_or_a_model_of_other_images_is_refused(data_dir, trained, tmp_path):
    with pytest.raises(StageError, match="model_dir=.*: no such directory; expected the output of"):
        make_embeddings(data_dir, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(StageError, match=r"model_dir=.*: has no manifest\.json"):
        make_embeddings(data_dir, trained, tmp_path / "out")
    with pytest.raises(StageError, match="is of stage 'preprocess', expected 'train'"):
        make_embeddings(data_dir, data_dir, tmp_path / "out")
    other = make_idx_set(tmp_path / "idx", num_train=20, num_test=10, size=(8, 8))
    make_shards(f"idx:{other}", tmp_path / "other")
    with pytest.raises(StageError, match=r"takes images of shape \(12, 8, 1\), .* are \(8, 8, 1\)"):
        make_embeddings(tmp_path / "other", trained / "export", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_model_of_the_same_data_has_another_id(data_dir, trained, exported, tmp_path):
    from trainer.runs import train

    train.train(smoke_config(data_dir, seed=1), workdir=str(tmp_path / "run"))
    manifest = make_embeddings(data_dir, tmp_path / "run" / "export", tmp_path / "out")
    before = json.loads((exported / "manifest.json").read_text())
    assert manifest["dataset_id"] == before["dataset_id"]
    assert manifest["model_id"] != before["model_id"]
    assert manifest["export_id"] != before["export_id"]


def test_it_works_on_urls(data_dir, trained, exported, tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    root = f"memory://{tmp_path.name}"
    fs.put(str(data_dir), f"{root}/data", recursive=True)
    fs.put(str(trained / "export"), f"{root}/model", recursive=True)
    make_embeddings(f"{root}/data", f"{root}/model", f"{root}/out")
    fs.get(f"{root}/out", str(tmp_path / "copy"), recursive=True)
    assert outputs_of(tmp_path / "copy") == outputs_of(exported)


def test_records_of_a_shard_are_their_encoded_examples(data_dir):
    dataset = reader.Dataset(str(data_dir))
    shard = dataset.read_shard(dataset.shards("test")[0])
    for record_id, image, label, record in zip(
        shard.ids, shard.images, shard.labels.tolist(), shard.records, strict=True
    ):
        assert tf_example.encode(record_id.encode(), image.tobytes(), label) == record
