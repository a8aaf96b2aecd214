"""The training loop: resume, train, evaluate, checkpoint, stop, publish."""

import contextlib
import json
import re
import sys
import time

import ml_collections
import tensorflow as tf

from pipeline import quarantine, shards, stage, storage
from pipeline.errors import Interrupted, StageError, UsageError
from pipeline.progress import Progress
from trainer import board as board_lib
from trainer import checkpoints, publish
from trainer import config as config_lib
from trainer import metrics as metrics_lib
from trainer.run import Run, Stopped
from trainer.stop_signal import StopSignal

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


class _Reports:
    """Where a run reports: the lines that are kept, and TensorBoard."""

    def __init__(self, run: Run):
        """Opens the files and drops what an earlier try wrote after run.step."""

        def open_lines(name: str) -> metrics_lib.JsonLines:
            path = storage.join(run.workdir, name)
            return metrics_lib.JsonLines(path, up_to_step=run.step, writes=run.is_chief)

        self.metrics = open_lines(metrics_lib.METRICS)
        self.timings = open_lines(metrics_lib.TIMINGS)
        self.board = board_lib.Board(run.workdir) if run.is_chief else None


def _train_to_epoch_end(run: Run, progress: Progress) -> None:
    """Trains what is left of the current epoch, with checkpoints on the way.

    Raises:
      Stopped: a signal came.
    """
    every, visit = run.config.checkpoint_every_steps, run.visit_epoch()
    while True:
        done = run.step % run.steps_per_epoch
        num_steps = min(
            run.config.steps_per_loop, run.steps_per_epoch - done, every - run.step % every
        )
        run.train_steps(visit, num_steps)
        progress.update(done + num_steps, metrics_lib.describe(run.metrics(run.epoch_sums)))
        if run.epoch_is_complete:
            return  # It is reported before it is saved.
        if run.step % every == 0:
            run.save()


def _report_epoch(run: Run, reports: _Reports, epoch: int) -> str:
    """Writes the metrics of an epoch that has just ended; returns them as text.

    Raises:
      Stopped: a signal came; nothing is written.
    """
    shown = {"train": run.metrics(run.epoch_sums)}
    if "validation" in run.splits:
        shown["validation"] = run.evaluate("validation")
    for split, values in shown.items():
        reports.metrics.append({"step": run.step, "epoch": epoch, "split": split, **values})
    if reports.board:
        for split, values in shown.items():
            reports.board.scalars(run.step, split, values)
        reports.board.scalars(run.step, "schedule", run.schedules())
        pixels = run.splits[list(shown)[-1]].head(board_lib.NUM_RECORDS)
        reports.board.show_model(run.step, run.vae, pixels, run.config)
    text = metrics_lib.describe(shown["train"])
    if "validation" in shown:
        text += f" | validation loss {shown['validation']['loss']:.2f}"
        _warn_if_collapsed(run, shown["validation"])
    return text


def _warn_if_collapsed(run: Run, values: dict[str, float]) -> None:
    """Says on standard error that no latent is in use, and what may help."""
    if values["active_units"] == 0:
        print(
            f"train: warning: the posterior has collapsed: none of {run.config.latent_dim} latents "
            f"is active, kl {values['kl']:.4f}; try a smaller --config.beta, "
            "--config.beta_warmup_steps or --config.free_bits",
            file=sys.stderr,
        )


def _best_step(lines: metrics_lib.JsonLines) -> int | None:
    """The step with the smallest validation loss, the first of equals."""
    validation = lines.of("validation")
    return min(validation, key=lambda line: line["loss"])["step"] if validation else None


def _is_over(run: Run, lines: metrics_lib.JsonLines, step: int) -> bool:
    """Whether there is nothing to train after `step`: the last one, or no better for long."""
    patience, validation = run.config.early_stopping_patience, lines.of("validation")
    if step == run.total_steps or not patience:
        return step == run.total_steps
    since_best = [line for line in validation if line["step"] > _best_step(lines)]
    return len(since_best) >= patience


