"""The training loop: resume, train, evaluate, checkpoint, stop, publish."""

import math
import signal
import sys
import time

import keras
import ml_collections
import numpy as np
import tensorflow as tf

from pipeline import shards, stage, storage
from pipeline.errors import Interrupted, StageError
from pipeline.progress import Progress
from trainer import batches, checkpoints, publish, strategies
from trainer import config as config_lib
from trainer import metrics as metrics_lib
from trainer.model import VAE
from trainer.step import SUMS, Steps, place_on_devices

EXPORT = "export"
# Reconstructions shown on TensorBoard, from the first records of a split.
_NUM_PICTURES = 8


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


class _Run:
    """One run: its data on the devices, its model, and its files in workdir."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: str, dataset: shards.Dataset):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.num_examples = dataset.num_examples("train")
        self.steps_per_epoch = batches.steps_per_epoch(self.num_examples, config.batch_size)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        # What every weight is a function of, and what a checkpoint must agree with.
        self.identity = {
            "dataset_id": dataset.dataset_id,
            "config": config_lib.identity(config),
        }
        self.step = 0
        self.epoch_sums = np.zeros(len(SUMS))  # float64, so that chunks of steps add up exactly

    def build(self) -> None:
        """Makes strategy, model and optimizer, and puts the data on the devices."""
        config = self.config
        keras.config.set_image_data_format("channels_last")
        self.strategy = strategies.make(config)
        with self.strategy.scope():
            self.vae = VAE(config, self.dataset.image_shape)
            self.optimizer = keras.optimizers.Adam(config.learning_rate, name="adam")
            self.optimizer.build(self.vae.variables)
        self.steps = Steps(config, self.strategy, self.vae, self.optimizer)
        self.images = {}  # split -> images on the devices, and their number
        for split in ("train", "validation", "test"):
            if split in self.dataset.splits and self.dataset.num_examples(split):
                images = self.dataset.read_images(split)
                self.images[split] = place_on_devices(self.strategy, images), len(images)

    @property
    def _variables(self) -> dict[str, keras.Variable]:
        """Name -> variable, of model and optimizer."""
        named = {f"model/{v.path}": v for v in self.vae.variables}
        return named | {f"optimizer/{v.path}": v for v in self.optimizer.variables}

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Takes over the state of a checkpoint."""
        self.step = checkpoint.step
        self.epoch_sums = np.array(checkpoint.epoch_sums)
        variables = self._variables
        if variables.keys() != checkpoint.arrays.keys():
            odd = min(variables.keys() ^ checkpoint.arrays.keys())
            raise StageError(
                f"--workdir={self.workdir}: the checkpoint of step {self.step} and this program's "
                f"model differ in {odd!r}; go on with the Keras version that wrote it, or pass "
                "--overwrite"
            )
        for name, variable in variables.items():
            variable.assign(checkpoint.arrays[name])

    def save(self) -> str:
        """Writes a checkpoint of the present state."""
        return checkpoints.save(
            self.workdir,
            checkpoints.Checkpoint(
                step=self.step,
                epoch_sums=self.epoch_sums.tolist(),
                run=self.identity,
                arrays={name: v.numpy() for name, v in self._variables.items()},
            ),
            keep=self.config.keep_checkpoints,
        )

    def metrics(self, sums) -> dict[str, float]:
        """Means from the sums of some examples."""
        return metrics_lib.from_sums(
            sums, beta=self.config.beta, num_pixels=math.prod(self.dataset.image_shape)
        )

    def train_steps(self, order: tf.Tensor, num_steps: int) -> None:
        """Trains some steps of one epoch and adds up their sums.

        Raises:
          StageError: a term became NaN or infinite.
        """
        rows = self.steps.train(
            self.images["train"][0],
            order,
            tf.constant(self.step % self.steps_per_epoch),
            tf.constant(self.step),
            tf.constant(num_steps),
        ).numpy()
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if bad.size:
            raise StageError(
                f"the loss is NaN or infinite in step {self.step + bad[0] + 1} (steps "
                f"{self.step + 1} to {self.step + num_steps}); the newest checkpoint in "
                f"{self.workdir} is from before it: try a smaller --config.learning_rate"
            )
        for row in rows.astype(np.float64):  # One by one: the same sum however steps are grouped.
            self.epoch_sums += row
        self.step += num_steps

    def evaluate(self, split: str) -> dict[str, float]:
        """Metrics of the present weights on a whole split."""
        images, count = self.images[split]
        rows = self.steps.evaluate(
            images,
            tf.range(count),
            tf.constant(batches.steps_per_epoch(count, self.config.batch_size)),
        ).numpy()
        return self.metrics(rows.astype(np.float64).sum(axis=0))

    def show_reconstructions(self, board: metrics_lib.TensorBoard, split: str) -> None:
        """Writes a few originals and reconstructions to TensorBoard."""
        pixels = self.strategy.experimental_local_results(self.images[split][0])[0][:_NUM_PICTURES]
        noise = tf.zeros((len(pixels), self.config.latent_dim))
        images, _, _, logits = self.vae(pixels, noise)
        board.reconstructions(self.step, images.numpy(), tf.sigmoid(logits).numpy())


