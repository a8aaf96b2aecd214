"""Checkpoints: weights, optimizer and step in one file, which is whole or not there.

One .npz a checkpoint rather than tf.train.Checkpoint's set of files and an index:
one file can be published atomically on any storage, its zip checksums tell a
damaged one, and it says what run it belongs to.
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
# What NumPy and zipfile raise at one damaged byte or another.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    KeyError,
    EOFError,
    IsADirectoryError,
    TypeError,
    RuntimeError,  # NotImplementedError too: "That compression method is not supported".
)
_ABOUT = "about"  # The array that holds everything but weights, as JSON.


class Checkpoint(NamedTuple):
    """The state of a run after `step` steps."""

    step: int
    epoch_sums: list[float]  # sums over the current epoch's examples so far, as in tape_steps.SUMS
    run: dict[str, Any]  # what the run is a function of
    arrays: dict[str, np.ndarray]  # variable name -> value
    reported: str | None = None  # metrics.jsonl up to here; None of a version that kept no copy


def path_of(workdir: str, step: int) -> str:
    """Where the checkpoint of a step lies."""
    return files.join(workdir, DIRECTORY, f"step-{step:010d}.npz")


def newest_path(workdir: str) -> str | None:
    """Where the newest checkpoint lies, if there is any."""
    steps = _steps(workdir)
    return path_of(workdir, max(steps)) if steps else None


def save(workdir: str, checkpoint: Checkpoint, *, keep: int, best_step: int | None = None) -> None:
    """Writes a checkpoint, then removes all but the newest `keep` and that of `best_step`.

    Later ones go too: a run that comes to a step goes on from none of them, since they are
    damaged, and they would crowd out the whole ones.
    """
    about = {
        "format_version": manifest_lib.FORMAT_VERSION,
        "step": checkpoint.step,
        "epoch_sums": checkpoint.epoch_sums,
        "run": checkpoint.run,
        "names": sorted(checkpoint.arrays),
        "reported": checkpoint.reported,
    }
    files.make_dirs(files.join(workdir, DIRECTORY))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        **{_ABOUT: np.frombuffer(manifest_lib.canonical_json(about), np.uint8)},
        **checkpoint.arrays,
    )
    files.write_bytes(path_of(workdir, checkpoint.step), buffer.getvalue())
    steps = sorted(_steps(workdir), reverse=True)
    earlier = [step for step in steps if step <= checkpoint.step]
    for step in set(steps) - set(earlier[:keep]) - {best_step}:
        files.remove(path_of(workdir, step))


def _steps(workdir: str) -> list[int]:
    """The step of every checkpoint there."""
    names = files.list_names(files.join(workdir, DIRECTORY))
    return [int(found[1]) for name in names if (found := _NAME.fullmatch(name))]


def _read(path: str) -> Checkpoint:
    """Reads a checkpoint; raises one of several errors if it is damaged."""
    with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays.pop(_ABOUT).tobytes())
    if about["format_version"] != manifest_lib.FORMAT_VERSION:
        raise ValueError(f"format version {about['format_version']}")
    if about["names"] != sorted(arrays):
        raise ValueError("names of arrays are damaged")
    reported = about.get("reported")
    for name, kind in (("step", int), ("epoch_sums", list), ("run", dict)):
        if not isinstance(about[name], kind):
            raise ValueError(f"{name} is {about[name]!r}")
    if not isinstance(reported, str | None):
        raise ValueError(f"reported is {reported!r}")
    return Checkpoint(about["step"], about["epoch_sums"], about["run"], arrays, reported)


def read_newest(workdir: str) -> Checkpoint | None:
    """The newest checkpoint that is whole, whatever run it belongs to; None without any."""
    for step in sorted(_steps(workdir), reverse=True):
        path = path_of(workdir, step)
        try:
            return _read(path)
        except _DAMAGED as error:
            print(f"train: {path} is damaged ({error}); going back one", file=sys.stderr)
    return None


def restore_newest(workdir: str, run: Mapping[str, Any]) -> Checkpoint | None:
    """The newest checkpoint that is whole, if there is any.

    Args:
      workdir: the run's directory.
      run: what this run is a function of.

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
      StageError: it is missing or damaged.
    """
    path = path_of(workdir, step)
    try:
        return _read(path).arrays
    except (FileNotFoundError, *_DAMAGED) as error:
        raise StageError(
            f"{path}: the checkpoint with the best validation loss is missing or damaged "
            f"({error}); publish the last weights with --config.early_stopping_patience=0, or "
            "train anew with --overwrite"
        ) from error


def refuse_other_run(workdir: str, there: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises a UsageError if what workdir holds is a function of other things than this run."""
    differ = manifest_lib.differences(there, run)
    if differ:
        raise UsageError(
            f"--workdir={workdir}: holds the state of another run ({'; '.join(differ)}); "
            "name another directory, or pass --overwrite"
        )
