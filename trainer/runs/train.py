"""A run from its command to the published model: checks, resumption, training, publishing.

The loop over epochs is in epoch_loop.py.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping

import ml_collections
import numpy as np
import tensorflow as tf

from pipeline.cli import metrics_file
from pipeline.cli.errors import Interrupted, StageError, UsageError
from pipeline.datasets import reader
from pipeline.machine import arithmetic, gpus
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import quarantine, verification
from pipeline.storage import files, lock
from trainer.runs import board as board_lib
from trainer.runs import checkpoints, epoch_loop, publish
from trainer.runs import config as config_lib
from trainer.runs import metrics as metrics_lib
from trainer.runs.plan import RunPlan
from trainer.runs.run import Run, Stopped
from trainer.runs.stop_signal import StopSignal

EXPORT = "export"
# A run writes config.json first, so the file marks a workdir of this command.
_CONFIG = "config.json"
# The other files and directories that a run writes.
_OUTPUTS = (
    EXPORT,
    checkpoints.DIRECTORY,
    metrics_lib.METRICS,
    metrics_lib.TIMINGS,
    board_lib.DIRECTORY,
)
# Images whose values decide whether another likelihood is recommended.
_NUM_LOOKED_AT = 64
# Keys of the config that say when a run ends, and with which of its weights.
_END_KEYS = ("num_epochs", "early_stopping_patience")


def _fit_and_publish(run: Run) -> dict | None:
    """Trains from run.step on and publishes the model.

    Returns:
      The model's manifest; None at a worker that is not the chief.

    Raises:
      Interrupted: a signal came; the state is saved.
    """
    reports = epoch_loop.Reports(run)
    run.best_step = epoch_loop.best_step(reports.metrics)
    epoch_loop.observe_validation(reports.metrics)
    if run.step < run.plan.total_steps and not run.epoch_is_complete:
        run.trace()  # Outside StopSignal, so that a signal ends the process at once.
    with StopSignal(run.stop), reports.profiler:
        try:
            epoch_loop.fit(run, reports)
        except Stopped:
            raise _interrupted(run, run.save()) from None
        published_step = run.step
        if run.config.early_stopping_patience and run.best_step not in (None, run.step):
            published_step = run.best_step
            run.load_best_weights()
        try:
            epoch_loop.evaluate_test(run, reports, published_step)
        except Stopped:
            path = checkpoints.checkpoint_path(run.workdir, run.step)
            raise _interrupted(run, path) from None
    if not run.plan.is_chief:
        _wait_for_publishing(run)
        return None
    reports.board.show_points(run.vae)
    reports.board.flush()
    published_metrics = {
        split: line
        for split in ("train", "validation", "test")
        for line in reports.metrics.split_lines(split)
        if line["step"] == published_step
    }
    manifest = publish.publish_model(
        files.join(run.workdir, EXPORT),
        config=run.config,
        run=run.plan.identity,
        image_shape=run.plan.dataset.image_shape,
        class_names=run.plan.dataset.manifest["class_names"],
        weights=[variable.numpy() for variable in run.vae.variables],
        step=published_step,
        trained_steps=run.step,
        metrics=published_metrics,
        records=run.plan.records,
    )
    _wait_for_publishing(run)
    return manifest


def _wait_for_publishing(run: Run) -> None:
    """Waits until the chief has published, so that no worker of a cluster ends before.

    If the chief is killed while it publishes, a scheduler restarts it, but no worker that has
    ended with status 0; and a cluster with a missing worker never starts.
    """
    run.sum_over_replicas(0)


def _interrupted(run: Run, path: str) -> Interrupted:
    return Interrupted(
        f"stopped by a signal at step {run.step} of {run.plan.total_steps}, state saved in {path}; "
        "run the same command to resume"
    )


def _refuse_foreign(workdir: str, plan: RunPlan, *, overwrite: bool) -> bool:
    """Refuses a directory of another program, and the workdir of a run with another config.

    If config.json is lost, for example to a power cut, a checkpoint identifies the run. With
    `overwrite` and no intact checkpoint, the names in the directory do.

    Returns:
      False if config.json must be written again; True if it is intact or the run begins anew.

    Raises:
      StageError: the directory holds files that no run has written.
      UsageError: the directory holds the state of another config's run, without `overwrite`.
    """
    path, checkpoint = files.join(workdir, _CONFIG), None
    identity: dict = {"config": plan.identity["config"]}
    try:
        saved_config = json.loads(files.read_bytes(path))
        saved_identity = {"config": {key: saved_config[key] for key in identity["config"]}}
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        # Other errors: valid JSON of another program.
        if isinstance(error, (FileNotFoundError, ValueError)):
            checkpoint = checkpoints.read_newest(workdir)
            if not checkpoint and overwrite and _is_workdir(workdir):
                return True
        if not checkpoint and not isinstance(error, FileNotFoundError):
            raise StageError(
                f"{path}: not a config of this command ({error!r}); name a new directory"
            ) from error
        if not checkpoint:
            _refuse_outputs(workdir)
            return True
        saved_identity, identity = checkpoint.run, plan.identity
        print(
            f"train: {path} is missing or damaged; the checkpoint of step {checkpoint.step} "
            "identifies the run",
            file=sys.stderr,
        )
    if not overwrite:
        checkpoints.refuse_other_run(workdir, saved_identity, identity)
    return checkpoint is None


def _is_workdir(workdir: str) -> bool:
    """Whether a directory holds outputs of a run, and nothing else."""
    names = [name for name in files.list_finished_names(workdir) if not lock.is_ours(name)]
    of_runs = {_CONFIG, quarantine.DIRECTORY, *_OUTPUTS}
    return of_runs.issuperset(names) and checkpoints.newest_path(workdir) is not None


def _refuse_outputs(workdir: str) -> None:
    """Refuses a directory that holds a name of a run's outputs."""
    # A manifest would be another stage's output.
    for name in (*_OUTPUTS, manifest_lib.MANIFEST):
        if files.exists(files.join(workdir, name)):
            raise StageError(
                f"--workdir={workdir}: holds {name!r} and no {_CONFIG}, so it is not a workdir of "
                "this command; name a new directory"
            )


