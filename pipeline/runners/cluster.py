"""A Beam job on a cluster: Flink, Spark, Prism, Dataflow.

Checks before the job is submitted, cancels it when the command is stopped, and explains its errors.
run.py runs the job.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit

from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    SparkRunnerOptions,
    StandardOptions,
)
from apache_beam.runners.portability.portable_runner import PipelineResult as PortableResult
from apache_beam.runners.portability.portable_runner import PortableRunner
from apache_beam.runners.runner import PipelineResult, create_runner

from pipeline.cli.errors import SourceChanged, StageError, UsageError

# A running job server answers at once, because it starts its listener first.
_CONNECT_SECS = 10.0
# A stopped command ends within this time, even if the cluster does not answer.
_CANCEL_SECS = 10.0
_LOOK_EVERY_SECS = 0.2
# Final states of a Flink job.
_OVER = ("FINISHED", "CANCELED", "FAILED")
# Kinds of sources that are followed by a path.
_PATH_KINDS = ("idx", "npz", "csv", "folder")


def is_portable(options: PipelineOptions) -> bool:
    """Whether the job goes through a job server, such as Flink's, Spark's or Prism."""
    name = options.view_as(StandardOptions).runner
    return bool(name) and isinstance(create_runner(name), PortableRunner)


def _is_elsewhere(options: PipelineOptions) -> bool:
    """Whether workers may run in another directory or on another machine."""
    name = (options.view_as(StandardOptions).runner or "").rpartition(".")[2].lower()
    environment = options.view_as(PortableOptions).environment_type
    if environment and is_portable(options):
        return environment != "LOOPBACK"
    # For job servers that Beam itself starts, the workers are inside this command.
    if name == "flinkrunner":
        return options.view_as(FlinkRunnerOptions).flink_master not in ("[auto]", "[local]")
    if name == "sparkrunner":
        return not options.view_as(SparkRunnerOptions).spark_master_url.startswith("local")
    return name in ("portablerunner", "dataflowrunner")


def check_paths(options: PipelineOptions, **paths: str | None) -> None:
    """Refuses relative paths if workers run in other directories than the command.

    Args:
      options: Beam's.
      **paths: flag -> its value: a path, a URL, or a source as in --source.

    Raises:
      UsageError: a path is relative, and workers may run elsewhere.
    """
    if not _is_elsewhere(options):
        return
    for flag, value in paths.items():
        kind, _, rest = (value or "").partition(":")
        path = rest if flag == "source" and kind in _PATH_KINDS else value
        if flag == "source" and kind not in _PATH_KINDS or not path or "://" in path:
            continue
        if not os.path.isabs(path):
            raise UsageError(
                f"--{flag}={value}: is a relative path, and this runner's workers run elsewhere; "
                "expected a URL, or the absolute path of a directory that all workers share"
            )


@contextlib.contextmanager
def submitting(options: PipelineOptions) -> Iterator[None]:
    """Turns errors of the block, which submits a job, into a message about the runner's options.

    Raises:
      StageError: the runner refused the job.
    """
    name = options.view_as(StandardOptions).runner
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        if not name or explain(error):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise StageError(
            f"--runner={name}: refused the job: {text}; expected the options that Beam's "
            "documentation of this runner lists: mend them and run the same command again"
        ) from error


def check_reachable(options: PipelineOptions) -> None:
    """Refuses a cluster that does not answer; Beam itself would wait for a minute.

    Raises:
      UsageError: an address is malformed, or --runner=PortableRunner has no address.
      StageError: nothing listens at the address.
    """
    name = (options.view_as(StandardOptions).runner or "").rpartition(".")[2].lower()
    endpoint = options.view_as(PortableOptions).job_endpoint
    master = options.view_as(FlinkRunnerOptions).flink_master
    if name == "dataflowrunner" and not importlib.util.find_spec("google_auth_httplib2"):
        raise UsageError(
            "--runner=DataflowRunner: needs Beam's extra gcp; expected it to be installed: pip "
            "install 'vae-pipeline[gcp]'"
        )
    if endpoint and is_portable(options) and endpoint != "embed":
        _connect("job_endpoint", endpoint, "Beam's job server")
    elif name == "portablerunner" and not endpoint:
        raise UsageError("--runner=PortableRunner: has no --job_endpoint; expected HOST:PORT")
    elif name == "flinkrunner" and master not in ("[auto]", "[local]"):
        _connect("flink_master", master, "Flink's job manager (its REST port)")


def _connect(flag: str, address: str, server: str) -> None:
    url = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
        host = url.hostname or ""
    except (ValueError, KeyError) as error:
        raise UsageError(f"--{flag}={address}: not an address; expected HOST:PORT") from error
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECS).close()
    except OSError as error:
        raise StageError(
            f"--{flag}={address}: no answer ({error}); expected {server} to listen there: start "
            "it or mend the address, then run the same command again"
        ) from error


def name_job(options: PipelineOptions) -> None:
    """Gives a job on a Flink cluster a unique name, unless the user named the job."""
    named = options.view_as(GoogleCloudOptions)
    if _flink_url(options) and not named.job_name:
        named.job_name = f"vae-pipeline-{uuid.uuid4().hex[:12]}"


def _flink_url(options: PipelineOptions) -> str | None:
    """URL of the Flink cluster's REST interface; None if the options do not name a cluster."""
    master = options.view_as(FlinkRunnerOptions).flink_master
    if master in ("[auto]", "[local]"):
        return None
    return (master if "://" in master else f"http://{master}").rstrip("/")


