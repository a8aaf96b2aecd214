"""Parses a command's flags, prints --help, and explains wrong flags.

The commands define the flags.
"""

import os
import re
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from pipeline.cli import metrics_file, signed_urls
from pipeline.cli.errors import UsageError

# Subject, such as "Output" -> names of the flags about it.
Subjects = Mapping[str, Sequence[str]]

# A home directory that no shell expands: --flag=~/x, --flag=KIND:~/x, --flag=@~/x.
_HOME = re.compile(r"(--?[\w.]+=(?:\w+:|@)?)(~(?:/.*)?)", re.DOTALL)


def with_home(argument: str) -> str:
    """The argument with ~ expanded."""
    match = _HOME.fullmatch(argument)
    return f"{match[1]}{os.path.expanduser(match[2])}" if match else argument


def _help(doc: str, module: str, subjects: Subjects) -> str:
    """The text of --help: the command's docstring, then its flags by subject."""
    unlisted = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(module)}
    if metrics_file.FLAG in flags.FLAGS:
        unlisted[metrics_file.FLAG] = flags.FLAGS[metrics_file.FLAG]
    lines = [doc.strip()]
    for subject, names in subjects.items():
        lines += ["", f"{subject}:"]
        for name in names:
            lines += _help_lines(unlisted.pop(name))
    if unlisted:
        lines += ["", "Flags:"]
        for _, flag in sorted(unlisted.items()):
            lines += _help_lines(flag)
    return "\n".join(lines)


def _help_lines(flag: "flags.Flag[Any]") -> list[str]:
    kind = flag.flag_type()
    value = {"bool": "", "comma separated list of strings": "=A,B,…"}.get(kind)
    if value is None:
        value = f"={kind.upper().split(' ')[0]}"
    text = " ".join((flag.help or "").split())
    if flag.default not in (None, "") and flag.name != "config":
        text += f" (default: {flag.default_as_str})".replace("'", "")
    indent = " " * 6
    wrapped = textwrap.wrap(text, 88, initial_indent=indent, subsequent_indent=indent)
    return [f"  --{flag.name}{value}", *wrapped]


def _plain(text: str) -> str:
    """An error of absl in plain words, with the flag as it was typed."""
    flag = re.match(r"flag --([\w.]+)=(.*?): (.*)", text)
    unknown = re.match(r"Unknown command line flag '(config\..*)'", text)
    if unknown and "config" in flags.FLAGS and flags.FLAGS["config"].value is None:
        return f"--{unknown[1]}: --config is not set; name --config=FILE too"
    if not flag:
        return text
    name, value, reason = flag.groups()
    if "must have a value other than None" in reason:
        return f"--{name} is not set; expected a value"
    for library, plain in (
        ("Non-boolean argument", "expected true or false"),
        ("invalid literal for int", "expected a whole number"),
        ("could not convert string to float", "expected a number"),
    ):
        if library in reason:
            return f"--{name}={value}: {plain}"
    return text


def refuse_values(module: str, checks: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    """Lets a module's flags refuse values.

    Args:
      module: name of the module that has defined the flags.
      checks: name -> whether a value is right, and the expectation; other names may be in it.
    """
    for name in values_of(module).keys() & checks.keys():
        is_right, expected = checks[name]
        flags.register_validator(name, is_right, message=expected)  # type: ignore[no-untyped-call]


def values_of(module: str) -> dict[str, Any]:
    """Name -> value, of the flags of a module."""
    return {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(module)}


def unknown_key(error: AttributeError) -> UsageError:
    """The error for a key that ml_collections does not find in a config."""
    if "get_config" in str(error):
        return UsageError(
            "--config: the file has no get_config(); expected a function of that name"
        )
    key = re.findall(r"\w+", str(error))[0]
    near = re.search(r'Did you mean "(\w+)"', str(error))
    hint = f"did you mean --config.{near[1]}?" if near else "see the config file for its keys"
    return UsageError(f"--config.{key}: no such key in the config; {hint}")


def config_failure(error: BaseException) -> UsageError:
    """The error for an exception that a config file has raised, or the attempt to read it."""
    if isinstance(error, OSError):  # ml_collections raises it; its cause names the file.
        return UsageError(f"--config: {error.__cause__ or error}; expected a readable Python file")
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}"
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}:{frame.lineno}"
    return UsageError(f"the config file failed at {where}: {type(error).__name__}: {error}")


def check_unsigned(flag: str, value: Any) -> None:
    """Raises a UsageError for a signed URL: it gives one file, and other flags name directories.

    Args:
      flag: how the flag is written, with its equals sign; "" for an argument.
      value: a value, or a list of values.
    """
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, str) and signed_urls.is_signed(text):
            raise UsageError(
                f"{flag}{text}: {signed_urls.EXPECTED}, since only --source takes a signed URL: "
                "remove the rest of this one, or name another place"
            )


def parse_flags(
    argv: list[str],
    *,
    doc: str,
    module: str,
    subjects: Subjects | None = None,
    beam: bool = False,
    arguments: bool = False,
) -> list[str]:
    """Parses absl flags, or ends the process after --help.

    Args:
      argv: program name and arguments.
      doc: the command's docstring, shown by --help.
      module: name of the module that defines the command's flags.
      subjects: groups the flags for --help; other flags follow the groups.
      beam: whether other flags go to Beam.
      arguments: whether positional arguments are allowed.

    Returns:
      The remaining arguments: Beam's flags or positional arguments.

    Raises:
      UsageError: a flag is unknown, malformed or missing, or has a signed URL.
    """
    if any(arg in ("-h", "--help", "-help") for arg in argv[1:]):
        print(_help(doc, module, subjects or {}), flush=True)
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(list(map(with_home, argv)), known_only=beam)[1:]
    except flags.Error as error:
        # An error inside a config file comes with its traceback: the first line names the flag, the
        # last line the error.
        lines = str(error).strip().splitlines()
        text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
        raise UsageError(f"{_plain(text)}; see --help") from error
    except AttributeError as error:  # ml_collections reports an unknown key like this.
        raise unknown_key(error) from error
    except (Exception, SystemExit) as error:  # A config file is the user's code.
        raise config_failure(error) from error
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if name.endswith("dir") and flag.present and flag.value == "":
            raise UsageError(f"--{name}=: is empty; expected a directory: name one")
        if name != "source":
            check_unsigned(f"--{name}=", flag.value)
    if arguments:
        check_unsigned("", rest)
    if rest and not beam and not arguments:
        raise UsageError(f"unexpected argument {rest[0]!r}; all arguments are flags, see --help")
    return rest
