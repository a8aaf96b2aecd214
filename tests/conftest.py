"""Small image sets as real files, and the commands run as a user runs them."""

import gzip
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping

import hypothesis
import numpy as np
import pytest

from pipeline.cli import proxies, quiet
from tests import forked
from tests.forked import REPOSITORY
from tests.storage import object_stores

# As in every command: what tests start, and what they run in this process, talks over loopback.
proxies.reach_directly()
# Tests compare bits with those of a CPU, and fork after TensorFlow is imported, which CUDA does not
# survive; `make check-gpu` checks GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Tests lose their files anyway.
os.environ.setdefault("VAE_NOSYNC", "1")
# A deadline of an example is an assertion about time, which a busy machine fails.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes a uint8 array as an IDX file, packed if the name ends in .gz."""
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


def blobs(
    *, num_train: int = 300, num_test: int = 50, size: tuple[int, int] = (12, 8)
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Smooth blobs whose position tells the label; not divisible by much.

    Returns:
      split -> (images uint8 (n, H, W), labels uint8 (n,)).
    """
    generator, splits = np.random.default_rng(5), {}
    for split, count in (("train", num_train), ("test", num_test)):
        labels = generator.integers(0, 10, count).astype(np.uint8)
        rows, columns = np.mgrid[: size[0], : size[1]]
        centre = labels[:, None, None] % 5 * size[0] / 5, labels[:, None, None] // 5 * size[1] / 2
        noise = generator.random((count, 1, 1)) * 2
        distance = (rows - centre[0] - noise) ** 2 + (columns - centre[1] - noise) ** 2
        splits[split] = (255 * np.exp(-distance / 6)).astype(np.uint8), labels
    return splits


def make_idx_set(directory: pathlib.Path, *, suffix: str = "", **about) -> pathlib.Path:
    """An IDX set of blobs."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in blobs(**about).items():
        prefix = {"train": "train", "test": "t10k"}[split]
        write_idx(directory / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(directory / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return directory


def make_folder_set(directory: pathlib.Path, **about) -> pathlib.Path:
    """The same blobs as image files, `<split>/class <label>/<index>.png`."""
    from PIL import Image

    for split, (images, labels) in blobs(**about).items():
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = directory / split / f"class {label}" / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return directory


def write_csv(path: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> pathlib.Path:
    """Images (n, H, W) as rows of a label and pixels, under a header."""
    columns = ["label", *(f"pixel{i}" for i in range(images[0].size))]
    rows = np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1)
    text = "\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows.tolist())])
    path.write_text(text + "\n")
    return path


def run_command(
    module: str, *args: object, check: bool = True, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs `python -m module args…` in a process of its own, with more of an environment."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env=forked.environment(env),
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def die_at_file(number: int, module: str, *args: object) -> None:
    """Runs a command that is killed (-9) when it opens its n-th file for writing."""
    done = forked.run_command("tests.faults.die_at_file", number, module, *args, check=False)
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr)


def make_shards(source: str, output_dir: pathlib.Path | str, **settings) -> dict:
    """Runs the preprocess job in this process; returns its manifest.

    Args:
      source: as in --source.
      output_dir: where to write.
      **settings: flags of the command by name, and beam_args.
    """
    from pipeline.datasets.building import append as append_set
    from pipeline.datasets.building import create as create_set
    from pipeline.datasets.profile import drift
    from pipeline.runners import options as beam_options
    from pipeline.sources import conversion
    from pipeline.stages import gate, quarantine
    from pipeline.stages import manifest as manifest_lib

    options = beam_options.parse_options(settings.pop("beam_args", []))
    conversion.open_source_once.cache_clear()  # A test may have changed the files.
    make = append_set.append_records if settings.pop("append", False) else create_set.create_dataset
    limit = quarantine.parse_limit(settings.pop("max_quarantined", "0.1%"))
    of_job = {key: settings.pop(key) for key in ("on_changed", "reread") if key in settings}
    overwrite = settings.pop("overwrite", False)
    of_job["requirements"] = gate.parse(settings.pop("require", None))
    if reference := settings.pop("reference", None):
        manifest = manifest_lib.read_manifest(str(reference), "preprocess", "--reference")
        of_job["reference"] = drift.read(str(reference), manifest)
    of_set = {"name": "blobs", "num_shards": 4, "validation_fraction": 0.1, "seed": 0}
    of_set["compression"] = "none"
    of_set.update({key: settings.pop(key) for key in list(settings) if key in of_set})
    return make(
        create_set.Request(
            source_spec=conversion.SourceSpec(source, **settings),
            settings=create_set.Settings(**of_set),
            output_dir=str(output_dir),
            max_quarantined=limit,
            overwrite=overwrite,
            options=options,
            **of_job,
        )
    )


def make_embeddings(
    data_dir: pathlib.Path | str,
    model_dir: pathlib.Path | str,
    output_dir: pathlib.Path | str,
    **settings,
) -> dict:
    """Runs the export job in this process; returns its manifest.

    Args:
      data_dir: a data set, or a source as in --source.
      model_dir: a model directory.
      output_dir: where to write.
      **settings: flags of the command by name, and beam_args.
    """
    from pipeline.datasets.building import create as create_set
    from pipeline.embeddings import create as create_export
    from pipeline.embeddings import inputs
    from pipeline.embeddings.shard import ExportSettings
    from pipeline.runners import options as beam_options
    from pipeline.sources import conversion
    from pipeline.stages import gate, pointer, quarantine
    from pipeline.stages import manifest as manifest_lib

    options = beam_options.parse_options(settings.pop("beam_args", []))
    on_corrupt = settings.pop("on_corrupt", "fail")
    splits = settings.pop("split", "test")
    splits = splits and splits.split(",")  # None: see SourceInput.
    if ":" in str(data_dir) and "://" not in str(data_dir):
        conversion.open_source_once.cache_clear()  # A test may have changed the files.
        of_set = {"name": "blobs", "num_shards": 4, "validation_fraction": 0.1, "seed": 0}
        of_set.update({key: settings.pop(key) for key in list(settings) if key in of_set})
        model = manifest_lib.read_manifest(str(model_dir), "train", "--model_dir")
        input_ = inputs.SourceInput(
            conversion.SourceSpec(data_dir, model_class_names=tuple(model.get("class_names", ()))),
            create_set.Settings(**of_set, compression="none"),
            splits,
        )
        on_corrupt = "quarantine"
    else:
        input_ = inputs.ShardsInput(str(data_dir), splits, on_corrupt)
    export_settings = {
        "fields": ("mean", "log_var", "reconstruction_loss", "kl"),
        "embedding_format": "parquet",
        "images": "sheets",
        "z_seed": 0,
    }
    export_settings.update(
        {key: settings.pop(key) for key in list(settings) if key in export_settings}
    )
    reference, latest = settings.pop("reference", None), settings.pop("latest", None)
    reuse_from = settings.pop("reuse_from", None)
    seen = pointer.read(str(latest)) if latest else None
    if seen and reuse_from is None:
        reuse_from = seen.directory
    request = create_export.Request(
        input=input_,
        model_dir=str(model_dir),
        output_dir=str(output_dir),
        reuse_dir=None if reuse_from is None else str(reuse_from),
        reference_dir=None if reference is None else str(reference),
        settings=ExportSettings(**export_settings),
        requirements=gate.parse(settings.pop("require", None)),
        allow_missing=on_corrupt == "quarantine",
        max_quarantined=quarantine.parse_limit(settings.pop("max_quarantined", "0.1%")),
        overwrite=settings.pop("overwrite", False),
        options=options,
        only_if_new=seen is not None,
    )
    assert not settings, settings
    manifest = create_export.make_export(request)
    if latest:
        pointer.move(str(latest), manifest["directory"], seen=seen)
    return manifest


def smoke_config(data_dir: object, /, **changes):
    """configs/smoke.py over a data set, with changes."""
    from configs import smoke

    config = smoke.get_config()
    config.data_dir = str(data_dir)
    config.batch_size = 27  # Divides neither the set nor by the number of replicas.
    for key, value in changes.items():
        config[key] = value
    return config


def outputs_of(directory: pathlib.Path) -> dict[str, bytes]:
    """Name -> bytes of every file of a finished stage that its inputs determine.

    timings.json and changes.parquet tell how the stage came to them, and index/source-* what the
    stage remembers of the files of its sources.
    """
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.name not in ("timings.json", ".lock", "changes.parquet")
        and not path.match("index/source-*")
    }


def state_of(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """All weights and optimizer slots of a run's newest checkpoint, with its name."""
    path = sorted((workdir / "checkpoints").glob("step-*.npz"))[-1]
    with np.load(path) as file:
        return {"name": np.array(path.name), **{name: file[name] for name in file.files}}


def assert_same_run(a: pathlib.Path, b: pathlib.Path) -> None:
    """The finished runs in two directories are the same to the last bit and the last line."""
    first, second = state_of(a), state_of(b)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    ids = [json.loads((d / "export" / "manifest.json").read_text())["model_id"] for d in (a, b)]
    assert ids[0] == ids[1]


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries():
    """Four CPU devices for all tests of this process, and no start-up messages."""
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", GRPC_VERBOSITY="ERROR")
    quiet.import_beam()
    quiet.import_tensorflow()
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
    )


@pytest.fixture
def when_written(monkeypatch):
    """Lets something happen when a file, whose path has a certain part, is first written."""

    def when(part: str, act) -> None:
        from pipeline.storage import files

        left, open_atomic = [act], files.open_atomic

        def acting(path: str):
            if left and part in path:
                left.pop()()
            return open_atomic(path)

        monkeypatch.setattr(files, "open_atomic", acting)

    return when


@pytest.fixture(scope="session")
def object_store():
    """A Google Cloud Storage on loopback, which this process and its children are sent to."""
    program = object_stores.find_server()
    if program is None:
        pytest.skip("no fake-gcs-server; make fake-gcs-server installs it where there is Go")
    with object_stores.running(program) as store:
        os.environ["STORAGE_EMULATOR_HOST"] = store.url
        yield store


@pytest.fixture(scope="session")
def idx_dir(tmp_path_factory) -> pathlib.Path:
    return make_idx_set(tmp_path_factory.mktemp("idx") / "set")


@pytest.fixture(scope="session")
def data_dir(idx_dir, tmp_path_factory) -> pathlib.Path:
    """A finished data set: 50 test records, and 300 split into train and validation."""
    directory = tmp_path_factory.mktemp("shards") / "blobs"
    make_shards(f"idx:{idx_dir}", directory)
    return directory


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished run over `data_dir`."""
    from trainer.runs import train

    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.train(smoke_config(data_dir), workdir=str(workdir))
    return workdir
