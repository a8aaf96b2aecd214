import io
import json
import shutil

import numpy as np
import pytest

from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import reader
from pipeline.stages import manifest as manifest_lib
from tests.conftest import assert_same_run, outputs_of, smoke_config, state_of
from tests.trainer.test_board import assert_projector_shows
from trainer.runs import train


def test_a_run_leaves_what_it_promises(trained, data_dir):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    dataset = reader.Dataset(str(data_dir))
    steps = -(-dataset.num_examples("train") // 27)
    assert [(line["step"], line["epoch"], line["split"]) for line in lines] == [
        (steps, 1, "train"),
        (steps, 1, "validation"),
        (2 * steps, 2, "train"),
        (2 * steps, 2, "validation"),
        (2 * steps, 2, "test"),
    ]
    config = smoke_config(data_dir)
    for line in lines:
        assert line["kl"] >= 0
        assert line["loss"] == pytest.approx(line["reconstruction_loss"] + config.beta * line["kl"])
        assert line["elbo"] == pytest.approx(-line["reconstruction_loss"] - line["kl"])
        assert line["bce"] == pytest.approx(line["reconstruction_loss"] / (12 * 8))
    assert lines[2]["loss"] < lines[0]["loss"]
    manifest = manifest_lib.read_manifest(str(trained / "export"), "train", "model_dir")
    assert manifest["dataset_id"] == dataset.dataset_id
    assert manifest["metrics"]["test"] == lines[-1]
    assert str(data_dir) not in json.dumps(manifest)
    saved = json.loads((trained / "config.json").read_text())
    assert saved["latent_dim"] == 3
    assert not list(trained.rglob(".writing-*"))


def test_the_published_model_keeps_its_contract(trained, data_dir):
    import tensorflow as tf

    from trainer.model import losses

    loaded = tf.saved_model.load(str(trained / "export"))
    images = reader.Dataset(str(data_dir)).read_images("test")
    embedded = loaded.signatures["embed"](images=tf.constant(images))
    encoded = loaded.signatures["encode"](images=tf.constant(images))
    decoded = loaded.signatures["decode"](z=encoded["mean"])
    reconstructed = loaded.signatures["reconstruct"](images=tf.constant(images))
    assert encoded["mean"].shape == encoded["log_var"].shape == (50, 3)
    assert decoded["images"].shape == images.shape
    assert 0 <= decoded["images"].numpy().min() <= decoded["images"].numpy().max() <= 1
    np.testing.assert_array_equal(embedded["mean"], encoded["mean"])
    np.testing.assert_allclose(decoded["images"], reconstructed["images"], atol=1e-6)
    np.testing.assert_allclose(embedded["reconstruction"], reconstructed["images"], atol=1e-6)
    np.testing.assert_allclose(
        embedded["kl"], losses.kl(encoded["mean"], encoded["log_var"]), rtol=1e-5
    )


def lines_of(workdir, split=None) -> list[dict]:
    """The lines of metrics.jsonl, of one split or all."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if split in (None, line["split"])]


def assert_same_path(a, b):
    """The metrics in two directories are equal to 1e-5."""
    for line, reference in zip(lines_of(a), lines_of(b), strict=True):
        assert line.keys() == reference.keys()
        for key, value in reference.items():
            close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert line[key] == close, key


@pytest.mark.parametrize(
    ("counts", "changes"),
    [
        # 272 records: 11 steps an epoch, the last with 2 records, for 3 and 4 replicas one or two
        # of them with nothing of it; 55 steps.
        ((1, 2, 3, 4), {"num_epochs": 5}),
        # Fewer records in a batch than replicas, so one has nothing of any.
        ((1, 4), {"batch_size": 3, "num_epochs": 1}),
        # What would differ if it came before the sum over replicas.
        ((1, 3), {"clip_norm": 0.5, "learning_rate_schedule": "cosine", "beta_warmup_steps": 7}),
        ((1, 2), {"num_importance_samples": 4, "binarize": "dynamic", "architecture": "mlp"}),
        ((1, 2), {"jit_compile": True, "clip_norm": 0.5, "num_epochs": 1}),
    ],
    ids=["50 steps", "empty slices", "clipping", "importance samples", "XLA"],
)
def test_replicas_walk_the_same_path(data_dir, tmp_path, counts, changes):
    for count in counts:
        config = smoke_config(data_dir, num_virtual_devices=count, **changes)
        train.train(config, workdir=str(tmp_path / str(count)))
        assert_same_path(tmp_path / str(count), tmp_path / "1")


def test_one_device_is_mirrored_with_one_replica(data_dir, trained, tmp_path):
    train.train(smoke_config(data_dir, strategy="one_device"), workdir=str(tmp_path))
    np.testing.assert_allclose(
        [json.loads(x)["loss"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()],
        [json.loads(x)["loss"] for x in (trained / "metrics.jsonl").read_text().splitlines()],
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"steps_per_loop": 1},
        {"steps_per_loop": 7},
        {"data_placement": "memory_mapped"},
        {"data_placement": "memory_mapped", "steps_per_loop": 1000},
    ],
)
def test_the_result_depends_neither_on_where_the_host_looks_nor_on_where_the_data_lie(
    data_dir, trained, tmp_path, changes
):
    train.train(smoke_config(data_dir, **changes), workdir=str(tmp_path))
    assert_same_run(tmp_path, trained)


def test_a_truncated_checkpoint_is_reported_and_the_one_before_it_used(
    data_dir, trained, tmp_path, capsys
):
    config = smoke_config(data_dir, num_epochs=1)
    train.train(config, workdir=str(tmp_path))
    names = sorted((tmp_path / "checkpoints").glob("step-*.npz"))
    names[-1].write_bytes(names[-1].read_bytes()[:-100])
    train.train(smoke_config(data_dir), workdir=str(tmp_path))
    assert f"{names[-1]} is damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(
        state_of(tmp_path)["model/mean/kernel"], state_of(trained)["model/mean/kernel"]
    )


def test_it_resumes_on_another_number_of_replicas(data_dir, trained, tmp_path):
    train.train(smoke_config(data_dir, num_epochs=1), workdir=str(tmp_path))
    train.train(smoke_config(data_dir, num_virtual_devices=2), workdir=str(tmp_path))
    for name, value in state_of(trained).items():
        if name.startswith("model/"):
            np.testing.assert_allclose(state_of(tmp_path)[name], value, atol=1e-5)


def test_a_finished_run_is_left_alone(data_dir, trained, capsys):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}
    train.train(smoke_config(data_dir), workdir=str(trained))
    assert "already finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}


def test_the_state_of_another_run_is_refused_and_overwritten_on_request(
    data_dir, trained, tmp_path
):
    workdir = tmp_path / "copy"
    shutil.copytree(trained, workdir)
    other = smoke_config(data_dir, learning_rate=2e-3, latent_dim=2)
    with pytest.raises(
        UsageError, match="config.latent_dim is 3 there and 2 here; config.learning"
    ):
        train.train(other, workdir=str(workdir))
    assert_same_run(workdir, trained)
    with pytest.raises(UsageError, match="is already at step .* at least as many"):
        train.train(smoke_config(data_dir, num_epochs=1), workdir=str(workdir))
    train.train(other, workdir=str(workdir), overwrite=True)
    fresh = tmp_path / "fresh"
    train.train(other, workdir=str(fresh))
    assert_same_run(workdir, fresh)


def test_a_run_is_bound_to_its_data_by_content_and_not_by_path(data_dir, trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data_dir, moved)
    workdir = tmp_path / "run"
    train.train(smoke_config(data_dir, num_epochs=1), workdir=str(workdir))
    train.train(smoke_config(moved), workdir=str(workdir))
    assert_same_run(workdir, trained)


def test_a_workdir_of_somebody_else_is_refused_even_with_overwrite(data_dir, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(StageError, match=r"holds 'checkpoints' and no config\.json"):
        train.train(smoke_config(data_dir), workdir=str(tmp_path), overwrite=True)
    assert (tmp_path / "checkpoints").is_dir()


@pytest.mark.parametrize("text", ["mine", "{}", "[]", "null"])
def test_a_config_of_somebody_else_is_refused_even_with_overwrite(data_dir, tmp_path, text):
    (tmp_path / "export").mkdir()
    for name in ("config.json", "export/thesis"):
        (tmp_path / name).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(StageError, match=r"config\.json: not a config of this command"):
            train.train(smoke_config(data_dir), workdir=str(tmp_path), overwrite=overwrite)
    assert (tmp_path / "config.json").read_text() == text
    assert (tmp_path / "export" / "thesis").read_text() == text


def test_a_data_set_is_no_workdir(data_dir):
    before = outputs_of(data_dir)
    with pytest.raises(StageError, match=r"holds 'manifest\.json' and no config\.json"):
        train.train(smoke_config(data_dir), workdir=str(data_dir))
    assert outputs_of(data_dir) == before


def test_an_overwrite_that_cannot_begin_leaves_the_old_run(data_dir, trained, tmp_path):
    workdir, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(trained, workdir)
    shutil.copytree(data_dir, data)
    (data / "blobs-train.tfrecord-00000-of-00004").unlink()
    with pytest.raises(StageError, match="missing, though"):
        train.train(smoke_config(data), workdir=str(workdir), overwrite=True)
    assert_same_run(workdir, trained)


def test_damaged_checkpoints_do_not_open_a_run_to_another(data_dir, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "export")
    for path in (workdir / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="latent_dim is 3 there and 4 here"):
        train.train(smoke_config(data_dir, latent_dim=4), workdir=str(workdir))
    train.train(smoke_config(data_dir), workdir=str(workdir))  # From the start again.
    assert_same_run(workdir, trained)


def test_a_published_model_that_is_damaged_is_published_again(data_dir, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "export" / "saved_model.pb").unlink()
    train.train(smoke_config(data_dir), workdir=str(workdir))
    assert (workdir / "export" / "saved_model.pb").stat().st_size > 0
    assert_same_run(workdir, trained)


def without_lines(checkpoint) -> bytes:
    """A checkpoint as versions wrote it that left the lines of metrics to their file."""
    with np.load(checkpoint) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays["about"].tobytes())
    del about["reported"]
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_a_line_of_metrics_damaged_by_hand_is_named_or_restored(
    data_dir, trained, tmp_path, capsys
):
    train.train(smoke_config(data_dir, num_epochs=1), workdir=str(tmp_path))
    metrics_text = (tmp_path / "metrics.jsonl").read_text()
    checkpoint = tmp_path / "checkpoints" / "step-0000000011.npz"
    with_lines = checkpoint.read_bytes()
    checkpoint.write_bytes(without_lines(checkpoint))
    (tmp_path / "metrics.jsonl").write_text(f"{metrics_text}half a li")
    with pytest.raises(StageError, match=r"metrics\.jsonl: line 4 is damaged"):
        train.train(smoke_config(data_dir), workdir=str(tmp_path))
    checkpoint.write_bytes(with_lines)
    (tmp_path / "metrics.jsonl").write_text(metrics_text[30:])
    train.train(smoke_config(data_dir), workdir=str(tmp_path))
    stderr = capsys.readouterr().err
    assert (
        "metrics.jsonl was changed after step 11; its 2 lines are restored from the check" in stderr
    )
    assert_same_run(tmp_path, trained)


def test_a_checkpoint_of_an_earlier_version_takes_the_lines_from_their_file(
    data_dir, trained, tmp_path, capsys
):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.write_bytes(without_lines(checkpoint))
    train.train(smoke_config(data_dir), workdir=str(tmp_path / "run"))
    assert "restored" not in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        trained / "metrics.jsonl"
    ).read_bytes()


def damage(path, kind: str) -> None:
    """What a power cut does to a file that was just written."""
    data = path.read_bytes()
    if kind == "gone":
        path.unlink()
    else:
        damaged = {"empty": b"", "half": data[: len(data) // 2], "zeros": b"\0" * len(data)}
        path.write_bytes(damaged[kind])


@pytest.mark.parametrize("how", ["gone", "empty", "half", "zeros"])
def test_a_finished_run_does_without_config_and_metrics(data_dir, trained, tmp_path, how, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for name in ("config.json", "metrics.jsonl"):
        damage(workdir / name, how)
    with pytest.raises(UsageError, match="config.latent_dim is 3 there and 4 here"):
        train.train(smoke_config(data_dir, latent_dim=4), workdir=str(workdir))
    capsys.readouterr()
    train.train(smoke_config(data_dir), workdir=str(workdir))
    output = capsys.readouterr()
    assert "already finished" in output.out
    assert (
        "config.json is missing or damaged; the checkpoint of step 22 identifies the run"
        in output.err
    )
    assert "metrics.jsonl is missing or changed; writing it again" in output.err
    assert_same_run(workdir, trained)
    assert (workdir / "config.json").read_bytes() == (trained / "config.json").read_bytes()


@pytest.mark.parametrize("text", ["", None])
def test_overwrite_takes_a_workdir_in_which_all_is_torn(data_dir, trained, tmp_path, text):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for path in (workdir / "checkpoints").glob("*.npz"):
        path.write_bytes(b"")
    (workdir / "export" / "manifest.json").write_text("{")
    (workdir / "config.json").unlink()
    if text is not None:
        (workdir / "config.json").write_text(text)
    with pytest.raises(StageError, match=r"config\.json"):
        train.train(smoke_config(data_dir), workdir=str(workdir))
    (workdir / "thesis").touch()
    with pytest.raises(StageError, match=r"config\.json"):
        train.train(smoke_config(data_dir), workdir=str(workdir), overwrite=True)
    (workdir / "thesis").unlink()
    train.train(smoke_config(data_dir), workdir=str(workdir), overwrite=True)
    assert_same_run(workdir, trained)


def test_a_torn_manifest_of_a_model_is_written_again(data_dir, trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    path = workdir / "export" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-9])
    train.train(smoke_config(data_dir), workdir=str(workdir))
    assert "manifest.json: not as this program wrote it" in capsys.readouterr().err
    assert_same_run(workdir, trained)


def test_a_config_that_is_json_of_somebody_else_stays_beside_checkpoints(
    data_dir, trained, tmp_path
):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(StageError, match=r"config\.json: not a config of this command"):
        train.train(smoke_config(data_dir), workdir=str(tmp_path / "run"), overwrite=True)
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


def test_nan_stops_the_run_with_the_steps_and_keeps_the_checkpoint(data_dir, tmp_path):
    with pytest.raises(StageError, match=r"NaN or infinite in step \d+ \(steps \d+ to \d+\)"):
        train.train(smoke_config(data_dir, learning_rate=1e20), workdir=str(tmp_path))
    assert not (tmp_path / "export").exists()


def test_other_ways_to_compute_come_near(data_dir, trained, tmp_path):
    reference = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    for number, changes in enumerate(
        [{"precision": "mixed_bfloat16"}, {"precision": "mixed_float16"}, {"jit_compile": True}]
    ):
        workdir = tmp_path / str(number)
        config = smoke_config(data_dir, **changes)
        loss = train.train(config, workdir=str(workdir))["metrics"]["test"]["loss"]
        assert loss == pytest.approx(reference, rel=0.02)


def test_a_set_without_validation_and_test(tmp_path):
    from tests.conftest import make_shards, write_idx

    generator = np.random.default_rng(0)
    (tmp_path / "idx").mkdir()
    write_idx(
        tmp_path / "idx" / "train-images-idx3-ubyte",
        generator.integers(0, 256, (10, 4, 4)).astype(np.uint8),
    )
    write_idx(tmp_path / "idx" / "train-labels-idx1-ubyte", np.zeros(10, np.uint8))
    make_shards(f"idx:{tmp_path}/idx", tmp_path / "data", validation_fraction=0, num_shards=1)
    manifest = train.train(smoke_config(tmp_path / "data"), workdir=str(tmp_path / "run"))
    assert list(manifest["metrics"]) == ["train"]


def test_it_works_on_urls(data_dir, trained, tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.put(str(data_dir), f"memory://{tmp_path.name}/data", recursive=True)
    root = f"memory://{tmp_path.name}"
    train.train(smoke_config(f"{root}/data", num_epochs=1), workdir=f"{root}/run")
    train.train(smoke_config(f"{root}/data"), workdir=f"{root}/run")
    for path in fs.find(f"{root}/run"):
        local = tmp_path / "copy" / path.split("/run/")[1]
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(fs.cat_file(path))
    assert_same_run(tmp_path / "copy", trained)
    projector = {path.name: path.read_bytes() for path in trained.glob("tensorboard/projector/*")}
    assert projector.keys() == {"tensors.tsv", "metadata.tsv", "sprite.png"}
    for name, data in projector.items():
        assert (tmp_path / "copy/tensorboard/projector" / name).read_bytes() == data
    names = {path.name for path in (tmp_path / "copy" / "tensorboard").iterdir()}
    assert {"config.tfevents", "projector_config.pbtxt"} <= names
    assert sum(name.startswith("events.") for name in names) == 2  # One for each start.


# A rate at which the loss soon rises again.
STOPS_EARLY = {"early_stopping_patience": 2, "learning_rate": 0.05, "num_epochs": 40}


def test_early_stopping_publishes_the_best_weights(data_dir, tmp_path):
    config = smoke_config(data_dir, **STOPS_EARLY, keep_checkpoints=1)
    workdir = tmp_path / "run"
    manifest = train.train(config, workdir=str(workdir))
    validation = lines_of(workdir, "validation")
    losses = [line["loss"] for line in validation]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 40
    assert manifest["step"] == validation[best]["step"] < manifest["trained_steps"]
    assert manifest["metrics"]["validation"] == validation[best]
    assert manifest["metrics"]["test"]["step"] == manifest["step"]
    published = np.load(workdir / "export" / "weights.npz")
    best_checkpoint = np.load(workdir / "checkpoints" / f"step-{manifest['step']:010d}.npz")
    for name in published.files:
        np.testing.assert_array_equal(published[name], best_checkpoint[f"model/{name}"])
    assert_projector_shows(workdir, reader.Dataset(str(data_dir)), "validation")

    def again(**changes):
        with config.unlocked():
            config.update(changes)
        return train.train(config, workdir=str(workdir))

    # Without the file that tells which step was the best, published already or not yet.
    lines = (workdir / "metrics.jsonl").read_bytes()
    for is_published in (True, False):
        (workdir / "metrics.jsonl").write_bytes(b"")
        if not is_published:
            (workdir / "export" / "manifest.json").unlink()
        remade = again()
        for key in ("model_id", "step", "trained_steps", "metrics"):
            assert remade[key] == manifest[key]
        assert (workdir / "metrics.jsonl").read_bytes() == lines

    longer = again(early_stopping_patience=3)  # It goes on where it was, for an epoch or more.
    assert longer["trained_steps"] > manifest["trained_steps"]
    (workdir / "metrics.jsonl").unlink()  # By which the best was known.
    (workdir / "export" / "manifest.json").unlink()
    later = again(early_stopping_patience=1)
    assert later["trained_steps"] >= longer["trained_steps"]
    last = again(early_stopping_patience=0, num_epochs=later["trained_steps"] // 11)
    assert last["step"] == last["trained_steps"]


def test_early_stopping_needs_a_validation_split(tmp_path, idx_dir):
    from tests.conftest import make_shards

    make_shards(f"idx:{idx_dir}", tmp_path / "data", validation_fraction=0, num_shards=1)
    config = smoke_config(tmp_path / "data", early_stopping_patience=1)
    with pytest.raises(UsageError, match="has no split 'validation', which early stopping needs"):
        train.train(config, workdir=str(tmp_path / "run"))


def test_a_warm_start_begins_with_the_weights_and_is_bound_to_them(data_dir, trained, tmp_path):
    tiny = {"learning_rate": 1e-30, "num_epochs": 1}  # So that they stay what they are.
    config = smoke_config(data_dir, warm_start_from=str(trained / "export"), **tiny)
    train.train(config, workdir=str(tmp_path / "run"))
    for name, value in state_of(trained).items():
        if name.startswith("model/"):
            np.testing.assert_array_equal(state_of(tmp_path / "run")[name], value)

    shutil.copytree(trained / "export", tmp_path / "moved")
    config.warm_start_from = str(tmp_path / "moved")
    train.train(config, workdir=str(tmp_path / "run"))  # The same content: already finished.
    train.train(smoke_config(data_dir, **tiny), workdir=str(tmp_path / "other"))
    config.warm_start_from = str(tmp_path / "other" / "export")
    with pytest.raises(UsageError, match="warm_start is '.*' there and '.*' here"):
        train.train(config, workdir=str(tmp_path / "run"))
    with pytest.raises(UsageError, match="warm_start is '.*' there and None here"):
        train.train(smoke_config(data_dir, **tiny), workdir=str(tmp_path / "run"))
    config = smoke_config(data_dir, warm_start_from=str(trained / "export"), latent_dim=4)
    with pytest.raises(
        StageError, match=r"weight 'decoder_dense/kernel' is \(3, .* there and \(4, "
    ):
        train.train(config, workdir=str(tmp_path / "wide"))


def test_a_float16_step_that_overflows_changes_the_scale_and_nothing_else(data_dir, tmp_path):
    config = smoke_config(data_dir, precision="mixed_float16", num_epochs=1, steps_per_loop=1)
    train.train(config, workdir=str(tmp_path))
    with np.load(tmp_path / "checkpoints" / "step-0000000011.npz") as file:
        state = {name: file[name] for name in file.files}
    skipped = int(np.log2(2.0**15 / state["optimizer/scaling/scale"]))
    assert state["optimizer/adam/iteration"] == 11 - skipped
    assert state["optimizer/scaling/steps_since_change"] <= 11 - skipped


def test_a_collapsed_posterior_is_warned_of(data_dir, tmp_path, capsys):
    config = smoke_config(data_dir, beta=1e4, num_epochs=3, learning_rate=1e-2)
    train.train(config, workdir=str(tmp_path))
    assert lines_of(tmp_path, "validation")[-1]["active_units"] == 0
    stderr = capsys.readouterr().err
    assert "warning: the posterior has collapsed: none of 3 latents is active" in stderr


def test_a_warm_up_as_long_as_the_run_is_refused(data_dir, tmp_path):
    config = smoke_config(data_dir, learning_rate_warmup_steps=22)
    with pytest.raises(UsageError, match="fewer than the run's 22 steps"):
        train.train(config, workdir=str(tmp_path))


def test_with_a_cosine_the_number_of_epochs_shapes_the_path(data_dir, tmp_path):
    cosine = {"learning_rate_schedule": "cosine", "num_epochs": 1}
    train.train(smoke_config(data_dir, **cosine), workdir=str(tmp_path))
    with pytest.raises(UsageError, match="num_epochs is 1 there and 2 here"):
        train.train(smoke_config(data_dir, **cosine | {"num_epochs": 2}), workdir=str(tmp_path))
