"""Runs one of the commands, and kills it at its n-th call of a function of the pipeline.

    python -m tests.faults.die_at_call N MODULE FLAG...

With N = 0 it is not killed, and says on standard error how many calls there were.
"""

import os
import runpy
import signal
import sys
import threading

from tests.conftest import REPOSITORY

_OURS = str(REPOSITORY / "pipeline")


def main() -> None:
    number, module = int(sys.argv[1]), sys.argv[2]
    calls = 0

    def count(frame, event, _):
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(_OURS):
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count)
    sys.setprofile(count)
    sys.argv = [module, *sys.argv[3:]]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.setprofile(None)
        print(calls, file=sys.stderr)


if __name__ == "__main__":
    main()
