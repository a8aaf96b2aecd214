"""Runs commands in processes that are forked from one with the imports done.

Such a process costs what its command does, and not the seconds that TensorFlow and Beam take to
import. How a program starts is shown by tests that start it with `conftest.run_command`.
"""

import functools
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping

REPOSITORY = pathlib.Path(__file__).parents[1]


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """This process' environment, without what tests set for TensorFlow and with more variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    return {**kept, **(more or {})}


def _run(
    command: list[str],
    variables: dict[str, str],
    outputs: tuple[pathlib.Path, pathlib.Path],
    prepare: Callable[[], None] | None,
) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # The server ignores it.
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(REPOSITORY)
    if prepare:
        prepare()
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def start(
    module: str,
    *args: object,
    stdout: pathlib.Path,
    stderr: pathlib.Path,
    env: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
):
    """Starts `python -m module args…`, with more of an environment.

    Args:
      module: a command, or a program that runs one.
      *args: its arguments.
      stdout: file to which its standard output is appended.
      stderr: the same for its standard error; may be the same file.
      env: variables beside those of this process.
      prepare: what the process calls first.

    Returns:
      The process, which can be joined and then has an exitcode, negative for a signal.
    """
    command = [module, *map(str, args)]
    arguments = (command, environment(env), (stdout, stderr), prepare)
    process = _server().Process(target=_run, args=arguments)
    process.start()
    return process


def run_command(
    module: str, *args: object, check: bool = True, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs a command to its end, as `conftest.run_command` does."""
    with tempfile.TemporaryDirectory() as directory:
        stdout, stderr = (pathlib.Path(directory, name) for name in ("stdout", "stderr"))
        process = start(module, *args, stdout=stdout, stderr=stderr, env=env)
        process.join()
        texts = [path.read_text() for path in (stdout, stderr)]
    done = subprocess.CompletedProcess([module, *map(str, args)], process.exitcode, *texts)
    if check:
        assert done.returncode == 0, done.stderr
    return done