def _fit(run: Run, reports: _Reports) -> None:
    """Trains from run.step to the end.

    Raises:
      Stopped: a signal came; all that was done is in the run's state.
    """
    while run.epoch_is_complete or not _is_over(run, reports.metrics, run.step):
        epoch = (run.step - run.epoch_is_complete) // run.steps_per_epoch + 1
        progress = Progress(
            f"epoch {epoch}/{run.config.num_epochs}", total=run.steps_per_epoch, unit="steps"
        )
        began, first_step = time.monotonic(), run.step
        try:
            if not run.epoch_is_complete:  # It was stopped before its report.
                _train_to_epoch_end(run, progress)
            train_secs, num_steps = time.monotonic() - began, run.step - first_step
            text = _report_epoch(run, reports, epoch)
        except Stopped:
            progress.close()
            raise
        timing = {"train_secs": train_secs, "epoch_secs": time.monotonic() - began}
        if num_steps:
            timing["images_per_sec"] = num_steps * run.config.batch_size / train_secs
            timing["step_secs"] = train_secs / num_steps
            text = f"{timing['images_per_sec']:,.0f} images/s, {text}"
        reports.timings.append({"step": run.step, "epoch": epoch, **timing})
        if reports.board:
            reports.board.scalars(run.step, "time", timing)
            reports.board.flush()
        progress.close(f"{progress.label}, step {run.step:,}, {text}")
        run.epoch_sums[:] = 0
        run.best_step = _best_step(reports.metrics)
        run.save()


