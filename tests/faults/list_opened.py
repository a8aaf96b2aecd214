"""Runs one of the commands, and lists the files that it opens.

python -m tests.faults.list_opened FILE MODULE FLAG...
"""

import os
import runpy
import sys


def main() -> None:
    """Appends the path of each file that this process, or one forked from it, opens to FILE."""
    list_of_opened, module = (
        os.open(sys.argv[1], os.O_CREAT | os.O_APPEND | os.O_WRONLY),
        sys.argv[2],
    )

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            os.write(list_of_opened, os.fsencode(arguments[0]) + b"\n")

    sys.addaudithook(note)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
