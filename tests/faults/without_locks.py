"""Runs a command for which the kernel answers flock with an error, as on NFS without its daemon.

python -m tests.faults.without_locks ERRNO MODULE FLAG...
"""

import ctypes
import os
import platform
import struct
import sys

# The number of flock(2), by the kind of machine.
NUMBERS = {"x86_64": 73, "aarch64": 32}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # Of classic BPF.
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def main() -> None:
    error = int(sys.argv[1])
    filter_ = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, 0),  # The number of the call.
            (_JUMP_IF_EQUAL, 0, 1, NUMBERS[platform.machine()]),
            (_RETURN, 0, 0, _ERRNO | error),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    kept = ctypes.create_string_buffer(filter_, len(filter_))
    program = struct.pack("HxxxxxxP", len(filter_) // 8, ctypes.addressof(kept))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])


if __name__ == "__main__":
    main()
