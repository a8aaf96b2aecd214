"""Runs a Beam pipeline: on any runner, in this process by default.

Its options are parsed in options.py.
"""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from apache_beam.runners.runner import PipelineRunner

from pipeline.cli.errors import StageError
from pipeline.cli.progress import Progress
from pipeline.runners import cluster

_PROGRESS_EVERY_SECS = 0.5


def num_worker_processes(options: PipelineOptions) -> int:
    """How many worker processes the in-process runner starts; 0 if it or another starts none."""
    direct = options.view_as(DirectOptions)
    other = options.view_as(StandardOptions).runner
    if other or direct.direct_running_mode != "multi_processing":
        return 0
    return direct.direct_num_workers or os.cpu_count() or 1


def make_runner(options: PipelineOptions) -> PipelineRunner | None:
    """The runner the user named, or else Beam's in-process one.

    Named by us, since Beam's own default first tries to download another one.
    """
    if options.view_as(StandardOptions).runner:
        cluster.check_reachable(options)
        cluster.name_job(options)
        if cluster.is_portable(options):
            # What it logs is about its own processes, or comes as an exception as well. Of all
            # loggers, since Prism's lines come from two of its own.
            logging.disable(logging.ERROR)
        return None  # beam.Pipeline reads it from the options.
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    # Whatever it logs as an error it raises too, and its warnings are about its own insides.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    num_workers = num_worker_processes(options)
    if not num_workers:
        return FnApiRunner()
    # Beam's multi_processing mode is this environment with another command; the
    # runner keeps ours as long as the mode is the default one.
    options.view_as(DirectOptions).direct_running_mode = "in_memory"
    from pipeline.runners import worker_processes

    return FnApiRunner(worker_processes.environment(num_workers))


def run(
    build: Callable[[beam.Pipeline], object],
    options: PipelineOptions,
    *,
    progress: Progress,
    count_done: Callable[[], int],
) -> None:
    """Builds and runs a pipeline to its end, showing its progress.

    Args:
      build: adds the pipeline's transforms.
      options: Beam's options.
      progress: the line to show.
      count_done: how much is done; asked for now and then from another thread.

    Raises:
      StageError: the job did not end well.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_PROGRESS_EVERY_SECS):
            with contextlib.suppress(StageError):  # A storage that fails: the work meets that too.
                progress.update(count_done())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with cluster.submitting(options):
                pipeline = beam.Pipeline(runner=make_runner(options), options=options)
            build(pipeline)
            with cluster.submitting(options):
                result = pipeline.run()
            with cluster.cancelled_when_stopped(result, options):
                state = result.wait_until_finish()
    except Exception as error:
        # From a worker it comes as text: its traceback, and our message at the end.
        ours = cluster.explain(error)
        if not ours:
            raise
        raise ours from error
    finally:
        ended.set()
        watcher.join()
        progress.close()
    if state is not None and state not in ("DONE", "UPDATED"):
        raise cluster.ended_as(state)