def _fit(run: _Run, lines: metrics_lib.JsonLines, stop: _StopSignal) -> None:
    """Trains from run.step to the end, or raises Interrupted with the state saved."""
    config, per_epoch = run.config, run.steps_per_epoch
    board = metrics_lib.TensorBoard(run.workdir)
    timings = metrics_lib.JsonLines(
        storage.join(run.workdir, metrics_lib.TIMINGS), up_to_step=run.step
    )
    order_epoch, order = -1, None
    progress = None
    while run.step < run.total_steps:
        epoch, batch = divmod(run.step, per_epoch)
        if epoch != order_epoch:
            order_epoch = epoch
            order = tf.constant(batches.permutation(config.seed, epoch, run.num_examples))
            progress = Progress(
                f"epoch {epoch + 1}/{config.num_epochs}", total=per_epoch, unit="steps"
            )
            started, first_step, train_secs = time.monotonic(), run.step, 0.0
        to_checkpoint = config.checkpoint_every_steps - run.step % config.checkpoint_every_steps
        began = time.monotonic()
        run.train_steps(order, min(config.steps_per_loop, per_epoch - batch, to_checkpoint))
        train_secs += time.monotonic() - began
        done = run.step - order_epoch * per_epoch
        progress.update(done, metrics_lib.describe(run.metrics(run.epoch_sums)))

        epoch_ended = done == per_epoch
        if epoch_ended:
            train = run.metrics(run.epoch_sums)
            lines.append({"step": run.step, "epoch": epoch + 1, "split": "train", **train})
            rate = (run.step - first_step) * config.batch_size / train_secs
            text = f"{progress.label} {run.step:,} steps, {rate:,.0f} images/s, "
            text += metrics_lib.describe(train)
            board.scalars(run.step, "train", train)
            shown = "train"
            if "validation" in run.images:
                validation = run.evaluate("validation")
                lines.append(
                    {"step": run.step, "epoch": epoch + 1, "split": "validation", **validation}
                )
                board.scalars(run.step, "validation", validation)
                text += f" | validation loss {validation['loss']:.2f}"
                shown = "validation"
            run.show_reconstructions(board, shown)
            run.epoch_sums[:] = 0
            secs = time.monotonic() - started
            timing = {"images_per_sec": rate, "train_secs": train_secs, "epoch_secs": secs}
            timings.append({"step": run.step, "epoch": epoch + 1, **timing})
            board.scalars(run.step, "time", timing)
            board.flush()
            progress.close(text)
        if epoch_ended or stop.received or to_checkpoint <= config.steps_per_loop:
            path = run.save()
        if stop.received and run.step < run.total_steps:
            progress.close()
            raise Interrupted(
                f"stopped by a signal at step {run.step} of {run.total_steps}, state saved in "
                f"{path}; run the same command to go on"
            )


