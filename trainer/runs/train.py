"""A run from its command to the published model: refuse, resume, train, publish.

The loop over epochs is in epoch_loop.py.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping

import ml_collections
import tensorflow as tf

from pipeline.cli.errors import Interrupted, StageError, UsageError
from pipeline.datasets import reader
from pipeline.machine import arithmetic, gpus
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine
from pipeline.storage import files, lock
from trainer.runs import board as board_lib
from trainer.runs import checkpoints, epoch_loop, publish
from trainer.runs import config as config_lib
from trainer.runs import metrics as metrics_lib
from trainer.runs.run import Run, Stopped
from trainer.runs.stop_signal import StopSignal

EXPORT = "export"
# Written before anything else, so it marks a workdir as one of ours.
_CONFIG = "config.json"
# All that a run writes beside config.json.
_NAMES = (
    EXPORT,
    checkpoints.DIRECTORY,
    metrics_lib.METRICS,
    metrics_lib.TIMINGS,
    board_lib.DIRECTORY,
)
# Keys of the config that say when a run ends, and with which of its weights.
_END_KEYS = ("num_epochs", "early_stopping_patience")


def _fit_and_publish(run: Run) -> dict | None:
    """Goes from run.step to the published model; returns its manifest, None unless the chief.

    Raises:
      Interrupted: a signal came; the state is saved.
    """
    reports = epoch_loop.Reports(run)
    run.best_step = epoch_loop.best_step(reports.metrics)
    if run.step < run.total_steps and not run.epoch_is_complete:
        run.trace()  # Before signals wait for a step: until then there is nothing to save.
    with StopSignal(run.steps.stop):
        try:
            epoch_loop.fit(run, reports)
        except Stopped:
            raise _interrupted(run, run.save()) from None
        published_step = run.step
        if run.config.early_stopping_patience and run.best_step not in (None, run.step):
            published_step = run.best_step
            run.take_best_weights()
        try:
            epoch_loop.evaluate_test(run, reports, published_step)
        except Stopped:
            raise _interrupted(run, checkpoints.path_of(run.workdir, run.step)) from None
    if not run.is_chief:
        _wait_for_publishing(run)
        return None
    lines = {split: reports.metrics.of(split) for split in ("train", "validation", "test")}
    at_step = {
        split: line
        for split, of_split in lines.items()
        for line in of_split
        if line["step"] == published_step
    }
    manifest = publish.publish(
        files.join(run.workdir, EXPORT),
        config=run.config,
        run=run.identity,
        image_shape=run.dataset.image_shape,
        weights=[variable.numpy() for variable in run.vae.variables],
        step=published_step,
        trained_steps=run.step,
        metrics=at_step,
        records=run.records,
    )
    _wait_for_publishing(run)
    return manifest


def _wait_for_publishing(run: Run) -> None:
    """Ends when the chief has published, so that no worker of a cluster is done before.

    A scheduler starts a chief that was stopped while it published, and no worker that has ended
    well; and a cluster that lacks one never begins.
    """
    run.sum_over_replicas(0)


def _interrupted(run: Run, path: str) -> Interrupted:
    return Interrupted(
        f"stopped by a signal at step {run.step} of {run.total_steps}, state saved in {path}; "
        "run the same command to go on"
    )


def _refuse_foreign(workdir: str, run: Run, *, overwrite: bool) -> bool:
    """Refuses a workdir that is none, or that another config's run has begun in.

    Where config.json is lost, to a power cut say, a checkpoint tells whose run this is.

    Returns:
      Whether config.json is there, or nothing is.

    Raises:
      StageError: the directory holds files under our names that no run has made.
      UsageError: another config's state is there, and it may not be overwritten.
    """
    path, checkpoint = files.join(workdir, _CONFIG), None
    asked: dict = {"config": run.identity["config"]}
    try:
        there = json.loads(files.read_bytes(path))
        there = {"config": {key: there[key] for key in asked["config"]}}
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, (FileNotFoundError, ValueError)):  # No JSON of somebody else.
            checkpoint = checkpoints.read_newest(workdir)
        if not checkpoint and not isinstance(error, FileNotFoundError):
            raise StageError(
                f"{path}: no config of this command ({error!r}); name a new directory"
            ) from error
        if not checkpoint:
            _refuse_names(workdir)
            return True
        there, asked = checkpoint.run, run.identity
        print(
            f"train: {path} is missing or damaged; the checkpoint of step {checkpoint.step} tells "
            "whose run this is",
            file=sys.stderr,
        )
    if not overwrite:
        checkpoints.refuse_other_run(workdir, there, asked)
    return checkpoint is None


def _refuse_names(workdir: str) -> None:
    """Refuses a directory with files under our names."""
    names = (*_NAMES, manifest_lib.MANIFEST)  # The last one: an output of another stage.
    found = [name for name in names if files.exists(files.join(workdir, name))]
    if found:
        raise StageError(
            f"--workdir={workdir}: holds {found[0]!r} and no {_CONFIG}, so it is no workdir of "
            "this command; name a new directory"
        )


def _write_config(run: Run) -> None:
    data = manifest_lib.readable_json(run.config.to_dict())
    files.write_bytes(files.join(run.workdir, _CONFIG), data)


def _finished(run: Run, checkpoint: checkpoints.Checkpoint | None) -> dict | None:
    """The manifest of the published model, if this very run is done and it is whole.

    Args:
      run: as begun.
      checkpoint: the newest of the run.

    Raises:
      UsageError: the model is another run's.
    """
    export_dir = files.join(run.workdir, EXPORT)
    if not files.exists(files.join(export_dir, manifest_lib.MANIFEST)):
        return None
    manifest = manifest_lib.read_manifest(export_dir, "train", "--workdir")
    there = {key: manifest["made_from"].get(key) for key in run.identity}
    checkpoints.refuse_other_run(run.workdir, there, run.identity)
    if any(manifest["config"].get(key) != run.config[key] for key in _END_KEYS):
        # Another end was asked for then; it may come to the same model.
        trained_steps = manifest["trained_steps"]
        lines = metrics_lib.JsonLines(
            files.join(run.workdir, metrics_lib.METRICS),
            up_to_step=trained_steps,
            writes=False,
            reported=checkpoint and checkpoint.reported,
        )
        by_patience = run.config.early_stopping_patience and epoch_loop.best_step(lines)
        published_step = by_patience or trained_steps
        if not epoch_loop.is_over(run, lines, trained_steps) or manifest["step"] != published_step:
            return None
    try:
        for entry in manifest["files"]:
            manifest_lib.read_file(export_dir, entry)
    except StageError as error:
        print(f"train: {error}; publishing it again", file=sys.stderr)
        return None
    return manifest


def _restore_files(
    run: Run, checkpoint: checkpoints.Checkpoint | None, manifest: Mapping, *, has_config: bool
) -> None:
    """Writes config.json and metrics.jsonl of a finished run again, where they are lost."""
    if not has_config:
        _write_config(run)
    if not checkpoint or not checkpoint.reported or checkpoint.step != manifest["trained_steps"]:
        return  # No checkpoint has the lines.
    path = files.join(run.workdir, metrics_lib.METRICS)
    text = checkpoint.reported
    if "test" in manifest["metrics"]:  # Written after the last checkpoint.
        text += json.dumps(manifest["metrics"]["test"]) + "\n"
    if not files.exists(path) or files.read_bytes(path) != text.encode():
        print(f"train: {path} is not as the run left it; written again", file=sys.stderr)
        files.write_bytes(path, text.encode())


def _check_losses(run: Run, limit: quarantine.Limit) -> None:
    """Raises a StageError if too much of the data cannot be had, or nothing is left of it."""
    quarantine.check(
        limit,
        (line for loss in run.losses for line in loss.lines(run.dataset.directory)),
        num_quarantined=run.records["quarantined"],
        num_records=run.records["read"],
    )
    if not run.num_examples:
        raise StageError(
            f"data_dir={run.config.data_dir}: no record of split 'train' can be had; make the data "
            "set again"
        )


def _write_quarantine(run: Run) -> None:
    """Names what of the data cannot be had, in a file for each damaged shard."""
    files.remove(files.join(run.workdir, quarantine.DIRECTORY))
    for loss in run.losses:
        lines = loss.lines(run.dataset.directory)
        quarantine.write(run.workdir, loss.name, lines, num_quarantined=loss.num_records)


def train(
    config: ml_collections.ConfigDict,
    *,
    workdir: str,
    overwrite: bool = False,
    on_corrupt: str = "fail",
    max_quarantined: quarantine.Limit = quarantine.DEFAULT_LIMIT,
    cache_dir: str | None = None,
) -> dict:
    """Trains a model, or goes on where an earlier try stopped, and publishes it.

    Args:
      config: as configs/mnist.py explains.
      workdir: where checkpoints, metrics and the model go; local path or fsspec URL.
      overwrite: whether another run's state there may go.
      on_corrupt: what to do where a shard is damaged, see reader.Dataset.
      max_quarantined: how many records may be missing for that reason.
      cache_dir: local directory that keeps shards of a URL; None to fetch them at each start.

    Returns:
      The manifest of the published model.

    Raises:
      UsageError: the config can't be used, or workdir belongs to another run.
      StageError: the data can't be used, or the loss became NaN.
      Interrupted: a signal came; the state is saved.
    """
    config_lib.check(config)
    dataset = reader.Dataset(config.data_dir, on_corrupt=on_corrupt, cache_dir=cache_dir)
    config_lib.check_image_shape(config, dataset.image_shape)
    if not dataset.has_examples("train"):
        raise StageError(
            f"data_dir={config.data_dir}: no records in split 'train'; found {dataset.splits}"
        )
    if config.early_stopping_patience and not dataset.has_examples("validation"):
        raise UsageError(
            f"--config.early_stopping_patience={config.early_stopping_patience}: "
            f"data_dir={config.data_dir} has no split 'validation' to judge by; make the data set "
            "with --validation_fraction, or set it to 0"
        )
    if config.warm_start_from == files.join(workdir, EXPORT):
        raise UsageError(
            f"--config.warm_start_from={config.warm_start_from}: is the model that this run is to "
            "write; expected another directory, or another --workdir"
        )
    run = Run(config, workdir, dataset)
    config_lib.check_length(config, run.total_steps)
    _check_losses(run, max_quarantined)
    has_config = _refuse_foreign(workdir, run, overwrite=overwrite)
    files.make_dirs(workdir)
    with lock.hold(workdir) if run.is_chief else contextlib.nullcontext():
        checkpoint = manifest = None
        if not overwrite:
            checkpoint = checkpoints.restore_newest(workdir, run.identity)
            manifest = _finished(run, checkpoint)
        if manifest and run.is_chief:
            _restore_files(run, checkpoint, manifest, has_config=has_config)
        done = "already finished" if manifest else "finished"
        if not manifest:
            try:
                manifest = _resume(run, checkpoint, overwrite=overwrite)
            except tf.errors.OpError as error:
                raise _named(error, run) from error
    if not manifest:
        return {}  # Only the chief publishes.
    shown = "; ".join(
        f"{split}: {metrics_lib.describe(line)}" for split, line in manifest["metrics"].items()
    )
    where = files.join(workdir, EXPORT)
    print(f"train: {done}: {shown}; model_id {manifest['model_id']}, {where}")
    return manifest


def _named(error: tf.errors.OpError, run: Run) -> Exception:
    """What an error of TensorFlow means to whoever started the run; itself, if nobody knows."""
    if isinstance(error, tf.errors.ResourceExhaustedError):
        for full in map(os.strerror, files.FULL):  # At TensorBoard's events, or a SavedModel.
            found = re.match(rf"(?:.*}}}} )?(.+?); {full}", error.message)
            if found:
                return StageError(f"{found[1]}: {full}; make room on that disk")
        found = re.search(r"shape ?\[[\d,]*\]", error.message)
        return StageError(
            f"out of memory{' for a tensor of ' + found[0] if found else ''}; try a smaller "
            "--config.batch_size or model, more replicas, or --config.data_placement=memory_mapped"
        )
    if run.is_cluster:
        newest = checkpoints.newest_path(run.workdir)
        return Interrupted(
            f"another worker of the cluster is gone or out of reach ({type(error).__name__}); "
            f"start the job again, it goes on from {newest or 'the start'}"
        )
    return error


def _resume(run: Run, checkpoint: checkpoints.Checkpoint | None, *, overwrite: bool) -> dict | None:
    """Takes a run from its checkpoint, or from the start, to its published model."""
    config, workdir = run.config, run.workdir
    if checkpoint and checkpoint.step > run.total_steps:
        raise UsageError(
            f"--config.num_epochs={config.num_epochs}: ends at step {run.total_steps}, and "
            f"{workdir} has come to step {checkpoint.step} already; expected at least as many "
            "epochs as are done, or --overwrite"
        )
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    run.build()  # Reads the data: what fails there leaves an old run as it was.
    if checkpoint:
        run.restore(checkpoint)
    run.check_agreement()
    if run.is_chief:
        files.remove_unfinished(workdir)
        for name in _NAMES if overwrite else ():
            files.remove(files.join(workdir, name))
        _write_config(run)
        _write_quarantine(run)
    where = f"step {run.step:,}" if run.step else "the start"
    counts = ", ".join(f"{split} {data.num_examples:,}" for split, data in run.splits.items())
    print(
        f"train: from {where} to step {run.total_steps:,}, "
        f"{run.strategy.num_replicas_in_sync} replica(s), {counts}, on {arithmetic.kind()}",
        file=sys.stderr,
    )
    if gpus.visible() and not tf.config.list_physical_devices("GPU"):
        why = gpus.why_unused()
        print(f"train: warning: TensorFlow uses no GPU of this machine: {why}", file=sys.stderr)
    return _fit_and_publish(run)
