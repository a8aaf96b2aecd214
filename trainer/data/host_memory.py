"""How much memory this process may use: of the machine, or of its container if that is less."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


def _limit_files(root: str, membership: str) -> Iterator[pathlib.Path]:
    """The files that may hold a limit: of each control group of this process, and its parents.

    A container often sees its own group as the root, under another name than the path in
    `membership`; so groups that are not there are none of its limits.
    """
    with contextlib.suppress(OSError), open(membership) as file:
        for line in file:
            number, controllers, path = [*line.rstrip("\n").split(":", 2), "", ""][:3]
            if number == "0":
                top, name = pathlib.Path(root), "memory.max"
            elif "memory" in controllers.split(","):
                top, name = pathlib.Path(root, "memory"), "memory.limit_in_bytes"
            else:
                continue
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for count in range(len(parts) + 1):
                yield pathlib.Path(top, *parts[:count], name)


def usable_bytes(root: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> int:
    """The smallest of the machine's memory and the limits of this process's control groups.

    Args:
      root: where the control groups are mounted, of version 1 or 2.
      membership: the file that says which of them the process is in.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _limit_files(root, membership):
        with contextlib.suppress(OSError):
            text = path.read_text().strip()
            if text.isdecimal():  # Else it is "max".
                limits.append(int(text))
    return min(limits)
