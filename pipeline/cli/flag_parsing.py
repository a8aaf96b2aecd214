"""A command's flags: --help, and what is said of flags that are wrong.

The flags themselves are defined in the commands.
"""

import os
import re
import textwrap
import traceback

from absl import flags

from pipeline.cli.errors import UsageError

# A home directory where no shell puts in its path: --flag=~/x, --flag=KIND:~/x.
_HOME = re.compile(r"(--?[\w.]+=(?:\w+:)?)(~(?:/.*)?)", re.DOTALL)


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
