"""The training loop: resume, train, evaluate, checkpoint, stop, publish."""

import json
import signal
import sys
import time

import ml_collections
import tensorflow as tf

from pipeline import quarantine, shards, stage, storage
from pipeline.errors import Interrupted, StageError, UsageError
from pipeline.progress import Progress
from trainer import batches, checkpoints, publish
from trainer import config as config_lib
from trainer import metrics as metrics_lib
from trainer.run import Run

EXPORT = "export"
# Written before anything else, so it marks a workdir as one of ours.
_CONFIG = "config.json"
# All that a run writes beside config.json.
_NAMES = (
    EXPORT,
    checkpoints.DIRECTORY,
    metrics_lib.METRICS,
    metrics_lib.TIMINGS,
    metrics_lib.TENSORBOARD,
)


class _StopSignal:
    """Whether SIGTERM or SIGINT has come; a second SIGINT ends the process at once."""

    def __init__(self):
        self.received = False

    def __enter__(self):
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupted(run: Run, path: str) -> Interrupted:
    return Interrupted(
        f"stopped by a signal at step {run.step} of {run.total_steps}, state saved in {path}; "
        "run the same command to go on"
    )


def _train_to_epoch_end(run: Run, progress: Progress, stop: _StopSignal) -> None:
    """Trains what is left of the current epoch, with checkpoints on the way.

    Raises:
      Interrupted: a signal came; the state is saved.
    """
    config, per_epoch = run.config, run.steps_per_epoch
    epoch, batch = divmod(run.step, per_epoch)
    order = tf.constant(batches.permutation(config.seed, epoch, run.num_examples))
    while batch < per_epoch:
        to_checkpoint = config.checkpoint_every_steps - run.step % config.checkpoint_every_steps
        num_steps = min(config.steps_per_loop, per_epoch - batch, to_checkpoint)
        run.train_steps(order, num_steps)
        batch += num_steps
        progress.update(batch, metrics_lib.describe(run.metrics(run.epoch_sums)))
        if batch == per_epoch:
            return  # The end of an epoch is reported before it is saved.
        if stop.received:
            progress.close()
            raise _interrupted(run, run.save())
        if num_steps == to_checkpoint:
            run.save()


def _report_epoch(
    run: Run, lines: metrics_lib.JsonLines, board: metrics_lib.TensorBoard, *, epoch: int
) -> str:
    """Writes the metrics of an epoch that has just ended; returns them as text."""
    about = {"step": run.step, "epoch": epoch}
    train = run.metrics(run.epoch_sums)
    lines.append({**about, "split": "train", **train})
    board.scalars(run.step, "train", train)
    text = metrics_lib.describe(train)
    if "validation" not in run.images:
        run.show_reconstructions(board, "train")
        return text
    validation = run.evaluate("validation")
    lines.append({**about, "split": "validation", **validation})
    board.scalars(run.step, "validation", validation)
    run.show_reconstructions(board, "validation")
    return f"{text} | validation loss {validation['loss']:.2f}"


def _fit(run: Run, lines: metrics_lib.JsonLines, stop: _StopSignal) -> None:
    """Trains from run.step to the end, or raises Interrupted with the state saved."""
    config = run.config
    board = metrics_lib.TensorBoard(run.workdir)
    timings = metrics_lib.JsonLines(
        storage.join(run.workdir, metrics_lib.TIMINGS), up_to_step=run.step
    )
    while run.step < run.total_steps:
        epoch = run.step // run.steps_per_epoch + 1
        progress = Progress(
            f"epoch {epoch}/{config.num_epochs}", total=run.steps_per_epoch, unit="steps"
        )
        began, first_step = time.monotonic(), run.step
        _train_to_epoch_end(run, progress, stop)
        train_secs = time.monotonic() - began
        text = _report_epoch(run, lines, board, epoch=epoch)
        rate = (run.step - first_step) * config.batch_size / train_secs
        timing = {
            "images_per_sec": rate,
            "train_secs": train_secs,
            "epoch_secs": time.monotonic() - began,
        }
        timings.append({"step": run.step, "epoch": epoch, **timing})
        board.scalars(run.step, "time", timing)
        board.flush()
        progress.close(f"{progress.label}, step {run.step:,}, {rate:,.0f} images/s, {text}")
        run.epoch_sums[:] = 0
        path = run.save()
        if stop.received and run.step < run.total_steps:
            raise _interrupted(run, path)


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
    if manifest["step"] != run.total_steps:
        return None
    try:
        for entry in manifest["files"]:
            stage.read_file(export_dir, entry)
    except StageError as error:
        print(f"train: {error}; publishing it again", file=sys.stderr)
        return None
    return manifest


def _publish(run: Run, lines: metrics_lib.JsonLines) -> dict:
    """Evaluates on `test`, publishes the model and returns its manifest."""
    if "test" in run.images:
        end = {"step": run.step, "epoch": run.config.num_epochs, "split": "test"}
        lines.append(end | run.evaluate("test"))
    last = {split: lines.last(split) for split in ("train", "validation", "test")}
    return publish.publish(
        storage.join(run.workdir, EXPORT),
        config=run.config,
        run=run.identity,
        image_shape=run.dataset.image_shape,
        weights=[variable.numpy() for variable in run.vae.variables],
        step=run.step,
        metrics={split: line for split, line in last.items() if line},
        records=run.records,
    )


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
    if "train" not in dataset.splits or not dataset.num_examples("train"):
        raise StageError(
            f"data_dir={config.data_dir}: no records in split 'train'; found {dataset.splits}"
        )
    run = Run(config, workdir, dataset)
    _check_losses(run, max_quarantined)
    _refuse_foreign(workdir, run, overwrite=overwrite)
    storage.make_dirs(workdir)
    with storage.lock(workdir), _StopSignal() as stop:
        checkpoint = manifest = None
        if not overwrite:
            checkpoint = checkpoints.restore_newest(workdir, run.identity)
            manifest = _finished(run)
        done = "already finished" if manifest else "finished"
        if not manifest:
            manifest = _resume(run, checkpoint, stop, overwrite=overwrite)
    shown = "; ".join(
        f"{split}: {metrics_lib.describe(line)}" for split, line in manifest["metrics"].items()
    )
    where = storage.join(workdir, EXPORT)
    print(f"train: {done}: {shown}; model_id {manifest['model_id']}, {where}")
    return manifest


def _resume(
    run: Run, checkpoint: checkpoints.Checkpoint | None, stop: _StopSignal, *, overwrite: bool
) -> dict:
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
    storage.remove_unfinished(workdir)
    run.build()  # Reads the data: what fails there leaves an old run as it was.
    if overwrite:
        for name in _NAMES:
            storage.remove(storage.join(workdir, name))
    if checkpoint:
        run.restore(checkpoint)
    storage.write_bytes(storage.join(workdir, _CONFIG), stage.readable_json(config.to_dict()))
    _write_quarantine(run)
    lines = metrics_lib.JsonLines(storage.join(workdir, metrics_lib.METRICS), up_to_step=run.step)
    where = f"step {run.step:,}" if run.step else "the start"
    counts = ", ".join(f"{split} {count:,}" for split, (_, count) in run.images.items())
    print(
        f"train: from {where} to step {run.total_steps:,}, "
        f"{run.strategy.num_replicas_in_sync} replica(s), {counts}",
        file=sys.stderr,
    )
    _fit(run, lines, stop)
    return _publish(run, lines)