def _finished(export_dir: str, run: _Run) -> dict | None:
    """The manifest of the published model, if this very run is done."""
    if not storage.exists(storage.join(export_dir, stage.MANIFEST)):
        return None
    manifest = stage.read_manifest(export_dir, "train", "workdir")
    there = {key: manifest["made_from"].get(key) for key in run.identity}
    if there == run.identity and manifest["step"] == run.total_steps:
        return manifest
    return None


def train(config: ml_collections.ConfigDict, *, workdir: str, overwrite: bool = False) -> dict:
    """Trains a model, or goes on where an earlier try stopped, and publishes it.

    Args:
      config: as configs/mnist.py explains.
      workdir: where checkpoints, metrics and the model go; local path or fsspec URL.
      overwrite: whether another run's state there may go.

    Returns:
      The manifest of the published model.

    Raises:
      UsageError: the config can't be used, or workdir belongs to another run.
      StageError: the data can't be used, or the loss became NaN.
      Interrupted: a signal came; the state is saved.
    """
    config_lib.check(config)
    dataset = shards.Dataset(config.data_dir)
    config_lib.check_image_shape(config, dataset.image_shape)
    if "train" not in dataset.splits or not dataset.num_examples("train"):
        raise StageError(
            f"data_dir={config.data_dir}: no records in split 'train'; found {dataset.splits}"
        )
    storage.make_dirs(workdir)
    with storage.lock(workdir), _StopSignal() as stop:
        return _train_locked(config, workdir, dataset, overwrite, stop)


def _train_locked(config, workdir, dataset, overwrite, stop) -> dict:
    export_dir = storage.join(workdir, EXPORT)
    metrics_path = storage.join(workdir, metrics_lib.METRICS)
    run = _Run(config, workdir, dataset)
    if overwrite:
        storage.remove(export_dir)
        checkpoints.clear(workdir)
        for name in (metrics_lib.METRICS, metrics_lib.TIMINGS, metrics_lib.TENSORBOARD):
            storage.remove(storage.join(workdir, name))
    checkpoint = checkpoints.restore_newest(workdir, run.identity)
    manifest = _finished(export_dir, run)
    if manifest is not None:
        print(f"train: already finished: model_id {manifest['model_id']}, {export_dir}")
        return manifest
    if checkpoint is not None and checkpoint.step > run.total_steps:
        raise StageError(
            f"--workdir={workdir}: has come to step {checkpoint.step} already, and "
            f"--config.num_epochs={config.num_epochs} ends at step {run.total_steps}; expected "
            "at least as many epochs as are done, or --overwrite"
        )
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    storage.remove_unfinished(workdir)
    run.build()
    if checkpoint is not None:
        run.restore(checkpoint)
    storage.write_bytes(storage.join(workdir, "config.json"), stage.readable_json(config.to_dict()))
    where = f"step {run.step}" if run.step else "the start"
    counts = ", ".join(f"{split} {count:,}" for split, (_, count) in run.images.items())
    print(
        f"train: from {where} to step {run.total_steps}, "
        f"{run.strategy.num_replicas_in_sync} replica(s), {counts}",
        file=sys.stderr,
    )
    lines = metrics_lib.JsonLines(metrics_path, up_to_step=run.step)
    _fit(run, lines, stop)

    if "test" in run.images:
        end = {"step": run.step, "epoch": config.num_epochs, "split": "test"}
        lines.append(end | run.evaluate("test"))
    last = {split: lines.last(split) for split in ("train", "validation", "test")}
    manifest = publish.publish(
        export_dir,
        config=config,
        run=run.identity,
        image_shape=dataset.image_shape,
        weights=[v.numpy() for v in run.vae.variables],
        step=run.step,
        metrics={split: line for split, line in last.items() if line},
    )
    shown = "; ".join(
        f"{split}: {metrics_lib.describe(line)}" for split, line in manifest["metrics"].items()
    )
    print(f"train: finished: {shown}; model_id {manifest['model_id']}, {export_dir}")
    return manifest
