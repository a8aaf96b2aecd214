"""The stage train as a function of Python.

Importing this defines no flag and does not import TensorFlow. docs/python.md shows the function at
work.
"""

import copy
import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cli import flag_parsing, quiet
from pipeline.cli.errors import Interrupted, StageError, UsageError
from pipeline.storage import files

if TYPE_CHECKING:
    import ml_collections

__all__ = ["Interrupted", "Model", "StageError", "UsageError", "train"]

# Keys of a line of metrics.jsonl that are no metrics.
_POSITION = ("step", "epoch", "split")


@dataclasses.dataclass(frozen=True)
class Model(os.PathLike[str]):
    """A published model, which other functions take as the path of its directory."""

    directory: str  # Local path or URL: export/ in the workdir.
    model_id: str  # 16 hex digits
    step: int  # The published weights are of this step.
    trained_steps: int  # More than `step` after early stopping.
    metrics: Mapping[str, Mapping[str, float]]  # Split -> name -> value, as in metrics.jsonl.
    class_names: tuple[str, ...]  # Of the data set; () without labels.

    def __fspath__(self) -> str:
        return self.directory

    @property
    def manifest(self) -> str:
        """The path or URL of manifest.json."""
        return files.join(self.directory, "manifest.json")


def train(
    *,
    config: "str | os.PathLike[str] | ml_collections.ConfigDict",
    data_dir: str | os.PathLike[str] | None = None,
    workdir: str | os.PathLike[str],
    overwrite: bool = False,
    on_corrupt: str = "fail",
    max_quarantined: str | int | float = "0.1%",
    cache_dir: str | os.PathLike[str] | None = None,
    join_timeout_secs: int = 900,
    **overrides: Any,
) -> Model:
    """Trains a model on a data set, or resumes an interrupted run, and publishes the model.

    Args:
      config: as --config: a Python file with get_config(), or the name of one of configs/, such as
        "mnist" or "mnist:latent_dim=16"; or a config, which stays as it is.
      data_dir: the data set, or pipeline.api.DataSet; None to take the config's.
      workdir: directory of checkpoints, metrics and the model; local path or URL.
      overwrite: whether to replace another run's state in workdir.
      on_corrupt: "fail", or "quarantine" to train without unreadable records.
      max_quarantined: the largest number (25) or share (0.1%) of unreadable records.
      cache_dir: local directory that keeps the shards of a URL.
      join_timeout_secs: how long a worker of a cluster waits for the others.
      **overrides: values of keys of the config, such as num_epochs=3.

    Returns:
      The model, whether it was published now or before.

    Raises:
      UsageError: the config is not valid, or workdir belongs to another run.
      StageError: the data are unusable, or the loss became NaN.
      Interrupted: SIGTERM or SIGINT came; the state is saved, and the same call resumes. Signals
        are listened to in the main thread alone.
      OSError: a disk is full, a path is not readable.
    """
    quiet.prepare()
    if not isinstance(overwrite, bool):  # Any text is true in Python, "false" too.
        raise UsageError(f"--overwrite={overwrite!r}: expected True or False")
    if data_dir is not None:
        overrides["data_dir"] = _path("data_dir", data_dir)
    workdir = _path("workdir", workdir)
    cache_dir = cache_dir if cache_dir is None else _path("cache_dir", cache_dir)
    resolved = _config(config, overrides)
    # Before TensorFlow, which would wait for missing workers without handling signals.
    if resolved.strategy == "multi_worker":
        from trainer.cluster import rendezvous

        rendezvous.meet(resolved, timeout_secs=join_timeout_secs)
    quiet.import_tensorflow()
    from pipeline.stages import manifest as manifest_lib
    from pipeline.stages import quarantine
    from trainer.runs import train as train_lib

    manifest: Mapping[str, Any] = train_lib.train(
        resolved,
        workdir=workdir,
        overwrite=overwrite,
        on_corrupt=on_corrupt,
        max_quarantined=quarantine.parse_limit(str(max_quarantined)),
        cache_dir=cache_dir,
    )
    directory = files.join(workdir, train_lib.EXPORT)
    if not manifest:  # Only the chief of a cluster publishes.
        manifest = manifest_lib.read_manifest(directory, "train", "--workdir")
    return Model(
        directory=directory,
        model_id=manifest["model_id"],
        step=manifest["step"],
        trained_steps=manifest["trained_steps"],
        metrics={
            split: {k: float(value) for k, value in line.items() if k not in _POSITION}
            for split, line in manifest["metrics"].items()
        },
        class_names=tuple(manifest.get("class_names", ())),
    )


def _path(name: str, value: str | os.PathLike[str]) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise UsageError(f"--{name}: is of type {type(value).__name__}; expected a path or URL")
    path = flag_parsing.with_home(f"--{name}={text}").partition("=")[2]
    if not path:
        raise UsageError(f"--{name}=: is empty; expected a path: name one")
    flag_parsing.check_unsigned(f"--{name}=", path)
    return path


def _config(config: Any, overrides: Mapping[str, Any]) -> "ml_collections.ConfigDict":
    """A copy of a config, or of that in a file, with other values."""
    from trainer.runs import config_flag

    if isinstance(config, (str, os.PathLike)):
        config = config_flag.load(_path("config", config))
    elif not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise UsageError(f"config={config!r}: expected the name of a config, or a ConfigDict")
    else:
        try:
            config_flag.check_keys(config)
        except (ValueError, TypeError) as error:
            raise UsageError(f"config: {error}") from error
        config = copy.deepcopy(config).lock()
    for key, value in overrides.items():
        if isinstance(value, np.generic | np.ndarray):
            value = value.tolist()
        if isinstance(value, list):
            value = tuple(value)  # As in config files.
        try:
            kind = type(getattr(config, key)).__name__
            if isinstance(value, bool) and kind != "bool":
                raise TypeError
            setattr(config, key, value)
        except AttributeError as error:
            raise flag_parsing.unknown_key(error) from error
        except TypeError as error:
            found = type(value).__name__
            text = f"--config.{key}={value}: is of type {found}, expected {kind}"
            raise UsageError(text) from error
    return config
