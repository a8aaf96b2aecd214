"""Checkpoints: weights, optimizer and step in one file, which is complete or absent.

A checkpoint is one .npz file, unlike tf.train.Checkpoint's set of files with an index: one file
can be published atomically on any storage, its zip checksums reveal damage, and it names the run
that it belongs to.
"""

import io
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files

DIRECTORY = "checkpoints"
_NAME = re.compile(r"step-(\d{10})\.npz")
# The errors that NumPy and zipfile raise at damaged bytes.
_DAMAGE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    KeyError,
    EOFError,
    IsADirectoryError,
    TypeError,
    RuntimeError,  # NotImplementedError too: "That compression method is not supported".
)
_ABOUT = "about"  # The array that holds the other fields of a checkpoint, as JSON.


class Checkpoint(NamedTuple):
    """The state of a run after `step` steps."""

    step: int
    epoch_sums: list[float]  # sums over the current epoch's examples so far, see evaluation.SUMS
    run: dict[str, Any]  # the run's identity, see RunPlan.identity
    arrays: dict[str, np.ndarray]  # variable name -> value
    # metrics.jsonl up to this step; None in checkpoints of versions that kept no copy
    metrics_text: str | None = None


def checkpoint_path(workdir: str, step: int) -> str:
    """The path of the checkpoint of a step."""
    return files.join(workdir, DIRECTORY, f"step-{step:010d}.npz")


def newest_path(workdir: str) -> str | None:
    """The path of the newest checkpoint, damaged or not; None without any."""
    steps = _steps(workdir)
    return checkpoint_path(workdir, max(steps)) if steps else None


def save(workdir: str, checkpoint: Checkpoint, *, keep: int, best_step: int | None = None) -> None:
    """Writes a checkpoint, then removes all but the newest `keep` and the one of `best_step`.

    Checkpoints of later steps go too. They are damaged, or the run would have resumed from them;
    and they would count among the newest in place of good checkpoints.
    """
    about = {
        "format_version": manifest_lib.FORMAT_VERSION,
        "step": checkpoint.step,
        "epoch_sums": checkpoint.epoch_sums,
        "run": checkpoint.run,
        "names": sorted(checkpoint.arrays),
        "reported": checkpoint.metrics_text,
    }
    files.make_dirs(files.join(workdir, DIRECTORY))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        **{_ABOUT: np.frombuffer(manifest_lib.canonical_json(about), np.uint8)},
        **checkpoint.arrays,
    )
    files.write_bytes(checkpoint_path(workdir, checkpoint.step), buffer.getvalue())
    files.sync(files.join(workdir, DIRECTORY))
    steps = sorted(_steps(workdir), reverse=True)
    earlier = [step for step in steps if step <= checkpoint.step]
    for step in set(steps) - set(earlier[:keep]) - {best_step}:
        files.remove(checkpoint_path(workdir, step))


def _steps(workdir: str) -> list[int]:
    """The step of every checkpoint in workdir."""
    names = files.list_names(files.join(workdir, DIRECTORY))
    return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]


def _read(path: str) -> Checkpoint:
    """Reads a checkpoint; raises one of _DAMAGE_ERRORS if the file is damaged."""
    with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays.pop(_ABOUT).tobytes())
    if about["format_version"] != manifest_lib.FORMAT_VERSION:
        raise ValueError(f"format version {about['format_version']}")
    if about["names"] != sorted(arrays):
        raise ValueError("names of arrays are damaged")
    metrics_text = about.get("reported")
    for name, kind in (("step", int), ("epoch_sums", list), ("run", dict)):
        if not isinstance(about[name], kind):
            raise ValueError(f"{name} is {about[name]!r}")
    if not isinstance(metrics_text, str | None):
        raise ValueError(f"reported is {metrics_text!r}")
    return Checkpoint(about["step"], about["epoch_sums"], about["run"], arrays, metrics_text)


def read_newest(workdir: str) -> Checkpoint | None:
    """The newest undamaged checkpoint, whatever run it belongs to; None without any."""
    for step in sorted(_steps(workdir), reverse=True):
        path = checkpoint_path(workdir, step)
        try:
            return _read(path)
        except _DAMAGE_ERRORS as error:
            print(
                f"train: {path} is damaged ({error}); trying the checkpoint before it",
                file=sys.stderr,
            )
    return None


def restore_newest(workdir: str, run: Mapping[str, Any]) -> Checkpoint | None:
    """The newest undamaged checkpoint; None without any.

    Args:
      workdir: the run's directory.
      run: this run's identity, see RunPlan.identity.

    Raises:
      UsageError: the checkpoint belongs to another run; says what differs.
    """
    files.remove_unfinished(files.join(workdir, DIRECTORY))
    checkpoint = read_newest(workdir)
    if checkpoint:
        refuse_other_run(workdir, checkpoint.run, run)
    return checkpoint


def read_arrays(workdir: str, step: int) -> dict[str, np.ndarray]:
    """All arrays of the checkpoint of a step.

    Raises:
      StageError: the checkpoint is missing or damaged.
    """
    path = checkpoint_path(workdir, step)
    try:
        return _read(path).arrays
    except (FileNotFoundError, *_DAMAGE_ERRORS) as error:
        raise StageError(
            f"{path}: the checkpoint with the best validation loss is missing or damaged "
            f"({error}); publish the last weights with --config.early_stopping_patience=0, or "
            "train again from the start with --overwrite"
        ) from error


def refuse_other_run(workdir: str, saved_run: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises a UsageError if the identity of the run saved in workdir differs from this run's."""
    differences = manifest_lib.differences(saved_run, run)
    if differences:
        raise UsageError(
            f"--workdir={workdir}: holds the state of another run ({'; '.join(differences)}); "
            "name another directory, or pass --overwrite"
        )
