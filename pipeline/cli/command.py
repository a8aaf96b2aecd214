"""How a command starts and ends: signals, errors, exit status.

Exit status: 0 done, 1 failed, 2 bad usage or configuration, 75 interrupted: run the same command
again. flag_parsing.py reads the flags.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from pipeline.cli import flag_parsing, metrics_file, quiet, signed_urls
from pipeline.cli.errors import Interrupted, StageError

_STDOUT = 1  # The file descriptor.


def module_line(module: str, *arguments: str) -> list[str]:
    """The command line of a module of this package in a process of its own.

    The working directory is on its sys.path only if it is on ours: a console script of a project
    with packages named like ours must not start theirs. Python 3.10 has no way to say so.
    """
    is_safe = sys.version_info >= (3, 11) and not {"", os.getcwd()} & {*sys.path}
    return [sys.executable, *(["-P"] if is_safe else []), "-m", module, *arguments]


def end(name: str, work: Callable[[], None]) -> int:
    """Runs `work` and returns the exit status; prints an error in one line."""
    try:
        work()
        sys.stdout.flush()
    except StageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_broken():
            return 1
        # A full disk, no permission, a file in place of a directory: the message has the path.
        expected = "a readable and writable path with free space: mend that"
        if "No usable temporary directory" in str(error):
            expected = "a writable directory for temporary files: set TMPDIR"
        print(
            f"{name}: {signed_urls.without_secrets(str(error))}; expected {expected} and run the "
            "same command again, it resumes from the completed files",
            file=sys.stderr,
        )
        return 1
    return 0


def end_at_once(status: int) -> NoReturn:
    """Ends the process without unwinding, from any thread or signal handler."""
    metrics_file.write(status)
    os._exit(status)


def _is_stdout_broken() -> bool:
    """Whether the reader of standard output has ended, as `head` does; then discards the rest."""
    stdout = select.poll()
    stdout.register(_STDOUT, 0)  # Errors are reported without being asked for.
    is_broken = any(events & (select.POLLERR | select.POLLHUP) for _, events in stdout.poll(0))
    if is_broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return is_broken


class _Formatter(logging.Formatter):
    """Formats log records, and their tracebacks, with addresses in place of signed URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return signed_urls.without_secrets(super().format(record))


def _print_traceback(*error: Any) -> None:
    """Prints the traceback of a defect with addresses in place of signed URLs."""
    text = "".join(traceback.format_exception(*error))
    print(signed_urls.without_secrets(text), end="", file=sys.stderr)


def _use_utf8() -> None:
    """Starts the program again in Python's UTF-8 mode, if file names are read in another encoding.

    Ids and class names come from file names, and must not depend on the locale.
    """
    if sys.getfilesystemencoding().lower() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run(
    main: Callable[[list[str]], None],
    *,
    name: str,
    doc: str,
    module: str,
    subjects: flag_parsing.Subjects | None = None,
    beam: bool = False,
    arguments: bool = False,
) -> None:
    """Runs a command from its flags to its exit status, and ends the process.

    Args:
      main: the command; takes the arguments that are not its own flags.
      name: the command's name in messages.
      doc: the command's docstring, shown by --help.
      module: name of the module that defines the command's flags.
      subjects: groups the flags for --help.
      beam: whether other flags go to Beam.
      arguments: whether positional arguments are allowed.
    """
    _use_utf8()
    quiet.set_environment()
    quiet.hide_unused()
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.excepthook = _print_traceback

    def work() -> None:
        metrics_file.begin(name, list(map(flag_parsing.with_home, sys.argv)))
        main(
            flag_parsing.parse_flags(
                sys.argv,
                doc=doc,
                module=module,
                subjects=subjects,
                beam=beam,
                arguments=arguments,
            )
        )

    def interrupt(number: int, _: object) -> None:
        # Without unwinding: files on disk are complete at any moment, while a runner would go on
        # with its work, or take an exception for a failure.
        text = (
            f"\n{name}: stopped by {signal.Signals(number).name}; run the same command again, "
            "completed files are kept\n"
        )
        with contextlib.suppress(OSError):  # The reader of standard error may be gone.
            os.write(quiet.real_stderr, text.encode())
        end_at_once(Interrupted.exit_status)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    try:
        status = end(name, work)
    except Exception:  # A defect, for which Python prints a traceback and exits with 1.
        metrics_file.write(1)
        raise
    metrics_file.write(status)
    sys.exit(status)
