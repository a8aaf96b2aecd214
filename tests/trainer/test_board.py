"""What TensorBoard shows of a run, read by TensorBoard's own backend."""

import json
import pathlib
import shutil

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from tensorboard.plugins.text.text_plugin import TextPlugin
from werkzeug.test import Client

from pipeline.datasets import reader
from tests.conftest import smoke_config
from trainer.runs import train


class Backend:
    """Answers as `tensorboard --logdir` does, below data/plugin/."""

    def __init__(self, logdir: pathlib.Path):
        runs = EventMultiplexer(size_guidance={"tensors": 0})
        runs.AddRunsFromDirectory(str(logdir))
        runs.Reload()
        provider = MultiplexerDataProvider(runs, str(logdir))
        context = base_plugin.TBContext(data_provider=provider, logdir=str(logdir))
        self._apps = {
            f"{plugin.plugin_name}{route}": app
            for plugin in (kind(context) for kind in (HParamsPlugin, ProjectorPlugin, TextPlugin))
            for route, app in plugin.get_plugin_apps().items()
        }

    def get(self, route: str, body: dict | None = None, **query) -> bytes:
        client = Client(self._apps[route])
        answer = client.post(json=body) if body else client.get(query_string=query)
        assert answer.status_code == 200, answer.text
        return answer.data

    def json(self, route: str, body: dict | None = None, **query):
        return json.loads(self.get(route, body, **query))

    def sessions(self) -> dict[str, tuple[dict, dict]]:
        """Session -> (hyperparameters, metrics), each in a group of its own."""
        names = [
            info["name"]
            for info in self.json("hparams/experiment", {"experimentName": ""})["hparamInfos"]
        ]
        request = {
            "allowedStatuses": ["STATUS_UNKNOWN"],
            "colParams": [{"hparam": name, "includeInResult": True} for name in names],
            "sliceSize": 100,
        }
        found = {}
        for group in self.json("hparams/session_groups", request)["sessionGroups"]:
            [session] = group["sessions"]
            metrics = {value["name"]["tag"]: value["value"] for value in session["metricValues"]}
            found[session["name"]] = group["hparams"], metrics
        return found


def assert_projector_shows(workdir: pathlib.Path, dataset: reader.Dataset, split: str) -> None:
    """The projector beside the events shows the published model's means of a split."""
    import tensorflow as tf

    backend = Backend(workdir / "tensorboard")
    assert backend.json("projector/runs") == ["."]
    [info] = backend.json("projector/info", run=".")["embeddings"]
    shards = [dataset.read_shard(entry) for entry in dataset.shards(split)]
    images = np.concatenate([shard.images for shard in shards])
    loaded = tf.saved_model.load(str(workdir / "export"))
    means = loaded.signatures["encode"](images=tf.constant(images))["mean"].numpy()
    of_embedding = {"run": ".", "name": info["tensorName"]}
    tensors = np.frombuffer(backend.get("projector/tensor", **of_embedding), np.float32)
    np.testing.assert_allclose(tensors.reshape(info["tensorShape"]), means, rtol=1e-4, atol=1e-6)

    header, *lines = backend.get("projector/metadata", **of_embedding).decode().splitlines()
    assert header == "class\tid\tlabel"
    labels = [label for shard in shards for label in shard.labels.tolist()]
    ids = [record_id for shard in shards for record_id in shard.ids]
    assert lines == [f"{n}\t{i}\t{n}" for i, n in zip(ids, labels, strict=True)]
    assert backend.get("projector/sprite_image", **of_embedding)
    sprite = np.asarray(Image.open(workdir / "tensorboard" / info["sprite"]["imagePath"]))
    np.testing.assert_array_equal(sprite[:12, 8:16], images[1, ..., 0])


def test_the_projector_of_a_run_shows_its_model(trained, data_dir):
    assert_projector_shows(trained, reader.Dataset(str(data_dir)), "validation")


def test_a_sweep_is_compared_and_a_resumed_run_is_one_session(trained, data_dir, tmp_path):
    for name in ("a", "b", "c"):  # Runs with one config.
        shutil.copytree(trained, tmp_path / name)
    config = smoke_config(data_dir, num_epochs=3)
    train.train(config, workdir=str(tmp_path / "b"))
    backend = Backend(tmp_path)
    sessions = backend.sessions()
    assert sessions.keys() == {"a/tensorboard", "b/tensorboard", "c/tensorboard"}
    for name, (hparams, metrics) in sessions.items():
        assert hparams["num_epochs"] == {"a": 2, "b": 3, "c": 2}[name[0]]
        assert (hparams["filters"], hparams["jit_compile"]) == ("(4, 8)", False)
        assert hparams.keys() == set(config.keys())
        lines = (tmp_path / name[0] / "metrics.jsonl").read_text().splitlines()
        for line in map(json.loads, lines[-3:]):  # train, validation, test
            for metric in ("loss", "reconstruction_loss", "kl", "elbo", "bce"):
                value = metrics[f"{line['split']}/{metric}"]
                np.testing.assert_allclose(value, line[metric], rtol=1e-6)
        [text] = backend.json("text/text", run=name, tag="config")
        written = (tmp_path / name[0] / "config.json").read_text()
        assert text["text"] == f"<pre><code>{written}</code></pre>"
    infos = backend.json("hparams/experiment", {"experimentName": ""})["hparamInfos"]
    assert [info["name"] for info in infos if info.get("differs")] == ["num_epochs"]


def test_events_hold_losses_and_pictures(trained):
    events = EventAccumulator(str(trained / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    assert {"train/loss", "train/kl", "validation/bce", "validation/active_units"} <= set(tags)
    assert {"time/images_per_sec", "time/step_secs", "schedule/learning_rate"} <= set(tags)
    # 16 images above their reconstructions, and 64 samples, in rows of 8.
    for tag, size in {"reconstructions": (b"64", b"48"), "samples": (b"64", b"96")}.items():
        pictures = events.Tensors(tag)
        assert len(pictures) == 2
        width, height, first = pictures[0].tensor_proto.string_val[:3]
        assert (width, height) == size
        assert first.startswith(b"\x89PNG")
    assert len(events.Tensors("posterior/mean")) == len(events.Tensors("posterior/std")) == 2