def _write_config(plan: RunPlan) -> None:
    data = manifest_lib.readable_json(plan.config.to_dict())
    files.write_bytes(files.join(plan.workdir, _CONFIG), data)
    files.sync(plan.workdir)  # Without config.json the files that follow are of no run.


def _finished_manifest(plan: RunPlan, checkpoint: checkpoints.Checkpoint | None) -> dict | None:
    """The manifest of the published model, if this run is finished and the model undamaged.

    Args:
      plan: the run's plan.
      checkpoint: the run's newest checkpoint.

    Raises:
      UsageError: the model belongs to another run.
    """
    export_dir = files.join(plan.workdir, EXPORT)
    if not files.exists(files.join(export_dir, manifest_lib.MANIFEST)):
        return None
    try:
        manifest = manifest_lib.read_manifest(export_dir, "train", "--workdir")
    except StageError as error:
        if checkpoint is None:  # Nothing tells whose model this is.
            raise
        print(f"train: {error}; publishing the model again", file=sys.stderr)
        return None
    published_identity = {key: manifest["made_from"].get(key) for key in plan.identity}
    checkpoints.refuse_other_run(plan.workdir, published_identity, plan.identity)
    if any(manifest["config"].get(key) != plan.config[key] for key in _END_KEYS):
        # The config's end has changed since; both ends may give the same model.
        trained_steps = manifest["trained_steps"]
        lines = metrics_lib.JsonLines(
            files.join(plan.workdir, metrics_lib.METRICS),
            up_to_step=trained_steps,
            writes=False,
            checkpoint_text=checkpoint and checkpoint.metrics_text,
        )
        best_step = plan.config.early_stopping_patience and epoch_loop.best_step(lines)
        published_step = best_step or trained_steps
        if not epoch_loop.is_over(plan, lines, trained_steps) or manifest["step"] != published_step:
            return None
    try:
        for entry in manifest["files"]:
            manifest_lib.read_file(export_dir, entry)
        for path in verification.unlisted_in_model(export_dir, manifest["files"]):
            raise StageError(f"{path}: is not in {manifest_lib.MANIFEST}")
    except StageError as error:
        print(f"train: {error}; publishing the model again", file=sys.stderr)
        return None
    return manifest


