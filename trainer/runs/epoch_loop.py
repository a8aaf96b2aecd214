"""The loop over epochs: train, evaluate, report, checkpoint, stop early."""

import sys
import time

from pipeline.cli.progress import Progress
from pipeline.machine import arithmetic
from pipeline.storage import files
from trainer.runs import board as board_lib
from trainer.runs import metrics as metrics_lib
from trainer.runs.run import Run, Stopped


class Reports:
    """Where a run reports: the lines that are kept, and TensorBoard."""

    def __init__(self, run: Run):
        """Opens the files and drops what an earlier try wrote after run.step."""

        def open_lines(name: str, reported: str | None = None) -> metrics_lib.JsonLines:
            return metrics_lib.JsonLines(
                files.join(run.workdir, name),
                up_to_step=run.step,
                writes=run.is_chief,
                reported=reported,
                skips_damaged=name == metrics_lib.TIMINGS,
            )

        # Which decide when the run ends and what it publishes, so the checkpoint has them too.
        self.metrics = open_lines(metrics_lib.METRICS, run.reported)
        self.timings = open_lines(metrics_lib.TIMINGS)
        run.reported = self.metrics.text
        self.kind = arithmetic.kind()
        self.board = board_lib.Board(run.workdir) if run.is_chief else None


def _train_to_epoch_end(run: Run, progress: Progress) -> None:
    """Trains what is left of the current epoch, with checkpoints on the way.

    Raises:
      Stopped: a signal came.
    """
    every, visit = run.config.checkpoint_every_steps, run.visit_epoch()
    before = run.step - run.step % run.steps_per_epoch

    def show() -> None:
        progress.update(run.step - before, metrics_lib.describe(run.metrics(run.epoch_sums)))

    while True:
        left = before + run.steps_per_epoch - run.step
        run.train_steps(visit, min(run.steps.max_steps, left, every - run.step % every), show)
        if run.epoch_is_complete:
            return  # It is reported before it is saved.
        if run.step % every == 0:
            run.save()


def _report_epoch(run: Run, reports: Reports, epoch: int) -> str:
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


def best_step(lines: metrics_lib.JsonLines) -> int | None:
    """The step with the smallest validation loss, the first of equals."""
    validation = lines.of("validation")
    return min(validation, key=lambda line: line["loss"])["step"] if validation else None


def is_over(run: Run, lines: metrics_lib.JsonLines, step: int) -> bool:
    """Whether there is nothing to train after `step`: the last one, or no better for long."""
    patience, validation = run.config.early_stopping_patience, lines.of("validation")
    if step == run.total_steps or not patience:
        return step == run.total_steps
    since_best = [line for line in validation if line["step"] > best_step(lines)]
    return len(since_best) >= patience


def fit(run: Run, reports: Reports) -> None:
    """Trains from run.step to the end.

    Raises:
      Stopped: a signal came; all that was done is in the run's state.
    """
    while run.epoch_is_complete or not is_over(run, reports.metrics, run.step):
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
        about = {"step": run.step, "epoch": epoch, "kind": reports.kind}
        reports.timings.append({**about, **timing})
        if reports.board:
            reports.board.scalars(run.step, "time", timing)
            reports.board.flush()
        progress.close(f"{progress.label}, step {run.step:,}, {text}")
        run.epoch_sums[:] = 0
        run.reported = reports.metrics.text
        run.best_step = best_step(reports.metrics)
        run.save()


def evaluate_test(run: Run, reports: Reports, step: int) -> None:
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