def _evaluate_test(run: Run, reports: _Reports, step: int) -> None:
    """Writes the metrics of the weights to publish, which are those after `step`.

    Raises:
      Stopped: a signal came; nothing is written.
    """
    if "test" in run.splits:
        about = {"step": step, "epoch": step // run.steps_per_epoch, "split": "test"}
        values = run.evaluate("test")
        reports.metrics.append({**about, **values})
        if "validation" not in run.splits:
            _warn_if_collapsed(run, values)


def _fit_and_publish(run: Run) -> dict | None:
    """Goes from run.step to the published model; returns its manifest, None unless the chief.

    Raises:
      Interrupted: a signal came; the state is saved.
    """
    reports = _Reports(run)
    run.best_step = _best_step(reports.metrics)
    if run.step < run.total_steps and not run.epoch_is_complete:
        run.trace()  # Before signals wait for a step: until then there is nothing to save.
    with StopSignal(run.steps.stop):
        try:
            _fit(run, reports)
        except Stopped:
            raise _interrupted(run, run.save()) from None
        published_step = run.step
        if run.config.early_stopping_patience and run.best_step not in (None, run.step):
            published_step = run.best_step
            run.take_best_weights()
        try:
            _evaluate_test(run, reports, published_step)
        except Stopped:
            raise _interrupted(run, checkpoints.path_of(run.workdir, run.step)) from None
    if not run.is_chief:
        return None
    lines = {split: reports.metrics.of(split) for split in ("train", "validation", "test")}
    at_step = {
        split: line
        for split, of_split in lines.items()
        for line in of_split
        if line["step"] == published_step
    }
    return publish.publish(
        storage.join(run.workdir, EXPORT),
        config=run.config,
        run=run.identity,
        image_shape=run.dataset.image_shape,
        weights=[variable.numpy() for variable in run.vae.variables],
        step=published_step,
        trained_steps=run.step,
        metrics=at_step,
        records=run.records,
    )


def _interrupted(run: Run, path: str) -> Interrupted:
    return Interrupted(
        f"stopped by a signal at step {run.step} of {run.total_steps}, state saved in {path}; "
        "run the same command to go on"
    )


def _refuse_foreign(workdir: str, run: Run, *, overwrite: bool) -> None:
    """Refuses a workdir that is none, or that another config's run has begun in.

    Raises:
      StageError: the directory holds files under our names that no run has made.
      UsageError: another config's state is there, and it may not be overwritten.
    """
    path = storage.join(workdir, _CONFIG)
    if not storage.exists(path):
        names = (*_NAMES, stage.MANIFEST)  # The last one: an output of another stage.
        found = [name for name in names if storage.exists(storage.join(workdir, name))]
        if found:
            raise StageError(
                f"--workdir={workdir}: holds {found[0]!r} and no {_CONFIG}, so it is no workdir of "
                "this command; name a new directory"
            )
        return
    try:
        there = json.loads(storage.read_bytes(path))
        there = {key: there[key] for key in run.identity["config"]}
    except (ValueError, TypeError, KeyError) as error:
        raise StageError(
            f"{path}: no config of this command ({error!r}); name a new directory"
        ) from error
    if not overwrite:
        checkpoints.refuse_other_run(workdir, {"config": there}, {"config": run.identity["config"]})


def _finished(run: Run) -> dict | None:
    """The manifest of the published model, if this very run is done and it is whole.

    Raises:
      UsageError: the model is another run's.
    """
    export_dir = storage.join(run.workdir, EXPORT)
    if not storage.exists(storage.join(export_dir, stage.MANIFEST)):
        return None
    manifest = stage.read_manifest(export_dir, "train", "--workdir")
    there = {key: manifest["made_from"].get(key) for key in run.identity}
    checkpoints.refuse_other_run(run.workdir, there, run.identity)
    trained_steps = manifest["trained_steps"]
    lines = metrics_lib.JsonLines(
        storage.join(run.workdir, metrics_lib.METRICS), up_to_step=trained_steps, writes=False
    )
    by_patience = run.config.early_stopping_patience and _best_step(lines)
    published_step = by_patience or trained_steps
    if not _is_over(run, lines, trained_steps) or manifest["step"] != published_step:
        return None
    try:
        for entry in manifest["files"]:
            stage.read_file(export_dir, entry)
    except StageError as error:
        print(f"train: {error}; publishing it again", file=sys.stderr)
        return None
    return manifest


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
    storage.remove(storage.join(run.workdir, quarantine.DIRECTORY))
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
) -> dict:
    """Trains a model, or goes on where an earlier try stopped, and publishes it.

    Args:
      config: as configs/mnist.py explains.
      workdir: where checkpoints, metrics and the model go; local path or fsspec URL.
      overwrite: whether another run's state there may go.
      on_corrupt: what to do where a shard is damaged, see shards.Dataset.
      max_quarantined: how many records may be missing for that reason.

    Returns:
      The manifest of the published model.

    Raises:
      UsageError: the config can't be used, or workdir belongs to another run.
      StageError: the data can't be used, or the loss became NaN.
      Interrupted: a signal came; the state is saved.
    """
    config_lib.check(config)
    dataset = shards.Dataset(config.data_dir, on_corrupt=on_corrupt)
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
    run = Run(config, workdir, dataset)
    config_lib.check_length(config, run.total_steps)
    _check_losses(run, max_quarantined)
    _refuse_foreign(workdir, run, overwrite=overwrite)
    storage.make_dirs(workdir)
    with storage.lock(workdir) if run.is_chief else contextlib.nullcontext():
        checkpoint = manifest = None
        if not overwrite:
            checkpoint = checkpoints.restore_newest(workdir, run.identity)
            manifest = _finished(run)
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
    where = storage.join(workdir, EXPORT)
    print(f"train: {done}: {shown}; model_id {manifest['model_id']}, {where}")
    return manifest


def _named(error: tf.errors.OpError, run: Run) -> Exception:
    """What an error of TensorFlow means to whoever started the run; itself, if nobody knows."""
    if isinstance(error, tf.errors.ResourceExhaustedError):
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
        storage.remove_unfinished(workdir)
        for name in _NAMES if overwrite else ():
            storage.remove(storage.join(workdir, name))
        storage.write_bytes(storage.join(workdir, _CONFIG), stage.readable_json(config.to_dict()))
        _write_quarantine(run)
    where = f"step {run.step:,}" if run.step else "the start"
    counts = ", ".join(f"{split} {data.num_examples:,}" for split, data in run.splits.items())
    print(
        f"train: from {where} to step {run.total_steps:,}, "
        f"{run.strategy.num_replicas_in_sync} replica(s), {counts}",
        file=sys.stderr,
    )
    return _fit_and_publish(run)