def _restore_files(
    plan: RunPlan, checkpoint: checkpoints.Checkpoint | None, manifest: Mapping, *, has_config: bool
) -> None:
    """Writes config.json and metrics.jsonl of a finished run again if they are lost or changed."""
    if not has_config:
        _write_config(plan)
    # A killed try may have published without waiting for the disk.
    files.sync(files.join(plan.workdir, EXPORT))
    text = checkpoint and checkpoint.metrics_text
    if not text or checkpoint.step != manifest["trained_steps"]:
        return  # No checkpoint has a copy of the lines.
    path = files.join(plan.workdir, metrics_lib.METRICS)
    if "test" in manifest["metrics"]:  # Written after the last checkpoint.
        text += json.dumps(manifest["metrics"]["test"]) + "\n"
    if not files.exists(path) or files.read_bytes(path) != text.encode():
        print(f"train: {path} is missing or changed; writing it again", file=sys.stderr)
        files.write_bytes(path, text.encode())
        files.sync(plan.workdir)


def _check_damaged_shards(plan: RunPlan, limit: quarantine.Limit) -> None:
    """Raises a StageError if too many records are unreadable, or no training record is left."""
    directory = plan.dataset.directory
    quarantine.check(
        limit,
        (line for shard in plan.damaged_shards for line in shard.lines(directory)),
        num_quarantined=plan.records["quarantined"],
        num_records=plan.records["read"],
    )
    if not plan.num_examples:
        raise StageError(
            f"data_dir={plan.config.data_dir}: no record of split 'train' is readable; make the "
            "data set again"
        )


def _write_quarantine(plan: RunPlan) -> None:
    """Lists the unreadable records, in a file for each damaged shard."""
    files.remove(files.join(plan.workdir, quarantine.DIRECTORY))
    for shard in plan.damaged_shards:
        lines = shard.lines(plan.dataset.directory)
        quarantine.write(plan.workdir, shard.name, lines, num_quarantined=shard.num_records)
    files.sync(files.join(plan.workdir, quarantine.DIRECTORY))


def train(
    config: ml_collections.ConfigDict,
    *,
    workdir: str,
    overwrite: bool = False,
    on_corrupt: str = "fail",
    max_quarantined: quarantine.Limit = quarantine.DEFAULT_LIMIT,
    cache_dir: str | None = None,
) -> dict:
    """Trains a model, or resumes an interrupted run, and publishes the model.

    Args:
      config: configs/mnist.py explains its keys.
      workdir: directory of checkpoints, metrics and the model; local path or fsspec URL.
      overwrite: whether to replace another run's state in workdir.
      on_corrupt: what to do with a damaged shard, see reader.Dataset.
      max_quarantined: maximum number or share of unreadable records.
      cache_dir: local directory that keeps shards of a URL; None to fetch them at each start.

    Returns:
      The manifest of the published model.

    Raises:
      UsageError: the config is not valid, or workdir belongs to another run.
      StageError: the data are unusable, or the loss became NaN.
      Interrupted: a signal came; the state is saved.
    """
    config_lib.check(config)
    dataset = reader.Dataset(config.data_dir, on_corrupt=on_corrupt, cache_dir=cache_dir)
    config_lib.check_image_shape(config, dataset.image_shape)
    if config.beta is None:
        config = config_lib.resolve(config, dataset.image_shape)
        print(
            f"train: beta {config.beta:.4g} is derived from "
            f"{'×'.join(map(str, dataset.image_shape))} pixels and {config.latent_dim} latents; "
            "--config.beta sets another",
            file=sys.stderr,
        )
    if not dataset.has_examples("train"):
        raise StageError(
            f"data_dir={config.data_dir}: no records in split 'train'; found {dataset.splits}"
        )
    if config.early_stopping_patience and not dataset.has_examples("validation"):
        raise UsageError(
            f"--config.early_stopping_patience={config.early_stopping_patience}: "
            f"data_dir={config.data_dir} has no split 'validation', which early stopping needs; "
            "make the data set with --validation_fraction, or set the patience to 0"
        )
    if config.warm_start_from == files.join(workdir, EXPORT):
        raise UsageError(
            f"--config.warm_start_from={config.warm_start_from}: this run will write its own model "
            "there; expected another directory, or another --workdir"
        )
    plan = RunPlan(config, workdir, dataset)
    config_lib.check_length(config, plan.total_steps)
    metrics_file.observe_records(used=plan.records["used"], quarantined=plan.records["quarantined"])
    _check_damaged_shards(plan, max_quarantined)
    has_config = _refuse_foreign(workdir, plan, overwrite=overwrite)
    files.make_dirs(workdir)
    with lock.hold(workdir) if plan.is_chief else contextlib.nullcontext():
        checkpoint = manifest = None
        if not overwrite:
            checkpoint = checkpoints.restore_newest(workdir, plan.identity)
            manifest = _finished_manifest(plan, checkpoint)
        if manifest and plan.is_chief:
            _restore_files(plan, checkpoint, manifest, has_config=has_config)
            epoch_loop.observe_validation(
                metrics_lib.JsonLines(
                    files.join(workdir, metrics_lib.METRICS),
                    up_to_step=manifest["trained_steps"],
                    writes=False,
                )
            )
        status = "already finished" if manifest else "finished"
        if not manifest:
            try:
                manifest = _resume(plan, checkpoint, overwrite=overwrite)
            except tf.errors.OpError as error:
                raise _explain(error, plan) from error
    if not manifest:
        return {}  # Only the chief publishes.
    metrics = "; ".join(
        f"{split}: {metrics_lib.describe(line)}" for split, line in manifest["metrics"].items()
    )
    export_dir = files.join(workdir, EXPORT)
    print(f"train: {status}: {metrics}; model_id {manifest['model_id']}, {export_dir}")
    return manifest


