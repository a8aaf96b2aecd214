"""How a command starts and ends: flags, quiet libraries, errors, exit status.

Exit status: 0 done, 1 failed, 2 bad usage or configuration, 75 interrupted and
worth starting again.
"""

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator

from absl import flags

from pipeline.errors import Interrupted, StageError, UsageError

# What libraries print at start-up is not the user's business; a value that the
# user has set stays.
_QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "GLOG_minloglevel": "2",
}

# In either case; gRPC takes the first that is set, in lower case alone.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
# Hosts without a proxy. gRPC reads the first, and the second only where that is not set; urllib
# and libcurl read the second and then the third; Go reads the third and then the second, and sends
# loopback through no proxy anyway.
_DIRECT = ("no_grpc_proxy", "no_proxy", "NO_PROXY")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# A home directory where no shell puts in its path: --flag=~/x, --flag=KIND:~/x.
_HOME = re.compile(r"(--?[\w.]+=(?:\w+:)?)(~(?:/.*)?)", re.DOTALL)


# Where standard error really goes while something is held back from it.
_stderr = 2


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Holds back what native code writes to standard error, unless the block fails.

    TensorFlow logs its start before any setting of its own can silence it.
    """
    global _stderr
    sys.stderr.flush()
    kept, outer = os.dup(2), _stderr
    _stderr = kept if outer == 2 else outer
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
            _stderr = outer
            os.close(kept)


def import_tensorflow() -> None:
    """Imports TensorFlow without its start-up messages; costs seconds the first time."""
    if "tensorflow" not in sys.modules:
        with quiet_stderr():
            import tensorflow as tf

            tf.config.list_physical_devices()  # Looks for GPUs, and logs that too.


def import_beam() -> None:
    """Imports Apache Beam without its warnings about extras that are not installed."""
    logging.disable(logging.WARNING)
    try:
        import apache_beam  # noqa: F401
    finally:
        logging.disable(logging.NOTSET)


def reach_directly(hosts: Iterable[str] = _LOOPBACK) -> None:
    """Keeps this process and its children from reaching `hosts` through a proxy.

    gRPC sends even loopback through the proxy of the environment, which leads to another machine
    or to nobody.
    """
    if not any(value and name.lower() in _PROXIES for name, value in os.environ.items()):
        return
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    for variable in _DIRECT:
        listed = os.environ.get(variable) or known
        # An asterisk means all hosts if it stands alone, and to gRPC it means nothing.
        if listed.strip() != "*" or variable == _DIRECT[0]:
            there = [name.strip() for name in listed.split(",")]
            os.environ[variable] = ",".join(dict.fromkeys(filter(None, [*there, *hosts])))


def _with_home(argument: str) -> str:
    """An argument whose value is a path below ~, with the path of the home directory."""
    found = _HOME.fullmatch(argument)
    return f"{found[1]}{os.path.expanduser(found[2])}" if found else argument


def _help(doc: str, module: str) -> str:
    """The text of --help: what the command does, then its flags."""
    lines = [doc.strip(), "", "Flags:"]
    for flag in sorted(flags.FLAGS.get_key_flags_for_module(module), key=lambda f: f.name):
        kind = flag.flag_type()
        value = "" if kind == "bool" else f"={kind.upper().split(' ')[0]}"
        lines.append(f"  --{flag.name}{value}")
        text = " ".join((flag.help or "").split())
        if flag.default not in (None, "") and flag.name != "config":
            text += f" (default: {flag.default_as_str})".replace("'", "")
        lines += textwrap.wrap(text, 88, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def parse_flags(
    argv: list[str], *, doc: str, module: str, beam: bool = False, arguments: bool = False
) -> list[str]:
    """Parses absl flags, or ends the process after --help.

    Args:
      argv: program name and arguments.
      doc: the command's docstring, shown by --help.
      module: name of the module that defines the command's flags.
      beam: whether flags that are not the command's may be Beam's.
      arguments: whether there may be arguments that are no flags.

    Returns:
      What is left over: Beam's flags or those arguments, if there may be any.

    Raises:
      UsageError: a flag is unknown, malformed or missing.
    """
    if any(arg in ("-h", "--help", "-help") for arg in argv[1:]):
        print(_help(doc, module))
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(list(map(_with_home, argv)), known_only=beam)[1:]
        if "config" in flags.FLAGS:
            # Any access raises what went wrong when the file was loaded.
            hasattr(flags.FLAGS.config, "lock")
    except flags.Error as error:
        # Of an error inside a config file it holds the traceback; the first line names the
        # flag, the last one says what is wrong.
        lines = str(error).strip().splitlines()
        text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
        raise UsageError(f"{text}; see --help") from error
    except OSError as error:
        names = " ".join(str(error).split())
        raise UsageError(
            f"no such config file: {names}; see configs/ for those there are"
        ) from error
    except AttributeError as error:  # How ml_collections reports a key that is not there.
        key = re.search(r"\w+", str(error))[0]
        near = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f"did you mean --config.{near[1]}?" if near else "see the config file for its keys"
        raise UsageError(f"--config.{key}: no such key in the config; {hint}") from error
    except Exception as error:  # Whatever a config file, which is the user's code, may raise.
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"the config file failed at {where.filename}:{where.lineno}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if rest and not beam and not arguments:
        raise UsageError(f"unexpected argument {rest[0]!r}; all arguments are flags, see --help")
    return rest


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
    reach_directly()
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    def work() -> None:
        main(parse_flags(sys.argv, doc=doc, module=module, beam=beam, arguments=arguments))

    def interrupt(number: int, _) -> None:
        # At once and without unwinding: what is on disk is whole at any moment, while a
        # runner would go on with its work, or take an exception for a failure of it.
        text = (
            f"\n{name}: stopped by {signal.Signals(number).name}; run the same command again, "
            "files that are whole stay\n"
        )
        with contextlib.suppress(OSError):  # Whoever read it may be gone.
            os.write(_stderr, text.encode())
        os._exit(Interrupted.exit_status)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    sys.exit(end(name, work))
