"""Runs a Beam pipeline on any runner, by default in this process.

options.py parses the options.
"""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator

import apache_beam as beam
from apache_beam import pipeline as beam_pipeline
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from apache_beam.runners.runner import PipelineRunner

from pipeline.cli.errors import StageError
from pipeline.cli.progress import Progress
from pipeline.runners import cluster

_PROGRESS_EVERY_SECS = 0.5
# In a notebook, Beam names steps after cells; for that it imports its interactive part, which needs
# an extra. The name is private: if it changes, tests/test_api.py fails.
_name_after_cell = beam_pipeline.alter_label_if_ipython


def num_worker_processes(options: PipelineOptions) -> int:
    """The number of worker processes that this command starts; 0 for other runners and modes."""
    direct = options.view_as(DirectOptions)
    runner_name = options.view_as(StandardOptions).runner
    if runner_name or direct.direct_running_mode != "multi_processing":
        return 0
    return direct.direct_num_workers or os.cpu_count() or 1


def is_in_this_process(options: PipelineOptions) -> bool:
    """Whether the job runs in this process alone."""
    return not options.view_as(StandardOptions).runner and not num_worker_processes(options)


def make_runner(options: PipelineOptions) -> PipelineRunner | None:
    """The runner for the options; None if beam.Pipeline makes the runner that the user named.

    Beam's default runner first tries to download another runner, so this makes the in-process one.
    """
    if options.view_as(StandardOptions).runner:
        cluster.check_reachable(options)
        cluster.name_job(options)
        if cluster.is_portable(options):
            # Runners log their own processes, and errors that they also raise. All loggers, since
            # Prism has two of its own.
            logging.disable(logging.ERROR)
        return None  # beam.Pipeline reads it from the options.
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    # Beam also raises the errors that it logs, and its warnings concern its internals.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    num_workers = num_worker_processes(options)
    if not num_workers:
        return FnApiRunner()
    # Beam's multi_processing mode is this environment with another command; the runner keeps our
    # command if the mode is the default.
    options.view_as(DirectOptions).direct_running_mode = "in_memory"
    from pipeline.runners import worker_processes

    return FnApiRunner(worker_processes.environment(num_workers))


@contextlib.contextmanager
def _named_as_written() -> Iterator[None]:
    """Within the block, steps keep their names in a notebook, too."""
    beam_pipeline.alter_label_if_ipython = lambda *_: None
    try:
        yield
    finally:
        beam_pipeline.alter_label_if_ipython = _name_after_cell


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is Beam's for a KeyboardInterrupt, which came while a step was running."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def run(
    build: Callable[[beam.Pipeline], object],
    options: PipelineOptions,
    *,
    progress: Progress,
    count_done: Callable[[], int],
) -> None:
    """Builds and runs a pipeline, and shows its progress.

    Args:
      build: adds the pipeline's transforms.
      options: Beam's options.
      progress: the progress line.
      count_done: returns the finished units of work; called every half second by another thread.

    Raises:
      StageError: the job failed.
      KeyboardInterrupt: as Python raises it on SIGINT in a process that is no command.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_PROGRESS_EVERY_SECS):
            with contextlib.suppress(StageError):  # The storage fails: so does the job.
                progress.update(count_done())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with cluster.submitting(options):
                pipeline = beam.Pipeline(runner=make_runner(options), options=options)
            with _named_as_written():
                build(pipeline)
            with cluster.submitting(options):
                result = pipeline.run()
            with cluster.cancelled_when_stopped(result, options):
                state = result.wait_until_finish()
    except Exception as error:
        if _is_interrupt(error):
            raise KeyboardInterrupt from None
        explained = cluster.explain(error)
        if not explained:
            raise
        raise explained from error
    finally:
        ended.set()
        watcher.join()
        progress.close()
    if state is not None and state not in ("DONE", "UPDATED"):
        raise cluster.ended_as(state)
