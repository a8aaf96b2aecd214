"""--metrics_file: the metrics of a command's last run, for Prometheus.

The file is for node_exporter's textfile collector. Code of any stage calls `observe` where it knows
a value. command.py writes the file when the command ends, in whatever way.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from pipeline.cli import quiet
from pipeline.cli.errors import UsageError

if TYPE_CHECKING:
    from prometheus_client import Metric as Family

FLAG = "metrics_file"
_ENDING = ".prom"
# Of the file of an earlier run; one that a run writes has some 3 KB.
_MAX_BYTES = 1 << 20
_LAST_SUCCESS = "vae_last_success_timestamp_seconds"
# All metrics begin with this.
_PREFIX = "vae_"
# Labels of every metric.
COMMON_LABELS = ("stage", "name")


class Metric(NamedTuple):
    """A gauge."""

    meaning: str
    labels: tuple[str, ...] = ()  # Beside the common ones.


METRICS = {
    "vae_exit_status": Metric("Exit status of the last run; 75 means interrupted."),
    "vae_last_run_timestamp_seconds": Metric("When the last run ended, in Unix time."),
    _LAST_SUCCESS: Metric("When a run last ended with status 0, in Unix time; 0 if none has."),
    "vae_duration_seconds": Metric("How long the last run took."),
    "vae_records": Metric("Records that the last run has read, by what became of them.", ("fate",)),
    "vae_drift_statistic": Metric(
        "How far the records of the last run are from those of --reference, from 0 to 1: the "
        "Kolmogorov-Smirnov statistic, of class_shares the total variation; the largest one of "
        "the quantity.",
        ("quantity",),
    ),
    "vae_drift_warnings": Metric("Warnings about drift from --reference."),
    "vae_validation_loss_last_nats": Metric(
        "Loss on the split validation after the last epoch, in nats per image."
    ),
    "vae_validation_loss_best_nats": Metric(
        "The smallest such loss of all epochs of the training run."
    ),
}


class _File:
    """The file of a command that is running."""

    def __init__(self, path: str, stage: str):
        """Checks the path, and reads when an earlier run succeeded; writes nothing.

        Raises:
          UsageError: the path cannot be that of such a file.
        """
        # Now, because a signal handler must not wait for an import.
        import prometheus_client
        from prometheus_client import core, parser

        self._prometheus, self._core, self._parser = prometheus_client, core, parser
        self._path, self._stage = path, stage
        name = os.path.basename(path).removesuffix(_ENDING)
        self._name = name.encode(errors="replace").decode()  # A file's name may be any bytes.
        self._check()
        self._last_success = self._read_last_success()
        self._started = time.monotonic()

    def _check(self) -> None:
        directory = os.path.dirname(self._path) or "."
        if "://" in self._path:
            fault = "is a URL; expected a local path, since node_exporter reads no URL: name one"
        elif not self._path.endswith(_ENDING) or not self._name:
            fault = f"expected a name *{_ENDING}, since node_exporter reads no other: name one"
        elif not os.path.isdir(directory):
            fault = f"{directory} is no directory; expected an existing one: create it"
        elif not os.access(directory, os.W_OK | os.X_OK):
            fault = f"{directory} is not writable; expected a directory that this user may write to"
        elif os.path.exists(self._path) and not os.path.isfile(self._path):
            fault = "is no regular file; expected a file or a free name: name another"
        else:
            return
        raise UsageError(f"--{FLAG}={self._path}: {fault}")

    def _read_last_success(self) -> float:
        """When an earlier run succeeded, in Unix time; 0 if unknown.

        Raises:
          UsageError: the file holds metrics of another stage or program.
        """
        try:
            with open(self._path, encoding="utf-8") as file:
                text = file.read(_MAX_BYTES)
            families = list(self._parser.text_string_to_metric_families(text))
            samples = [sample for family in families for sample in family.samples]
        except FileNotFoundError:
            return 0.0
        except (OSError, ValueError, IndexError):  # Also those of the parser.
            samples = []
        for sample in samples:
            if (
                not sample.name.startswith(_PREFIX)
                or sample.labels.get("stage", self._stage) != self._stage
            ):
                raise UsageError(
                    f"--{FLAG}={self._path}: holds a metric {sample.name} of "
                    f"{sample.labels.get('stage', 'another program')}; expected a file for "
                    f"{self._stage} alone: name another file"
                )
        for sample in samples:
            if sample.name == _LAST_SUCCESS and 0 <= sample.value < math.inf:
                return min(sample.value, time.time())  # A clock may have gone ahead.
        _say(
            f"{self._stage}: warning: --{FLAG}={self._path}: does not tell when a run last "
            "succeeded; expected the file of an earlier run: it will be replaced, and the time is "
            "0 until a run succeeds"
        )
        return 0.0

    def write(self, status: int) -> None:
        """Puts the metrics of this run in the place of the file; a failure is printed only."""
        now = time.time()
        if status == 0:
            self._last_success = now
        observe("vae_exit_status", status)
        observe("vae_last_run_timestamp_seconds", now)
        observe(_LAST_SUCCESS, self._last_success)
        observe("vae_duration_seconds", time.monotonic() - self._started)
        registry = self._prometheus.CollectorRegistry()
        registry.register(self)
        try:
            self._prometheus.write_to_textfile(self._path, registry)
        except OSError as error:
            _say(
                f"{self._stage}: warning: --{FLAG}={self._path}: cannot be written "
                f"({error.strerror}); expected a writable directory with free space: mend that. "
                f"The exit status stays {status}"
            )

    def collect(self) -> "Iterator[Family]":
        """The metrics, as a collector of prometheus_client gives them."""
        for name, metric in METRICS.items():
            family = self._core.GaugeMetricFamily(
                name, metric.meaning, labels=[*COMMON_LABELS, *metric.labels]
            )
            for (observed, *labels), value in list(_values.items()):
                if observed == name:
                    family.add_metric([self._stage, self._name, *labels], value)
            if family.samples:
                yield family


# A command is a process, so both belong to the process.
_values: dict[tuple[str, ...], float] = {}  # (name of the metric, values of its labels) -> value
_file: _File | None = None


def _say(text: str) -> None:
    # Not through sys.stderr, which the signal that calls this may have interrupted.
    with contextlib.suppress(OSError):  # The reader of standard error may be gone.
        os.write(quiet.real_stderr, f"{text}\n".encode(errors="backslashreplace"))


def observe(name: str, value: float, **labels: str) -> None:
    """Sets a metric of this run; costs nothing without a file.

    Args:
      name: of METRICS.
      value: in the unit that the name ends with.
      **labels: all that the metric has beside the common ones.
    """
    key = name, *(labels[label] for label in METRICS[name].labels)
    _values[key] = value


def observe_records(**counts: int) -> None:
    """Sets the number of records by fate; each record has one fate."""
    for fate, count in counts.items():
        observe("vae_records", count, fate=fate)


def define_flag() -> None:
    """Defines the flag, for a command that calls this when it defines its own."""
    flags.DEFINE_string(
        FLAG,
        None,
        "File *.prom in the directory of node_exporter's textfile collector: metrics of this run "
        "for Prometheus, written when the command ends.",
    )


def begin(stage: str, arguments: list[str]) -> None:
    """Opens the file that the arguments name, if the command has the flag and they do.

    The other arguments may be wrong: that is a status to be written.

    Args:
      stage: the command's name.
      arguments: program name and arguments.

    Raises:
      UsageError: the file cannot be written there.
    """
    global _file
    if FLAG not in flags.FLAGS:
        return
    own = flags.FlagValues()  # type: ignore[no-untyped-call]
    flags.DEFINE_string(FLAG, None, "", flag_values=own)
    try:
        own(arguments, known_only=True)
    except flags.Error:
        return  # The command's own parser says so.
    if (path := own[FLAG].value) is not None:
        _file = _File(path, stage)


def disable() -> None:
    """Lets another process write the file."""
    global _file
    _file = None


def write(status: int) -> None:
    """Writes the file, if there is one; raises no error.

    Args:
      status: the exit status of the command.
    """
    if _file:
        _file.write(status)