def _cancel_on_flink(url: str, job_name: str) -> None:
    """Cancels a job, and waits until the job has ended.

    Beam's job server only stops waiting for a batch job; the job itself goes on.
    """
    pause = threading.Event()
    while True:
        with urllib.request.urlopen(f"{url}/jobs/overview", timeout=_CONNECT_SECS) as answer:
            jobs = [job for job in json.load(answer)["jobs"] if job["name"] == job_name]
        running = [job for job in jobs if job["state"] not in _OVER]
        if not running:
            return
        for job in running:
            if job["state"] != "CANCELLING":
                cancel = f"{url}/jobs/{job['jid']}?mode=cancel"
                urllib.request.urlopen(
                    urllib.request.Request(cancel, method="PATCH"), timeout=_CONNECT_SECS
                ).close()
        pause.wait(_LOOK_EVERY_SECS)


@contextlib.contextmanager
def cancelled_when_stopped(result: PipelineResult, options: PipelineOptions) -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT first cancel the job, then end the command.

    Otherwise the cluster would go on with the job and write among the files of the next try.
    Processes that Beam started for the job, such as a job server, are stopped too.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not isinstance(result, PortableResult) or not is_main:
        yield  # The job runs in this process or a child process, or no signal comes here.
        return
    url = _flink_url(options)
    job_name = options.view_as(GoogleCloudOptions).job_name
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def cancel() -> None:
        with contextlib.suppress(Exception):  # A cluster that has ended needs no cancel.
            result.cancel()
        if url:
            with contextlib.suppress(OSError):
                _cancel_on_flink(url, job_name)
        atexit._run_exitfuncs()  # Beam stops its processes at exit, which os._exit skips.

    def stop(number: int, frame: object) -> None:
        # In a thread, since the interrupted call may hold a lock of gRPC.
        thread = threading.Thread(target=cancel, daemon=True)
        thread.start()
        thread.join(_CANCEL_SECS)
        if callable(before[number]):
            before[number](number, frame)

    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(error: Exception) -> StageError | None:
    """The error to show for an error that a runner raised; None for a defect of this program.

    Args:
      error: as Beam raised it; a worker's error carries its traceback as text.
    """
    text = str(error)
    if isinstance(error, StageError):  # From a worker in this process.
        return type(error)(re.sub(r" \[while running .*\Z", "", text))
    own_error = re.search(
        r"^(?:.*\s)?pipeline\.cli\.errors\.(\w+): (.+?)( \[while running .*)?$", text, re.M
    )
    if own_error:
        is_change = own_error[1] == SourceChanged.__name__
        return SourceChanged(own_error[2]) if is_change else StageError(own_error[2])
    os_error = re.search(r"\w: (\[Errno \d+\] .+?)( \[while running .*)?$", text, re.M)
    if os_error:
        return StageError(
            f"{os_error[1]}; expected paths that every worker can read and write: mend that and "
            "run the same command again, it resumes from the completed files"
        )
    missing = re.search(r"ModuleNotFoundError: (No module named '\S+')", text)
    if missing:
        return StageError(
            f"a worker of the runner: {missing[1]}; expected this version of the package on every "
            "worker: install it there, or in the image that --sdk_container_image names, or pass "
            "--setup_file=./setup.py"
        )
    cancelled = re.search(r"failed in state (CANCELLED|CANCELLING|DRAINED|STOPPED)", text)
    if cancelled:
        return ended_as(cancelled[1])
    if re.search(r"StatusCode\.(UNAVAILABLE|CANCELLED)", text):
        return StageError(
            "the runner's job server ended while the job ran; expected it to outlive the job: "
            "start it and run the same command again, completed files are kept"
        )
    return None


def ended_as(state: str) -> StageError:
    """The error for a job that ended in another state than DONE."""
    return StageError(
        f"the Beam job ended as {state}; expected DONE: see the runner's log, then run the same "
        "command again, it resumes from the completed files"
    )