def _some_images(dataset: reader.Dataset) -> np.ndarray:
    """The first images of train, a random sample: uint8 (n, H, W, C)."""
    records = dataset.read_head("train", _NUM_LOOKED_AT)
    pixels = np.frombuffer(b"".join(record.image for record in records), np.uint8)
    return pixels.reshape(-1, *dataset.image_shape)


def _explain(error: tf.errors.OpError, plan: RunPlan) -> Exception:
    """An error with a remedy in place of TensorFlow's error; the same error if none is known."""
    if isinstance(error, tf.errors.ResourceExhaustedError):
        for disk_full in map(os.strerror, files.FULL):  # From TensorBoard's events or a SavedModel.
            match = re.match(rf"(?:.*}}}} )?(.+?); {disk_full}", error.message)
            if match:
                return StageError(f"{match[1]}: {disk_full}; make room on that disk")
        match = re.search(r"shape ?\[[\d,]*\]", error.message)
        tensor = f" for a tensor of {match[0]}" if match else ""
        return StageError(
            f"out of memory{tensor}; try a smaller --config.batch_size or model, more replicas, or "
            "--config.data_placement=memory_mapped"
        )
    if plan.is_cluster:
        newest = checkpoints.newest_path(plan.workdir)
        return Interrupted(
            f"another worker of the cluster is gone or out of reach ({type(error).__name__}); "
            f"start the job again, and it resumes from {newest or 'the start'}"
        )
    return error


def _resume(
    plan: RunPlan, checkpoint: checkpoints.Checkpoint | None, *, overwrite: bool
) -> dict | None:
    """Trains from the checkpoint, or from the start, and publishes; see `_fit_and_publish`."""
    config, workdir = plan.config, plan.workdir
    if checkpoint and checkpoint.step > plan.total_steps:
        raise UsageError(
            f"--config.num_epochs={config.num_epochs}: ends at step {plan.total_steps}, but the "
            f"run in {workdir} is already at step {checkpoint.step}; expected at least as many "
            "epochs as are done, or --overwrite"
        )
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    # Reads the data before anything is removed: an error leaves an old run intact.
    run = Run(plan)
    if checkpoint:
        run.restore(checkpoint)
    run.check_agreement()
    if plan.is_chief:
        files.remove_unfinished(workdir)
        if overwrite:
            for name in _OUTPUTS:
                files.remove(files.join(workdir, name))
        _write_config(plan)
        _write_quarantine(plan)
    start = f"step {run.step:,}" if run.step else "the start"
    counts = ", ".join(f"{split} {data.num_examples:,}" for split, data in run.splits.items())
    print(
        f"train: from {start} to step {plan.total_steps:,}, "
        f"{run.strategy.num_replicas_in_sync} replica(s), {counts}, on {arithmetic.kind()}",
        file=sys.stderr,
    )
    if plan.is_chief and (note := config_lib.likelihood_note(config, _some_images(plan.dataset))):
        print(f"train: {note}", file=sys.stderr)
    if gpus.visible() and not tf.config.list_physical_devices("GPU"):
        reason = gpus.why_unused()
        print(f"train: warning: TensorFlow uses no GPU of this machine: {reason}", file=sys.stderr)
    return _fit_and_publish(run)
