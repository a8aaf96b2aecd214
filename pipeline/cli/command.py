"""How a command starts and ends: signals, errors, exit status.

Exit status: 0 done, 1 failed, 2 bad usage or configuration, 75 interrupted and
worth starting again. Its flags are read in flag_parsing.py.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable

from pipeline.cli import flag_parsing, proxies, quiet
from pipeline.cli.errors import Interrupted, StageError

# What libraries print at start-up is not the user's business; a value that the
# user has set stays.
_QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "GLOG_minloglevel": "2",
}


def end(name: str, work: Callable[[], None]) -> int:
    """Runs `work` and returns the exit status, with a one-line error where it failed."""
    try:
        work()
    except StageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        # Disk full, no permission, a path that is a file: the message names it.
        print(
            f"{name}: {error}; expected a path that can be read and written, with room: mend that "
            "and run the same command again, it goes on from the files that are whole",
            file=sys.stderr,
        )
        return 1
    return 0


def run(
    main: Callable[[list[str]], None],
    *,
    name: str,
    doc: str,
    module: str,
    beam: bool = False,
    arguments: bool = False,
) -> None:
    """Runs a command from its flags to its exit status, and ends the process.

    Args:
      main: the command; takes the arguments that its own flags leave over.
      name: how the command calls itself in messages.
      doc: the command's docstring, shown by --help.
      module: name of the module that defines the command's flags.
      beam: whether flags that are not the command's may be Beam's.
      arguments: whether there may be arguments that are no flags.
    """
    proxies.reach_directly()
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    def work() -> None:
        main(
            flag_parsing.parse_flags(
                sys.argv, doc=doc, module=module, beam=beam, arguments=arguments
            )
        )

    def interrupt(number: int, _) -> None:
        # At once and without unwinding: what is on disk is whole at any moment, while a
        # runner would go on with its work, or take an exception for a failure of it.
        text = (
            f"\n{name}: stopped by {signal.Signals(number).name}; run the same command again, "
            "files that are whole stay\n"
        )
        with contextlib.suppress(OSError):  # Whoever read it may be gone.
            os.write(quiet.real_stderr, text.encode())
        os._exit(Interrupted.exit_status)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    sys.exit(end(name, work))
