"""Runs a Beam pipeline with the options a user gave: on any runner, in process by default."""

import contextlib
import difflib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from apache_beam.runners.runner import PipelineRunner, create_runner

from pipeline import remote_job
from pipeline.errors import StageError, UsageError
from pipeline.progress import Progress

_PROGRESS_EVERY_SECS = 0.5


def parse_options(args: Sequence[str]) -> PipelineOptions:
    """Beam's options from the arguments that a command's own flags left over.

    Raises:
      UsageError: an argument that Beam doesn't know, with the nearest name.
    """
    parser = _parser()
    known = [option for action in parser._actions for option in action.option_strings]
    _, unknown = parser.parse_known_args(list(args))
    if unknown:
        from absl import flags

        name = unknown[0].split("=", 1)[0]
        ours = [f"--{flag}" for flag in flags.FLAGS]
        near = difflib.get_close_matches(name, [*ours, *known], n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help for this command's flags"
        raise UsageError(f"unknown flag {unknown[0]!r}: neither this command's nor Beam's; {hint}")
    options = PipelineOptions(list(args))
    name = options.view_as(StandardOptions).runner
    try:
        _ = name and create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise UsageError(f"--runner={name}: {error}") from error
    direct = options.view_as(DirectOptions)
    if direct.direct_num_workers < 0:
        raise UsageError(
            f"--direct_num_workers={direct.direct_num_workers}: expected at least 1, or 0 for one "
            "a core"
        )
    if direct.direct_num_workers != 1 and not any("direct_running_mode" in a for a in args):
        # Beam's default would run one worker and warn that it does.
        direct.direct_running_mode = "multi_processing"
    return options


def _parser():
    """An argument parser that knows the options of every PipelineOptions class."""
    from apache_beam.options import pipeline_options

    def refuse(message: str) -> None:
        raise UsageError(f"Beam option: {message}")

    parser = pipeline_options._BeamArgumentParser(allow_abbrev=False, add_help=False)
    parser.error = refuse  # In place of printing two screens of usage.
    for options_class in {str(c): c for c in PipelineOptions.__subclasses__()}.values():
        options_class._add_argparse_args(parser)
    return parser


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
        remote_job.check_reachable(options)
        remote_job.name_job(options)
        if remote_job.is_portable(options):
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
    from pipeline import worker_processes

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
            with remote_job.submitting(options):
                pipeline = beam.Pipeline(runner=make_runner(options), options=options)
            build(pipeline)
            with remote_job.submitting(options):
                result = pipeline.run()
            with remote_job.cancelled_when_stopped(result, options):
                state = result.wait_until_finish()
    except Exception as error:
        # From a worker it comes as text: its traceback, and our message at the end.
        ours = remote_job.explain(error)
        if not ours:
            raise
        raise ours from error
    finally:
        ended.set()
        watcher.join()
        progress.close()
    if state is not None and state not in ("DONE", "UPDATED"):
        raise remote_job.ended_as(state)
