"""The loop over epochs: train, evaluate, report, checkpoint, stop early."""

import sys
import time

import tensorflow as tf

from pipeline.cli import metrics_file
from pipeline.cli.progress import Progress
from pipeline.machine import arithmetic
from pipeline.storage import files
from trainer.runs import board as board_lib
from trainer.runs import config as config_lib
from trainer.runs import metrics as metrics_lib
from trainer.runs.plan import RunPlan
from trainer.runs.run import Run, Stopped


class Reports:
    """The files that a run reports to: metrics.jsonl, timings.jsonl and TensorBoard's events."""

    def __init__(self, run: Run):
        """Opens the files and drops the lines that an earlier try wrote after run.step."""

        def open_lines(name: str, checkpoint_text: str | None = None) -> metrics_lib.JsonLines:
            return metrics_lib.JsonLines(
                files.join(run.workdir, name),
                up_to_step=run.step,
                writes=run.plan.is_chief,
                checkpoint_text=checkpoint_text,
                skips_damaged=name == metrics_lib.TIMINGS,
            )

        # The metrics decide when the run ends and which weights it publishes, so checkpoints have a
        # copy of them.
        self.metrics = open_lines(metrics_lib.METRICS, run.metrics_text)
        self.timings = open_lines(metrics_lib.TIMINGS)
        run.metrics_text = self.metrics.text
        self.kind = arithmetic.kind()
        self.board = None
        if run.plan.is_chief:
            self.board = board_lib.Board(run.workdir, run.config, run.plan.dataset)
        profiled = config_lib.profiled_steps(run.config)
        profiled = range(profiled.start, min(profiled.stop, run.plan.total_steps))
        self.profiler = board_lib.Profiler(profiled, self.board)


def _train_to_epoch_end(run: Run, profiler: board_lib.Profiler, progress: Progress) -> None:
    """Trains the remaining steps of the current epoch, with checkpoints on the way.

    Raises:
      Stopped: a signal came.
    """
    save_every, visit = run.config.checkpoint_every_steps, run.visit_epoch()
    epoch_start = run.step - run.step % run.plan.steps_per_epoch

    def show() -> None:
        progress.update(run.step - epoch_start, metrics_lib.describe(run.metrics(run.epoch_sums)))

    while True:
        steps_left = epoch_start + run.plan.steps_per_epoch - run.step
        steps_to_save = save_every - run.step % save_every
        num_steps = min(run.steps.max_steps, steps_left, steps_to_save, profiler.reach(run.step))
        # Marks the call in the profile, with its first step.
        with tf.profiler.experimental.Trace("train", step_num=run.step, _r=1):
            run.train_steps(visit, num_steps, show)
        profiler.reach(run.step)
        if run.step == profiler.steps.stop:
            run.sum_over_replicas(0)  # The others wait here while the chief writes the profile.
        if run.epoch_is_complete:
            return  # `fit` reports the epoch before it saves a checkpoint.
        if run.step % save_every == 0:
            run.save()


def _report_epoch(run: Run, reports: Reports, epoch: int) -> str:
    """Writes the metrics of an epoch that has just ended; returns the metrics as text.

    Raises:
      Stopped: a signal came; nothing is written.
    """
    metrics = {"train": run.metrics(run.epoch_sums)}
    if "validation" in run.splits:
        metrics["validation"] = run.evaluate("validation")
    for split, values in metrics.items():
        reports.metrics.append({"step": run.step, "epoch": epoch, "split": split, **values})
    if reports.board:
        for split, values in metrics.items():
            reports.board.scalars(run.step, split, values)
        reports.board.scalars(run.step, "schedule", run.schedules())
        pixels = run.splits[list(metrics)[-1]].head(board_lib.NUM_RECORDS)
        reports.board.show_model(run.step, run.vae, pixels, run.config)
    text = metrics_lib.describe(metrics["train"])
    if "validation" in metrics:
        text += f" | validation loss {metrics['validation']['loss']:.2f}"
        _warn_if_collapsed(run, metrics["validation"])
    return text


def _warn_if_collapsed(run: Run, values: dict[str, float]) -> None:
    """Warns on standard error if no latent is active."""
    if values["active_units"] == 0:
        print(
            f"train: warning: the posterior has collapsed: none of {run.config.latent_dim} latents "
            f"is active, kl {values['kl']:.4f}; try a smaller --config.beta, "
            "--config.beta_warmup_steps or --config.free_bits",
            file=sys.stderr,
        )


def best_step(lines: metrics_lib.JsonLines) -> int | None:
    """The step with the smallest validation loss, the first of equals."""
    validation = lines.split_lines("validation")
    return min(validation, key=lambda line: line["loss"])["step"] if validation else None


def observe_validation(lines: metrics_lib.JsonLines) -> None:
    """Sets the metrics of the losses on validation, if there are any."""
    if losses := [line["loss"] for line in lines.split_lines("validation")]:
        metrics_file.observe("vae_validation_loss_last_nats", losses[-1])
        metrics_file.observe("vae_validation_loss_best_nats", min(losses))


def is_over(plan: RunPlan, lines: metrics_lib.JsonLines, step: int) -> bool:
    """Whether the run ends at `step`: it is the last step, or patience has run out."""
    patience, validation = plan.config.early_stopping_patience, lines.split_lines("validation")
    if step == plan.total_steps or not patience:
        return step == plan.total_steps
    since_best = [line for line in validation if line["step"] > best_step(lines)]
    return len(since_best) >= patience


def fit(run: Run, reports: Reports) -> None:
    """Trains from run.step to the end.

    Raises:
      Stopped: a signal came; the run's state has all finished steps.
    """
    while run.epoch_is_complete or not is_over(run.plan, reports.metrics, run.step):
        epoch = (run.step - run.epoch_is_complete) // run.plan.steps_per_epoch + 1
        progress = Progress(
            f"epoch {epoch}/{run.config.num_epochs}", total=run.plan.steps_per_epoch, unit="steps"
        )
        began, first_step = time.monotonic(), run.step
        try:
            if not run.epoch_is_complete:  # Else a signal stopped the run before the report.
                _train_to_epoch_end(run, reports.profiler, progress)
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
        position = {"step": run.step, "epoch": epoch}
        reports.timings.append({**position, "kind": reports.kind, **timing})
        if reports.board:
            reports.board.scalars(run.step, "time", timing)
            reports.board.flush()
        progress.close(f"{progress.label}, step {run.step:,}, {text}")
        run.epoch_sums[:] = 0
        run.metrics_text = reports.metrics.text
        run.best_step = best_step(reports.metrics)
        observe_validation(reports.metrics)
        run.save()


def evaluate_test(run: Run, reports: Reports, step: int) -> None:
    """Writes the test metrics of the weights to publish, the weights after `step`.

    Raises:
      Stopped: a signal came; nothing is written.
    """
    if "test" in run.splits:
        position = {"step": step, "epoch": step // run.plan.steps_per_epoch}
        values = run.evaluate("test")
        reports.metrics.append({**position, "split": "test", **values})
        if reports.board:
            reports.board.scalars(step, "test", values)
        if "validation" not in run.splits:
            _warn_if_collapsed(run, values)
