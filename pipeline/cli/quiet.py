"""Imports libraries without their start-up messages."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

from pipeline.cli import proxies
from pipeline.cli.errors import UsageError

# File descriptor of the real standard error while `quiet_stderr` redirects 2.
real_stderr = 2
# Silences libraries at their start; a value that the user has set stays.
_QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "GLOG_minloglevel": "2",
}
# Keras imports these packages for its galleries and its wrappers, which no command uses; without
# them it leaves both out. They take a quarter of the time of TensorFlow's import.
_UNUSED_BY_KERAS = ("IPython", "matplotlib", "sklearn")
_hidden: Sequence[str] = ()  # Packages that TensorFlow's import does not find.


def set_environment() -> None:
    """Sets the environment in which libraries are silent, and loopback is reached directly."""
    proxies.reach_directly()
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)


def hide_unused() -> None:
    """Makes the first import of TensorFlow faster, in a process that does nothing but a command."""
    global _hidden
    _hidden = _UNUSED_BY_KERAS


def prepare() -> None:
    """Prepares a process that is no command for a stage.

    Raises:
      UsageError: file names, from which ids and class names come, would depend on the locale.
    """
    if (encoding := sys.getfilesystemencoding()).lower() != "utf-8":
        raise UsageError(
            f"Python reads file names as {encoding}; expected utf-8: start it with PYTHONUTF8=1"
        )
    set_environment()


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Suppresses what native code writes to standard error, unless the block fails.

    TensorFlow logs its start before any of its settings can silence it.
    """
    global real_stderr
    sys.stderr.flush()
    kept, outer = os.dup(2), real_stderr
    real_stderr = kept if outer == 2 else outer
    with tempfile.TemporaryFile() as scratch:
        os.dup2(scratch.fileno(), 2)
        try:
            yield
        except BaseException:
            scratch.seek(0)
            os.write(kept, scratch.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            real_stderr = outer
            os.close(kept)


@contextlib.contextmanager
def _uninstalled(packages: Sequence[str]) -> Iterator[None]:
    """Lets imports of packages fail, unless they are imported already."""
    hidden = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: cannot be imported.
    try:
        yield
    finally:
        for package in hidden:
            sys.modules.pop(package, None)


def import_tensorflow() -> None:
    """Imports TensorFlow without its start-up messages; costs seconds the first time."""
    if "tensorflow" not in sys.modules:
        with quiet_stderr(), _uninstalled(_hidden):
            import tensorflow as tf

            tf.config.list_physical_devices()  # Looks for GPUs, and logs that too.


def import_beam() -> None:
    """Imports Apache Beam without its warnings about extras that are not installed."""
    logging.disable(logging.WARNING)
    try:
        import apache_beam  # noqa: F401
    finally:
        logging.disable(logging.NOTSET)
